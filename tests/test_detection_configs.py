"""Every detection config, built small and run."""

import pytest
import torch
from mmengine.config import Config

import mmvssm  # noqa: F401  makes 'mmvssm::' known
from mmvssm.engine.hooks.float32_regions import keep_regions_in_float32
from tiny import REPO
from tiny_det import DETECTORS, batch, build, needs_detection, shrink, total_loss

VMAMBA = {
    # arch, drop path, channels, epochs, milestones
    't_1x': ('t_s1l8', 0.2, 96, 12, [8, 11]),
    's_1x': ('s_s2l15', 0.3, 96, 12, [8, 11]),
    'b_1x': ('b_s2l15', 0.6, 128, 12, [8, 11]),
    't_3x': ('t_s1l8', 0.2, 96, 36, [27, 33]),
    's_3x': ('s_s2l15', 0.3, 96, 36, [27, 33]),
    't_s2l5_1x': ('t_s2l5', 0.2, 96, 12, [8, 11]),
    't_s2l5_3x': ('t_s2l5', 0.2, 96, 36, [27, 33]),
    'b_1x_bs8': ('b_s2l15', 0.6, 128, 12, [8, 11]),
    'v0_t_1x': ('t_v0', 0.2, 96, 12, [8, 11]),
    'v0_s_1x': ('s_v0', 0.2, 96, 12, [8, 11]),
    'v0_b_1x': ('b_v0', 0.2, 128, 12, [8, 11]),
    'v0_t_3x': ('t_v0', 0.2, 96, 36, [27, 33]),
    'v0_s_3x': ('s_v0', 0.2, 96, 36, [27, 33]),
}
MLLA = {
    # drop path, channels, epochs, milestones
    't_1x': (0.1, 64, 12, [8, 11]),
    's_1x': (0.1, 64, 12, [8, 11]),
    'b_1x': (0.1, 96, 12, [8, 11]),
    't_3x': (0.3, 64, 36, [27, 33]),
    's_3x': (0.3, 64, 36, [27, 33]),
}
FAMILIES = (
    'mask_rcnn_vmamba_t_1x',
    'mask_rcnn_mlla_t_1x',
    'mask_rcnn_vim_t_1x',
    'mask_rcnn_mambar_s_1x',
    'cascade_mask_rcnn_vim_t_lsj_100ep',
)
every_config = pytest.mark.parametrize('path', DETECTORS, ids=lambda path: path.stem)
PLAIN = [path for path in DETECTORS if 'vim' in path.stem or 'mambar' in path.stem]


def config(name):
    return Config.fromfile(REPO / 'configs' / f'{name}.py')


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.grad is None]


# ------------------------------------------------------------------- they run
@needs_detection
@every_config
def test_loss_and_prediction(path):
    cfg = shrink(Config.fromfile(path))
    model = build(cfg)
    losses = model(**model.data_preprocessor(batch(), True), mode='loss')
    loss = total_loss(losses)
    assert loss.isfinite() and any('loss_mask' in key for key in losses)
    loss.backward()
    # DDP's default flags need a gradient for every parameter.
    assert not without_gradient(model)
    with torch.no_grad():
        (found,) = model.eval().test_step(batch(number=1))
    found = found.pred_instances
    classes = cfg.num_classes
    assert len(found) and 0 <= found.labels.min() and found.labels.max() < classes
    assert found.masks.shape == (len(found), 64, 96) and found.masks.dtype == torch.bool
    assert found.bboxes[:, 0::2].max() <= 96 and found.bboxes[:, 1::2].max() <= 64


