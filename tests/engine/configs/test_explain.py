"""Mistakes that mmengine finds when it builds: built, and then explained."""

import mmengine.runner.runner
import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, Registry, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmvssm.engine import UsageError, check_labels, is_detector, load_config
from mmvssm.engine.configs.explain import explain
from tiny import write_ade, write_config
from tiny_det import needs_detection

pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp('explain')
    write_ade(folder / 'ade')
    return str(write_config(folder / 'tiny.py', folder / 'ade'))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    # It asks compilers for their versions.
    monkeypatch.setattr(mmengine.runner.runner, 'collect_env', dict)
    monkeypatch.setattr(Config, 'pretty_text', 'the config')
    monkeypatch.setattr(Config, 'dump', lambda *_: '')


def build_model(cfg):
    init_default_scope(cfg.default_scope)
    MODELS.build(cfg.model)


def train(cfg):
    cfg.experiment_name = f'explain_{id(cfg)}'
    Runner.from_cfg(cfg).train()


def said_of(path, option, use, tmp_path):
    cfg = load_config(path, [option], str(tmp_path))
    with pytest.raises(Exception) as error:
        use(cfg)
    return explain(error.value)


@pytest.mark.parametrize(
    'option, said',
    [
        (
            'backbone.type=VSSM',
            "model.backbone.type: 'VSSM' is not in mmseg's model registry; did you "
            "mean 'mmvssm.VSSM'?",
        ),
        (
            'backbone.type=mmvsm.VSSM',
            "model.backbone.type: 'mmvsm.VSSM' is not in mmseg's model registry; did "
            "you mean 'mmvssm.VSSM'?",
        ),
        (
            'backbone.type=mmvssm.VSSN',
            "model.backbone.type: 'mmvssm.VSSN' is not in mmvssm's model registry; did "
            "you mean 'mmvssm.VSSM'?",
        ),
        (
            'decode_head.norm_cfg.type=SyncBM',
            "model.decode_head.norm_cfg.type: 'SyncBM' is not in mmseg's model "
            "registry; did you mean 'SyncBN'?",
        ),
        (
            'decode_head.type=QQQQQQQQ',
            "model.decode_head.type: 'QQQQQQQQ' is not in mmseg's model registry. If "
            'it is your own, name its module in custom_imports.',
        ),
        (
            'backbone.drop_path=0.1',
            "model.backbone: mmvssm.VSSM takes no 'drop_path'; did you mean "
            "'drop_path_rate'?",
        ),
        (
            'backbone.depth=3',
            "model.backbone: mmvssm.VSSM takes no 'depth'. It takes arch, img_size, ",
        ),
        (
            'decode_head.loss_decode.los_weight=1',
            "model.decode_head.loss_decode: CrossEntropyLoss takes no 'los_weight'; "
            "did you mean 'loss_weight'",
        ),
        (
            # Handed on to a base class.
            'auxiliary_head.chanels=8',
            "model.auxiliary_head: FCNHead takes no 'chanels'; did you mean 'channels'",
        ),
        (
            'auxiliary_head="dict(type=\'FCNHead\', channels=8, in_channels=4)"',
            'model.auxiliary_head: FCNHead is missing 1 required ',
        ),
        (
            'auxiliary_head.loss_decode="dict(loss_weight=1)"',
            'model.auxiliary_head.loss_decode must have a type, and is {',
        ),
    ],
)
def test_models(path, option, said, tmp_path):
    if 'required' in said or 'must have' in said:
        key = option.partition('=')[0].split('.')
        cfg = load_config(path)
        node = cfg.model
        for part in key[:-1]:
            node = node[part]
        node[key[-1]] = eval(option.partition('=')[2].strip('"'))
        with pytest.raises((TypeError, KeyError)) as error:
            build_model(cfg)
        assert explain(error.value).startswith(said)
        return
    assert said_of(path, f'model.{option}', build_model, tmp_path).startswith(said)


