"""Every config in configs/, built small and run."""

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope

import mmvssm  # noqa: F401  makes 'mmvssm::' known
from mmvssm.engine import enable_tta
from tiny import REPO, shrink, write_config

pytest.importorskip('mmseg')
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

SEGMENTORS = sorted((REPO / 'configs').glob('upernet_*.py'))
FOUR_BANDS = REPO / 'configs/upernet_vmamba_four_bands_quickstart.py'
QUICKSTARTS = [
    path for path in SEGMENTORS if 'quickstart' in path.stem and path != FOUR_BANDS
]
PUBLISHED = {
    # arch, drop path, channels
    'upernet_vmamba_t': ('t_s1l8', 0.2, 96),
    'upernet_vmamba_s': ('s_s2l15', 0.3, 96),
    'upernet_vmamba_b': ('b_s2l15', 0.6, 128),
    'upernet_vmamba_t_s2l5': ('t_s2l5', 0.2, 96),
    'upernet_vmamba_v0_t': ('t_v0', 0.3, 96),
    'upernet_vmamba_v0_s': ('s_v0', 0.3, 96),
    'upernet_vmamba_v0_b': ('b_v0', 0.3, 128),
    'upernet_vmamba_v0_s_640': ('s_v0', 0.3, 96),
    'upernet_mlla_t': ('t', 0.2, 64),
    'upernet_mlla_s': ('s', 0.3, 64),
    'upernet_mlla_b': ('b', 0.5, 96),
}
STAGED = [path for path in SEGMENTORS if 'vmamba' in path.stem or 'mlla' in path.stem]


def names(path):
    return path.stem


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


def build(cfg):
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def batch(cfg, number=2, size=(64, 96)):
    samples = []
    for _ in range(number):
        sample = SegDataSample(
            metainfo=dict(
                img_shape=size,
                ori_shape=size,
                pad_shape=size,
                img_path='',
                flip=False,
            )
        )
        labels = torch.randint(0, cfg.model.decode_head.num_classes, (1, *size))
        sample.set_data(dict(gt_sem_seg=_pixels(labels)))
        samples.append(sample)
    shape = (cfg.model.backbone.get('in_channels', 3), *size)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(number)]
    return dict(inputs=images, data_samples=samples)


def _pixels(labels):
    from mmengine.structures import PixelData

    return PixelData(data=labels)


@pytest.mark.parametrize('path', SEGMENTORS, ids=names)
def test_loss_and_prediction(path):
    cfg = shrink(Config.fromfile(path))
    model = build(cfg)
    data = model.data_preprocessor(batch(cfg), True)
    losses = model.loss(**data)
    assert {'decode.loss_ce', 'aux.loss_ce'} <= set(losses)
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    # DDP's default flags need a gradient for every parameter.
    idle = [k for k, p in model.named_parameters() if p.grad is None]
    assert not idle
    with torch.no_grad():
        predictions = model.eval().test_step(batch(cfg, 1))
    labels = predictions[0].pred_sem_seg.data
    assert labels.shape == (1, 64, 96)
    assert 0 <= labels.min() and labels.max() < cfg.model.decode_head.num_classes
    predict_small_images(cfg, model)


@torch.no_grad()
def predict_small_images(cfg, model):
    """Images of any size are predicted, or refused in one sentence."""
    least = model.backbone.min_size
    # In patches, which the smallest size of a hierarchical backbone need not be.
    needed = {'mmvssm.Feature2Pyramid': 4 if least == 8 else 2}
    needed = least * needed.get(cfg.model.get('neck', {}).get('type'), 1)
    for side in {1, least, least + 1, needed - 1, needed}:
        data = batch(cfg, 1, (side, 2 * side))
        if side < needed:
            with pytest.raises(ValueError, match=r'takes images .*of at least'):
                model.test_step(data)
        else:
            (sample,) = model.test_step(data)
            assert sample.pred_sem_seg.data.shape == (1, side, 2 * side)