@needs_detection
@every_config
@pytest.mark.parametrize('crowds', [(), ((0, 0, 30, 30),)], ids=['nothing', 'a crowd'])
def test_images_without_objects(path, crowds):
    model = build(shrink(Config.fromfile(path)))
    data = model.data_preprocessor(batch(boxes=(), crowds=crowds), True)
    loss = total_loss(model(**data, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    assert not without_gradient(model)


@needs_detection
@pytest.mark.parametrize('name', FAMILIES)
def test_training_lowers_the_loss(name):
    cfg = shrink(config(name))
    model = build(cfg)
    data = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(20):
        torch.manual_seed(0)
        loss = total_loss(model(**model.data_preprocessor(data, True), mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-3:]) < 0.75 * sum(history[:3]), history


@needs_detection
@every_config
def test_every_data_set_and_hook_is_known(path):
    """What the model test does not touch resolves to a class."""
    from mmdet.registry import (
        DATASETS,
        HOOKS,
        LOOPS,
        METRICS,
        OPTIM_WRAPPERS,
        PARAM_SCHEDULERS,
        TRANSFORMS,
        VISUALIZERS,
    )
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = Config.fromfile(path)
    assert cfg.default_scope == 'mmdet'
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert DATASETS.get(dataset.type)
        for step in dataset.pipeline:
            assert TRANSFORMS.get(step.type), step
        assert LOOPS.get(cfg[f'{split}_cfg'].type)
    assert METRICS.get(cfg.test_evaluator.type)
    assert VISUALIZERS.get(cfg.visualizer.type)
    assert OPTIM_WRAPPERS.get(cfg.optim_wrapper.type)
    hooks = [*cfg.default_hooks.values(), *(cfg.get('custom_hooks') or [])]
    assert all(HOOKS.get(hook.type) for hook in hooks)
    assert all(PARAM_SCHEDULERS.get(x.type) for x in cfg.param_scheduler)


@needs_detection
@pytest.mark.parametrize('name', FAMILIES)
def test_bfloat16(name):
    """Heads run in bfloat16 on maps that the neck hands over in float32."""
    model = build(shrink(config(name)))
    keep_regions_in_float32(model)
    dtypes = []
    heads = model.roi_head.mask_head
    head = heads[0] if isinstance(heads, torch.nn.ModuleList) else heads
    head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        loss = total_loss(model(**model.data_preprocessor(batch(), True), mode='loss'))
    loss.backward()
    assert loss.isfinite() and dtypes == [torch.bfloat16]
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------- what they are set to
@pytest.mark.parametrize('name', VMAMBA)
def test_published_settings_of_vmamba(name):
    cfg = config(f'mask_rcnn_vmamba_{name}')
    arch, drop_path, dims, epochs, milestones = VMAMBA[name]
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == ('mmvssm.VSSM', arch)
    assert backbone.drop_path_rate == drop_path
    assert backbone.out_indices == (0, 1, 2, 3)
    assert cfg.model.neck.in_channels == [dims, 2 * dims, 4 * dims, 8 * dims]
    assert dict(cfg.optim_wrapper.optimizer) == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys == dict(
        norm=dict(decay_mult=0.0)
    )
    assert 'clip_grad' not in cfg.optim_wrapper
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end, warm_up.by_epoch) == (0.001, 1000, False)
    assert (steps.milestones, steps.gamma, steps.by_epoch) == (milestones, 0.1, True)
    assert cfg.train_cfg.max_epochs == steps.end == epochs
    # 8 GPUs x 2
    images = 1 if name.endswith('_bs8') else 2
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == 8 * images
    assert cfg.test_pipeline[1].scale == (1333, 800)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    if epochs == 12:
        assert steps['Resize'].scale == (1333, 800)
        return
    (whole,), (first, crop, then) = steps['RandomChoice'].transforms
    assert whole == then
    assert whole.scales == [(side, 1333) for side in range(480, 801, 32)]
    assert first.scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop.crop_type, crop.crop_size) == ('absolute_range', (384, 600))


@pytest.mark.parametrize('name', MLLA)
def test_published_settings_of_mlla(name):
    """As VMamba's but for the warm-up, the drop path, and sizes and crops always."""
    cfg = config(f'mask_rcnn_mlla_{name}')
    drop_path, dims, epochs, milestones = MLLA[name]
    assert cfg.model.backbone == dict(
        type='mmvssm.MLLA',
        arch=name[0],
        out_indices=(0, 1, 2, 3),
        drop_path_rate=drop_path,
        init_cfg=dict(type='Pretrained', checkpoint=f'mmvssm://mlla_{name[0]}'),
    )
    assert cfg.model.neck.in_channels == [dims, 2 * dims, 4 * dims, 8 * dims]
    vmamba = config(f'mask_rcnn_vmamba_t_{name[2:]}')
    assert cfg.optim_wrapper == vmamba.optim_wrapper
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.001, 500)
    assert (steps.milestones, steps.end) == (milestones, epochs)
    assert cfg.train_cfg.max_epochs == epochs
    multi_scale = config('mask_rcnn_vmamba_t_3x').train_dataloader
    assert cfg.train_dataloader == multi_scale


