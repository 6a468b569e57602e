import pytest

from mmvssm.engine import UsageError, load_config
from tiny import write_config


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp('options')
    return str(write_config(folder / 'tiny.py', folder))


@pytest.mark.parametrize(
    'text, value',
    [
        ('dict(depths=(1, 1, 1, 1), dims=8)', dict(depths=(1, 1, 1, 1), dims=8)),
        ("{'depths': [2], 'dims': -1}", dict(depths=[2], dims=-1)),
        ("[dict(a=1),dict(b='x')]", [dict(a=1), dict(b='x')]),
        ('dict(a=dict(b=None))', dict(a=dict(b=None))),
        # What mmengine reads.
        ('1,2', [1, 2]),
        ('(3,[4,x])', (3, [4, 'x'])),
        ('t_s1l8', 't_s1l8'),
        ('1e-3', 0.001),
        ('iter_{}.pth', 'iter_{}.pth'),
    ],
)
def test_values(path, text, value):
    cfg = load_config(path, [f'model.backbone.extra={text}'])
    assert cfg.model.backbone.extra == value


@pytest.mark.parametrize(
    'text', ['tuple(1,2)', 'dict(1)', '[1,(2,{', 'dict(a=open("x"))', '{a: 1}']
)
def test_values_that_cannot_be_read(path, text):
    with pytest.raises(UsageError, match='the value cannot be read. Write it as in Py'):
        load_config(path, [f'model.backbone.arch={text}'])


@pytest.mark.parametrize(
    'option, said',
    [
        ('train_dataloder.batch_size=4', "'train_dataloder'.*mean 'train_dataloader'"),
        ('resum=True', "did you mean 'resume'"),
        ('model.bakbone.arch=x', "model of .* no 'bakbone'; did you mean 'backbone'"),
        ('model.bakbone.type=x', "did you mean 'backbone'"),
        ('train_dataloader.dataset.pipeline.99.type=X', "no '99'"),
        ('model.neck.out=8', r'To add it: model.neck="dict\(out=...\)"'),
        ('model.type.x=1', 'does not fit|model.type of'),
        ('no-equals-sign', 'write KEY.SUBKEY=VALUE'),
        ('model..x=1', 'write KEY.SUBKEY=VALUE'),
    ],
)
def test_keys_that_nothing_reads(path, option, said):
    """mmengine would add them, and train with the old value."""
    with pytest.raises(UsageError, match=said):
        load_config(path, [option])


def test_what_is_added_is_said(path, monkeypatch):
    said = []
    monkeypatch.setattr(
        'mmvssm.engine.configs.options.print_log', lambda text, _: said.append(text)
    )
    options = [
        'optim_wrapper.clip_grad=dict(max_norm=1)',
        'optim_wrapper.clip_grad.norm_type=2',
        'model.decode_head.init_cfg.checkpoint=a.pth',
        'model.decode_head.init_cfg.type=Pretrained',
        'model.test_cfg.mod=slide',
        'randomness.seed=3',
        'sync_bn=torch',
        'resume=True',
        'crop_size=(1,1)',
        'data_preprocessor.size=(1,1)',
        'train_cfg.max_iters=5',
        'model.backbone._delete_=True',
        'model.backbone.type=X',
    ]
    cfg = load_config(path, options)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1, norm_type=2)
    assert cfg.randomness.seed == 3 and cfg.model.backbone == dict(type='X')
    assert [line.removeprefix('--cfg-options ') for line in said] == [
        'adds optim_wrapper.clip_grad to the config',
        'adds model.decode_head.init_cfg.checkpoint to the config',
        'adds model.decode_head.init_cfg.type to the config',
        'adds model.test_cfg.mod to the config, which has model.test_cfg.mode, too',
        f'crop_size: what {path} made of crop_size keeps its value',
        f'data_preprocessor.size: what {path} made of data_preprocessor keeps its '
        'value',
    ]
    said.clear()
    monkeypatch.setenv('RANK', '1')
    load_config(path, options)
    assert not said