@pytest.mark.parametrize('path', SEGMENTORS, ids=names)
def test_every_data_set_and_hook_is_known(path):
    """What the model test does not touch resolves to a class."""
    from mmseg.registry import (
        DATASETS,
        HOOKS,
        LOOPS,
        METRICS,
        PARAM_SCHEDULERS,
        TRANSFORMS,
        VISUALIZERS,
    )

    cfg = Config.fromfile(path)
    assert cfg.default_scope == 'mmseg'
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert DATASETS.get(dataset.type)
        for step in dataset.pipeline:
            assert TRANSFORMS.get(step.type), step
        assert LOOPS.get(cfg[f'{split}_cfg'].type)
    assert METRICS.get(cfg.test_evaluator.type)
    assert VISUALIZERS.get(cfg.visualizer.type)
    assert all(HOOKS.get(x.type) for x in cfg.default_hooks.values())
    schedulers = cfg.param_scheduler
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    assert all(PARAM_SCHEDULERS.get(x.type) for x in schedulers)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_settings(name):
    cfg = Config.fromfile(REPO / 'configs' / f'{name}.py')
    arch, drop_path, dims = PUBLISHED[name]
    channels = [dims, 2 * dims, 4 * dims, 8 * dims]
    crop = 640 if name.endswith('_640') else 512
    model = cfg.model
    assert model.type == 'EncoderDecoder'
    family = 'MLLA' if 'mlla' in name else 'VSSM'
    assert model.backbone.type == f'mmvssm.{family}'
    assert model.backbone.arch == arch
    assert model.backbone.drop_path_rate == drop_path
    assert model.backbone.out_indices == (0, 1, 2, 3)
    head, aux = model.decode_head, model.auxiliary_head
    assert (head.type, head.channels, head.num_classes) == ('UPerHead', 512, 150)
    assert head.in_channels == channels
    assert (aux.type, aux.channels, aux.in_index, aux.in_channels) == (
        'FCNHead',
        256,
        2,
        channels[2],
    )
    assert aux.num_classes == 150 and aux.loss_decode.loss_weight == 0.4
    assert head.norm_cfg.type == aux.norm_cfg.type == 'SyncBN'
    assert model.test_cfg.mode == 'whole'
    assert model.data_preprocessor.size == (crop, crop)

    optimizer = cfg.optim_wrapper.optimizer
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert dict(optimizer) == dict(
        type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01
    )
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys == dict(
        norm=dict(decay_mult=0.0)
    )
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.end) == ('LinearLR', 1e-6, 1500)
    assert (decay.type, decay.power, decay.eta_min, decay.begin, decay.end) == (
        'PolyLR',
        1.0,
        0.0,
        1500,
        160000,
    )
    assert not warm_up.by_epoch and not decay.by_epoch
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == (
        'IterBasedTrainLoop',
        160000,
    )
    # 8 GPUs x 2
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.val_dataloader.batch_size == 1
    steps = {x.type: x for x in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomResize'].scale == (4 * crop, crop)
    assert steps['RandomResize'].ratio_range == (0.5, 2.0)
    assert steps['RandomCrop'].crop_size == (crop, crop)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline[1].scale == (4 * crop, crop)


@pytest.mark.parametrize(
    'name,backbone,width,head,rate,parameters',
    [
        ('vim_t', dict(residual_in_fp32=False), 192, 192, 0.92, 12.3),
        (
            'vim_s',
            dict(
                rope=True,
                rope_residual=True,
                average=False,
                feature='residual',
                last_layer_process='add',
            ),
            384,
            384,
            0.95,
            45.4,
        ),
    ],
)
def test_published_settings_of_vim(name, backbone, width, head, rate, parameters):
    cfg = Config.fromfile(REPO / 'configs' / f'upernet_{name}.py')
    model = cfg.model
    common = dict(
        type='mmvssm.Vim',
        arch=name[-1],
        img_size=512,
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=f'mmvssm://{name}'),
    )
    assert dict(model.backbone) == common | backbone
    assert model.neck.type == 'mmvssm.Feature2Pyramid' and model.neck.embed_dim == width
    assert (model.decode_head.type, model.decode_head.channels) == ('UPerHead', head)
    assert model.decode_head.in_channels == [width] * 4
    assert model.auxiliary_head.in_channels == width
    assert model.auxiliary_head.channels == 256
    assert dict(model.test_cfg) == dict(
        mode='slide', crop_size=(512, 512), stride=(341, 341)
    )
    wrapper = cfg.optim_wrapper
    assert wrapper.constructor == 'mmvssm.LayerDecayOptimWrapperConstructor'
    assert dict(wrapper.optimizer) == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    assert wrapper.paramwise_cfg.layer_decay_rate == rate
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 60000
    # 4 GPUs x 8
    assert cfg.train_dataloader.batch_size == 8
    assert cfg.auto_scale_lr.base_batch_size == 32
    assert count(cfg) == pytest.approx(parameters, abs=0.05)