@pytest.mark.parametrize(
    'arch,width,rate', [('t', 192, 0.837), ('s', 384, 0.837), ('b', 768, 0.7)]
)
def test_published_settings_of_the_vim_cascade(arch, width, rate):
    cfg = config(f'cascade_mask_rcnn_vim_{arch}_lsj_100ep')
    model = cfg.model
    assert model.backbone == dict(
        type='mmvssm.Vim',
        arch=arch,
        img_size=1024,
        out_indices=(23,),
        drop_path_rate=0.1,
        last_layer_process='add',
        average=False,
        rope=True,
        rope_residual=True,
        init_cfg=dict(type='Pretrained', checkpoint=f'mmvssm://vim_{arch}'),
    )
    assert model.neck == dict(
        type='mmvssm.SimpleFeaturePyramid',
        in_channels=width,
        out_channels=256,
        num_outs=5,
    )
    assert model.data_preprocessor.pad_size_divisor == 1024
    assert model.rpn_head.num_convs == 2
    heads = model.roi_head.bbox_head
    assert [stage.assigner.pos_iou_thr for stage in model.train_cfg.rcnn] == [
        0.5,
        0.6,
        0.7,
    ]
    for head in heads:
        assert head.type == 'Shared4Conv1FCBBoxHead' and head.reg_class_agnostic
        assert head.norm_cfg.type == 'mmvssm.LayerNorm2d'
    assert model.roi_head.mask_head.norm_cfg.type == 'mmvssm.LayerNorm2d'
    wrapper = cfg.optim_wrapper
    assert wrapper.constructor == 'mmvssm.LayerDecayOptimWrapperConstructor'
    assert dict(wrapper.optimizer) == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1
    )
    assert wrapper.paramwise_cfg == dict(layer_decay_rate=rate)
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.001, 250)
    assert (steps.milestones, steps.end) == ([163889, 177546], 184375)
    assert cfg.train_cfg.max_iters == 184375
    assert cfg.auto_scale_lr.base_batch_size == 64
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomResize'].scale == (1024, 1024)
    assert steps['RandomResize'].ratio_range == (0.1, 2.0)
    assert steps['RandomCrop'].crop_size == (1024, 1024)


@needs_detection
@pytest.mark.parametrize('path', PLAIN, ids=lambda path: path.stem)
def test_layer_decay_reaches_every_parameter(path):
    from mmengine.optim import build_optim_wrapper

    cfg = shrink(Config.fromfile(path))
    model = build(cfg)
    cfg.optim_wrapper.type = 'OptimWrapper'
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rate = cfg.optim_wrapper.paramwise_cfg.layer_decay_rate
    scales = {
        name: group['lr'] / 1e-4 for group in groups for name in group['param_names']
    }
    assert set(scales) == {name for name, _ in model.named_parameters()}
    for name, depth in (
        ('backbone.pos_embed', 0),
        ('backbone.layers.0.mixer.A_log', 1),
        ('backbone.layers.1.mixer.out_proj.weight', 2),
        ('neck.levels.0.0.weight', 3),
        ('rpn_head.rpn_cls.weight', 3),
    ):
        assert scales[name] == pytest.approx(rate ** (3 - depth)), name


def test_quickstart_is_the_common_path_made_small():
    small, full = (
        config(name).model
        for name in ('mask_rcnn_vmamba_quickstart', 'mask_rcnn_vmamba_t_1x')
    )
    assert small.type == full.type
    for part in ('backbone', 'neck', 'rpn_head', 'roi_head', 'data_preprocessor'):
        assert small[part].type == full[part].type
    for head in ('bbox_head', 'mask_head'):
        ours, theirs = small.roi_head[head], full.roi_head[head]
        assert {k: v for k, v in ours.items() if 'loss' in k} == {
            k: v for k, v in theirs.items() if 'loss' in k
        }


def test_precision_configs_are_what_the_tools_flag_makes(monkeypatch):
    from mmvssm.engine import enable_amp

    monkeypatch.setattr('mmvssm.engine.configs.config.get_device', lambda: 'cuda')
    for short, dtype in (('bf16', 'bfloat16'), ('fp16', 'float16')):
        cfg = config('mask_rcnn_vmamba_t_1x')
        enable_amp(cfg, dtype)
        written = config(f'mask_rcnn_vmamba_t_1x_{short}')
        assert cfg.to_dict() == written.to_dict()
        # Once is enough.
        enable_amp(written, dtype)
        assert cfg.to_dict() == written.to_dict()


def test_coco_elsewhere(monkeypatch):
    monkeypatch.setenv('COCO_ROOT', '/data/coco')
    cfg = config('mask_rcnn_vmamba_t_1x')
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == '/data/coco'
    assert cfg.val_evaluator.ann_file == (
        '/data/coco/annotations/instances_val2017.json'
    )


@needs_detection
def test_backbone_in_a_config_of_mmdet(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("""
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']
model = dict(
    backbone=dict(
        _delete_=True, type='mmvssm.VSSM', arch='t_s1l8', out_indices=(0, 1, 2, 3)))
""")
    model = build(shrink(Config.fromfile(path)))
    losses = model(**model.data_preprocessor(batch(), True), mode='loss')
    assert total_loss(losses).isfinite()