@pytest.mark.parametrize(
    'option, said',
    [
        (
            'train_dataloader.dataset.pipeline.2.type=Resise',
            "train_dataloader.dataset.pipeline.2.type: 'Resise' is not in mmseg's "
            "transform registry; did you mean 'Resize'",
        ),
        (
            'train_dataloader.sampler.type=InfinitSampler',
            "train_dataloader.sampler.type: 'InfinitSampler' is not in mmseg's data "
            "sampler registry; did you mean 'InfiniteSampler'",
        ),
        ('train_dataloader.batchsize=3', "DataLoader takes no 'batchsize'; did you"),
        ('train_dataloader.collate_fn="dict(type=\'no\')"', "collate_fn.type: 'no' is"),
        (
            'optim_wrapper.optimizer.type=AdmW',
            "optim_wrapper.optimizer.type: 'AdmW' is not in mmseg's optimizer "
            "registry; did you mean 'AdamW'",
        ),
        ('optim_wrapper.constructor=No', "optim_wrapper.constructor: 'No' is not in"),
        ('default_hooks.logger.type=LoggrHook', "did you mean 'LoggerHook'?"),
        ('param_scheduler.0.start_facor=3', "did you mean 'start_factor'?"),
        ('train_cfg.max_itrs=3', "did you mean 'max_iters'?"),
        ('val_evaluator.type=IoUMetrc', "val_evaluator.type: 'IoUMetrc' is not in"),
        ('visualizer.type=SegLocalVisualiser', "did you mean 'SegLocalVisualizer' or"),
        ('randomness.sed=3', "randomness: set_randomness takes no 'sed'; did you mean"),
    ],
)
def test_everything_else(path, option, said, tmp_path):
    assert said in said_of(path, option, train, tmp_path)


@pytest.mark.parametrize(
    'key', ['dataset.type=ADE2KDataset', 'dataset.pipeline.2.type=Resise']
)
def test_the_look_at_the_data_says_so_too(path, key, tmp_path):
    """It would skip what it does not know."""
    cfg = load_config(path, [f'train_dataloader.{key}'], str(tmp_path))
    init_default_scope('mmseg')
    with pytest.raises(UsageError, match=f'^train_dataloader.{key.split("=")[0]}: '):
        check_labels(cfg)


class Careless(nn.Module):
    """Does not hand on what it takes."""

    def __init__(self, channels):
        super().__init__()
        nn.Linear(2, 2, channels=channels)


def test_a_fault_of_a_part_is_not_the_configs():
    cfg = Config(dict(model=dict(type=Careless, channels=3)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'channels'") as no:
        MODELS.build(cfg.model)
    assert explain(no.value, cfg) is None


def test_other_errors_are_not_explained(path):
    def fail(error):
        cfg = load_config(path)
        assert cfg
        raise error

    for error in (
        KeyError('VSSM is not in the model registry'),
        TypeError("f() got an unexpected keyword argument 'nothing_of_the_config'"),
        # test_cfg has it, and means another.
        TypeError("forward() got an unexpected keyword argument 'mode'"),
        TypeError('unsupported operand'),
        ValueError('no'),
    ):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert explain(caught.value) is None


def test_a_model_of_mmseg_in_the_scope_of_mmdet(path):
    with pytest.raises(UsageError, match="no model 'EncoderDecoder': for a segmentor"):
        load_config(path, ['default_scope=mmdet'])
    cfg = load_config(path, ['default_scope=mmdet', 'model.type=mmseg.EncoderDecoder'])
    assert not is_detector(cfg)


@needs_detection
def test_a_detector_in_the_scope_of_mmseg(path, tmp_path):
    cfg = load_config(path, ['default_scope=mmseg'])
    cfg.model = dict(type='MaskRCNN')
    with pytest.raises(KeyError) as error:
        build_model(cfg)
    said = explain(error.value)
    assert "did you mean 'mmdet.MaskRCNN'? The default_scope of the config is" in said


def test_scopes(path):
    with pytest.raises(UsageError, match=r"default_scope='mmnothing' is no package"):
        load_config(path, ['default_scope=mmnothing'])
    # One that a module of the user's registers; it has no package of that name.
    Registry('toy model', parent=MODELS, scope='toyscope')
    assert load_config(path, ['default_scope=toyscope']).default_scope == 'toyscope'
    MODELS.children.pop('toyscope')