@pytest.mark.parametrize(
    'name,width,indices,drop_path,rate,parameters',
    [
        ('s', 384, (5, 11, 17, 23), 0.1, 0.92, 56),
        ('b', 768, (5, 11, 17, 23), 0.3, 0.92, 132),
        ('l', 1024, (11, 23, 35, 47), 0.4, 0.96, 377),
    ],
)
def test_settings_of_mambar(name, width, indices, drop_path, rate, parameters):
    """The parameters are those of the paper, in millions and rounded."""
    cfg = Config.fromfile(REPO / 'configs' / f'upernet_mambar_{name}.py')
    model = cfg.model
    backbone = model.backbone
    assert (backbone.type, backbone.arch) == ('mmvssm.MambaR', name)
    assert (backbone.img_size, backbone.drop_path_rate) == (512, drop_path)
    assert backbone.out_indices == indices
    assert model.neck.channels == model.auxiliary_head.in_channels == width
    assert (model.decode_head.channels, model.auxiliary_head.channels) == (512, 256)
    assert cfg.optim_wrapper.paramwise_cfg == dict(layer_decay_rate=rate)
    # The stem learns alike at either depth.
    blocks = indices[-1] + 1
    assert rate ** (blocks + 1) == pytest.approx(0.92**25, abs=0.015)
    assert cfg.train_cfg.max_iters == 160000
    assert round(count(cfg)) == parameters


def count(cfg):
    """Millions of parameters of the model."""
    del cfg.model.data_preprocessor
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    'path', [p for p in SEGMENTORS if p not in (*STAGED, *QUICKSTARTS)], ids=names
)
def test_layer_decay_reaches_every_parameter(path):
    from mmengine.optim import build_optim_wrapper

    cfg = shrink(Config.fromfile(path))
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    lr = cfg.optim_wrapper.optimizer.lr
    rate = cfg.optim_wrapper.paramwise_cfg.layer_decay_rate
    scales = {}
    for group in groups:
        scales |= dict.fromkeys(group['param_names'], group['lr'] / lr)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    for name, depth in (
        ('backbone.pos_embed', 0),
        ('backbone.layers.0.mixer.A_log', 1),
        ('backbone.layers.3.mixer.out_proj.weight', 4),
        ('decode_head.conv_seg.weight', 5),
    ):
        assert scales[name] == pytest.approx(rate ** (5 - depth)), name


@pytest.mark.parametrize('path', QUICKSTARTS, ids=names)
def test_quickstart_is_the_common_path_made_small(path):
    """Heads, losses (without class weights) and pyramid are the published ones."""
    arch = dict(vmamba='t', vim='t', mambar='s')[path.stem.split('_')[1]]
    full = path.with_stem(path.stem.replace('quickstart', arch))
    small, full = (Config.fromfile(p).model for p in (path, full))
    assert small.type == full.type
    for part in ('backbone', 'decode_head', 'auxiliary_head', 'data_preprocessor'):
        assert small[part].type == full[part].type
    assert small.get('neck', {}).get('type') == full.get('neck', {}).get('type')
    for head in ('decode_head', 'auxiliary_head'):
        assert small[head].loss_decode == full[head].loss_decode
        assert 'class_weight' not in small[head].loss_decode
    for key in ('feature', 'last_layer_process', 'cls_token'):
        assert small.backbone.get(key) == full.backbone.get(key)


def test_quickstarts_differ_in_the_backbone_alone():
    """Data, heads, optimizer and tests are the same; the plain ones train shorter."""
    base, *others = (Config.fromfile(p) for p in reversed(QUICKSTARTS))
    assert base.model.backbone.type == 'mmvssm.VSSM'
    for other in others:
        assert other.model.backbone.arch.patch_size == 8
        assert other.train_cfg.max_iters == other.param_scheduler[1].end
        assert other.train_cfg.max_iters <= base.train_cfg.max_iters
        for key in ('train_dataloader', 'val_dataloader', 'generator', 'test_cfg'):
            assert other[key] == base[key]
        assert other.model.test_cfg == base.model.test_cfg
        for head in ('decode_head', 'auxiliary_head'):
            mine, its = dict(other.model[head]), dict(base.model[head])
            del mine['in_channels'], its['in_channels']
            assert mine == its


def test_four_bands_differ_from_three_in_the_images_alone():
    four, three = (Config.fromfile(p) for p in (FOUR_BANDS, QUICKSTARTS[-1]))
    backbone = dict(four.model.backbone)
    assert backbone.pop('in_channels') == 4
    assert backbone == three.model.backbone
    for head in ('decode_head', 'auxiliary_head'):
        assert four.model[head] == three.model[head]
    assert four.optim_wrapper == three.optim_wrapper
    assert four.train_cfg == three.train_cfg
    pipelines = ('train_pipeline', 'test_pipeline')
    for key in pipelines:
        load, *others = four[key]
        assert load.imdecode_backend == 'tifffile' and others == three[key][1:]
    assert four.tta_pipeline[1:] == three.tta_pipeline[1:]
    assert dict(four.generator, bands=3) == dict(three.generator, bands=3)


def test_weight_decay_spares_what_was_published():
    """Names with 'norm' only: not A_logs, biases or the stem's norms."""
    from mmengine.optim import build_optim_wrapper

    cfg = shrink(Config.fromfile(REPO / 'configs/upernet_vmamba_t.py'))
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {}
    of = {id(p): name for name, p in model.named_parameters()}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            decay[of[id(parameter)]] = group['weight_decay']
    assert len(decay) == len(of)
    spared = {name for name, value in decay.items() if value == 0}
    assert spared == {name for name in decay if 'norm' in name}
    for name in (
        'layers.0.blocks.0.op.A_logs',
        'patch_embed.2.weight',
        'layers.0.blocks.0.op.dt_projs_bias',
    ):
        assert decay[f'backbone.{name}'] == 0.01
    assert 'backbone.outnorm0.weight' in spared


def test_weight_decay_of_mlla_spares_norms_of_layers_and_convolutions():
    from mmengine.optim import build_optim_wrapper

    cfg = shrink(Config.fromfile(REPO / 'configs/upernet_mlla_b.py'))
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    decay = {name: found[id(p)] for name, p in model.named_parameters()}
    for name, value in {
        'patch_embed.conv3.1.norm.weight': 0,
        'layers.0.downsample.conv.2.norm.bias': 0,
        'layers.2.blocks.0.norm2.weight': 0,
        'norm3.weight': 0,
        'layers.0.blocks.0.attn.qk.bias': 0.01,
        'layers.0.blocks.0.cpe1.weight': 0.01,
    }.items():
        assert decay[f'backbone.{name}'] == value, name


@pytest.mark.parametrize('path', SEGMENTORS, ids=names)
def test_tta_wraps_and_predicts(path):
    cfg = shrink(Config.fromfile(path))
    enable_tta(cfg)
    assert cfg.test_dataloader.dataset.pipeline == cfg.tta_pipeline
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    cfg = cfg.model.module
    data = batch(Config(dict(model=cfg)), 1)
    flipped = batch(Config(dict(model=cfg)), 1)
    flipped['inputs'][0] = data['inputs'][0].flip(-1)
    flipped['data_samples'][0].set_metainfo(
        dict(flip=True, flip_direction='horizontal')
    )
    both = {key: [data[key], flipped[key]] for key in data}
    with torch.no_grad():
        result = model.test_step(both)
    assert result[0].pred_sem_seg.data.shape == (1, 64, 96)


def test_inherited_by_scope_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'mine.py'
    path.write_text(
        "_base_ = 'mmvssm::upernet_vmamba_t.py'\n"
        'model = dict(backbone=dict(drop_path_rate=0.4))\n'
    )
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.arch == 't_s1l8'
    assert cfg.model.backbone.drop_path_rate == 0.4
    assert cfg.train_cfg.max_iters == 160000
    # Built in the scope of the toolbox, not in the one it is inherited from.
    model = build(shrink(cfg))
    assert type(model.backbone).__name__ == 'VSSM'
    assert type(model.decode_head).__module__.startswith('mmseg.')


def test_backbone_in_somebody_elses_config(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("""
_base_ = ['mmseg::_base_/models/upernet_swin.py',
          'mmseg::_base_/datasets/ade20k.py',
          'mmseg::_base_/default_runtime.py',
          'mmseg::_base_/schedules/schedule_160k.py']
model = dict(
    data_preprocessor=dict(size=(64, 96)),
    backbone=dict(
        _delete_=True, type='mmvssm.VSSM', arch='t_s1l8',
        out_indices=(0, 1, 2, 3)))
""")
    cfg = shrink(Config.fromfile(path))
    model = build(cfg)
    data = model.data_preprocessor(batch(cfg), True)
    assert torch.isfinite(model.loss(**data)['decode.loss_ce'])


def test_ade20k_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv('ADE20K_ROOT', '/data/ade')
    cfg = Config.fromfile(SEGMENTORS[0])
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == '/data/ade'


def test_tiny_config_is_a_whole_experiment(tmp_path):
    """The one the other tests train."""
    cfg = Config.fromfile(write_config(tmp_path / 'tiny.py', tmp_path))
    assert sum(p.numel() for p in build(cfg).parameters()) < 2e5
