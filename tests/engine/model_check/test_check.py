"""What is said of a model before it trains, and whether it is right."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

import tiny
import tiny_det
from mmvssm.engine import UsageError, load_config, probe_model
from mmvssm.engine.model_check import check
from mmvssm.engine.model_check.samples import detection_sample, segmentation_sample

pytest.importorskip('mmseg')
ARCH = dict(depths=(1, 1, 1, 1), dims=8)
WIDTHS = [8, 16, 32, 64]


@pytest.fixture(autouse=True)
def warnings_of(monkeypatch):
    """Texts of the warnings that were logged."""
    monkeypatch.delenv(check.VARIABLE, raising=False)
    found = []

    def note(text, logger, level):
        assert level != 10, text  # It could not look.
        found.append(text)

    monkeypatch.setattr(check, 'print_log', note)
    return found


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    tiny.write_ade(root / 'ade', 3, 1)
    return Config.fromfile(tiny.write_config(root / 'tiny.py', root / 'ade'))


@pytest.fixture
def cfg(base):
    """A small UPerNet, of which a process sees two images at a time."""
    return copy.deepcopy(base)


def fcn(index, channels, **options):
    return dict(
        type='mmseg.FCNHead',
        in_channels=channels,
        in_index=index,
        channels=8,
        num_convs=1,
        concat_input=False,
        num_classes=3,
        norm_cfg=dict(type='BN'),
        **options,
    )


def segmentor(cfg, **parts):
    """The config with other parts in its model."""
    model = dict(cfg.model, auxiliary_head=None) | parts
    cfg.model = {key: part for key, part in model.items() if part is not None}
    return cfg


def build(cfg, sync=False):
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    return model if sync else revert_sync_batchnorm(model)


def probe(cfg, model=None):
    probe_model(SimpleNamespace(cfg=cfg, model=model or build(cfg)))


def refusal(cfg, model=None):
    with pytest.raises(UsageError) as caught:
        probe(cfg, model)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def loss_of(model, cfg, images, size=(64, 64)):
    make = segmentation_sample if cfg.default_scope == 'mmseg' else detection_sample
    samples = [make(size) for _ in range(images)]
    torch.manual_seed(0)
    found = model.train()(torch.randn(images, 3, *size), samples, mode='loss')
    return getattr(model, 'module', model).parse_losses(found)[0]


def apply(cfg, text):
    """Set in the config what a message says."""
    settings = text.split(': set ')[1]
    for name, value in re.findall(
        r'model\.([\w.]+)=(.*?)(?=, (?:or )?model\.|\.$)', settings
    ):
        *parents, key = name.split('.')
        node = cfg.model
        for part in parents:
            node = node[int(part)] if part.isdigit() else node[part]
        node[key] = eval(value)
    return cfg


# Batch norms of one value


@pytest.mark.parametrize('accumulated', [1, 4])
def test_one_image_at_a_time(cfg, accumulated):
    cfg.train_dataloader.batch_size = 1
    cfg.optim_wrapper.accumulative_counts = accumulated
    text = refusal(cfg)
    assert 'decode_head.psp_modules.0.1.bn gets one value a channel' in text
    assert 'batch_size=1 gives the model one image' in text
    assert ('accumulated gradients do not change that' in text) == (accumulated > 1)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        loss_of(build(cfg), cfg, 1)
    # Both ways out.
    cfg.train_dataloader.batch_size = 2
    probe(cfg)
    loss_of(build(cfg), cfg, 2).backward()
    cfg.train_dataloader.batch_size = 1
    apply(cfg, text)
    assert cfg.model.decode_head.norm_cfg == dict(type='GN', num_groups=8)
    probe(cfg)
    loss_of(build(cfg), cfg, 1).backward()


def test_last_batch_of_an_epoch(cfg):
    probe(cfg)
    cfg.train_cfg.max_iters = 9
    cfg.train_dataloader.sampler = dict(type='DefaultSampler')
    text = refusal(cfg)
    assert '3 images in batches of 2 leave one image for the last batch' in text
    assert 'train_dataloader.drop_last=True' in text
    cfg.train_dataloader.drop_last = True
    probe(cfg)


def test_data_that_cannot_be_counted_is_left_to_others(cfg):
    cfg.train_dataloader.sampler = dict(type='DefaultSampler')
    cfg.train_dataloader.dataset.data_root = '/nowhere'
    cfg.train_cfg.max_iters = 9
    probe(cfg)


def test_processes_of_one_image(cfg, monkeypatch):
    monkeypatch.setattr(check, 'get_world_size', lambda: 2)
    cfg.train_dataloader.batch_size = 1
    # On GPUs, SyncBN and what becomes SyncBN sees two.
    probe(cfg, build(cfg, sync=True))
    cfg.strategy = dict(sync_bn='torch')
    probe(cfg)
    cfg.pop('strategy')
    text = refusal(cfg)
    assert 'gives each of the 2 processes one image' in text
    assert 'on CPUs SyncBN is BN' in text and 'sync_bn' not in text


def test_processes_of_one_image_on_gpus(cfg, monkeypatch):
    monkeypatch.setattr(check, 'get_world_size', lambda: 2)
    cfg.train_dataloader.batch_size = 1
    monkeypatch.setattr(check, 'get_device', lambda: 'cuda')
    assert "or sync_bn='torch', so that it sees" in refusal(cfg)
    cfg.strategy = dict(type='mmvssm.FSDPStrategy')
    assert "or strategy.sync_bn='torch', so that" in refusal(cfg)


def test_norms_that_do_not_learn(cfg):
    cfg.train_dataloader.batch_size = 1
    model = build(cfg)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.train = lambda mode=True, norm=norm: norm
            norm.training = False
    probe(cfg, model)


def test_group_norms_of_one_channel_a_group(cfg):
    cfg.train_dataloader.batch_size = 1
    cfg.model.decode_head.norm_cfg = dict(type='GN', num_groups=16)
    text = refusal(cfg)
    assert text.startswith('norm decode_head.psp_modules.0.1.gn gets one value')
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        loss_of(build(cfg), cfg, 1)
    probe(apply(cfg, text))
    loss_of(build(cfg), cfg, 1).backward()


def test_norms_of_a_neck_without_a_setting(cfg):
    """Only what fits is advised."""

    @MODELS.register_module(force=True)
    class PooledNeck(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(64)

        def forward(self, maps):
            pooled = self.norm(maps[-1].mean((2, 3), keepdim=True))
            return *maps[:-1], maps[-1] + pooled

    cfg.train_dataloader.batch_size = 1
    segmentor(cfg, neck=dict(type='PooledNeck'))
    text = refusal(cfg)
    assert 'batch norms neck.norm and decode_head.psp_modules.0.1.bn get one' in text
    assert 'neck.norm_cfg' not in text and 'decode_head.norm_cfg' in text


def test_a_foreign_backbone_is_looked_into(cfg):
    """Its norms count, and its maps need no output norm."""
    cfg.train_dataloader.batch_size = 1
    backbone = dict(type='mmseg.BiSeNetV2', norm_cfg=dict(type='BN'))
    segmentor(cfg, backbone=backbone, decode_head=fcn(0, 128))
    assert 'backbone.bga' not in (text := refusal(cfg))
    assert 'backbone.semantic.' in text or 'ceblock' in text.lower()


# Maps that nothing uses


@pytest.fixture
def group():
    """A process group of this process alone."""
    init_process_group('gloo', store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


def concat(index):
    return fcn(index, [WIDTHS[i] for i in index], input_transform='resize_concat')


MAPS = {
    'the last alone': (
        dict(decode_head=fcn(3, 64)),
        '0, 1, 2',
        'outnorm0.weight and 5 more',
        '(3,), model.decode_head.in_index=0',
    ),
    'the last alone, from the end': (
        dict(decode_head=fcn(-1, 64)),
        '0, 1, 2',
        'outnorm0.weight and 5 more',
        '(3,)',
    ),
    'one in the middle': (
        dict(decode_head=fcn(-2, 32), auxiliary_head=fcn(0, 8)),
        '1, 3',
        'layers.2.downsample',
        '(0, 2), model.decode_head.in_index=1',
    ),
    'two of a list of heads': (
        dict(decode_head=concat([2, 3]), auxiliary_head=[fcn(0, 8), fcn(-1, 64)]),
        '1',
        'outnorm1.weight and backbone.outnorm1.bias',
        '(0, 2, 3), model.decode_head.in_index=[1, 2]',
    ),
    'a pyramid from level 1': (
        dict(
            neck=dict(
                type='mmseg.FPN',
                in_channels=WIDTHS,
                start_level=1,
                out_channels=8,
                num_outs=3,
            ),
            decode_head=concat([0, 1, 2]) | dict(in_channels=[8, 8, 8]),
        ),
        '0',
        'outnorm0.weight and backbone.outnorm0.bias',
        '(1, 2, 3), model.neck.in_channels=[16, 32, 64], model.neck.start_level=0',
    ),
}


@pytest.mark.parametrize('name', MAPS)
def test_maps_that_nothing_uses(name, cfg, group, warnings_of):
    parts, unused, lost, wanted = MAPS[name]
    segmentor(cfg, **parts)
    # In one process it works.
    probe(cfg)
    (warning,) = warnings_of
    assert 'DDP refuses in trainings of several processes' in warning
    text = refusal(cfg, DistributedDataParallel(build(cfg)))
    assert text == warning.replace(' in trainings of several processes', '')
    assert f' {unused} of model.backbone.out_indices=(0, 1, 2, 3), so' in text
    assert lost in text
    # It is true: torch refuses the second iteration.
    assert 'did not receive grad' in train(cfg)
    # And what is advised helps.
    assert text.endswith(f': set model.backbone.out_indices={wanted}.')
    apply(cfg, text)
    warnings_of.clear()
    probe(cfg, DistributedDataParallel(build(cfg)))
    assert not warnings_of and train(cfg) == ''


def train(cfg):
    """Two steps under DDP; returns what torch says."""
    model = DistributedDataParallel(build(cfg))
    try:
        for _ in range(2):
            loss_of(model, cfg, 2).backward()
    except RuntimeError as error:
        return str(error).replace('\n', ' ')
    return ''


def test_ddp_that_looks_for_unused_parameters(cfg, group, warnings_of):
    segmentor(cfg, decode_head=fcn(3, 64))
    probe(cfg, DistributedDataParallel(build(cfg), find_unused_parameters=True))
    assert len(warnings_of) == 1


def test_parameters_of_heads_are_named(cfg, group, warnings_of):
    """Whether they get a gradient may depend on the image, so it is a warning."""
    model = build(segmentor(cfg, decode_head=concat([0, 1, 2, 3])))
    model.decode_head.extra = nn.Linear(2, 2)
    probe(cfg, model)
    assert not warnings_of
    probe(cfg, DistributedDataParallel(model))
    assert warnings_of == [
        'decode_head.extra.weight and decode_head.extra.bias: no gradient was found on '
        'the way to the loss. If DDP stops at the second iteration, set '
        'find_unused_parameters=True.'
    ]


@pytest.mark.parametrize(
    'backbone',
    [
        # Without output norms only the last map has parameters of its own.
        dict(out_norm=False),
        # They are not trained.
        dict(frozen_stages=4),
        dict(type='mmseg.ResNet', depth=18, norm_cfg=dict(type='BN'), _delete_=True),
    ],
    ids=str,
)
def test_maps_without_parameters_of_their_own(backbone, cfg, warnings_of):
    head = fcn(3, 64)
    if backbone.pop('_delete_', False):
        head = fcn(3, 512)
        cfg.model.backbone = {}
    cfg.model.backbone.update(backbone)
    model = build(segmentor(cfg, decode_head=head))
    if 'frozen_stages' in backbone:
        model.backbone.requires_grad_(False)
    probe(cfg, model)
    assert not warnings_of


def test_blocks_behind_the_maps_in_use(cfg, warnings_of):
    arch = dict(embed_dims=16, depth=4)
    backbone = dict(type='mmvssm.Vim', arch=arch, out_indices=(0, 1, 3))
    segmentor(cfg, backbone=backbone, decode_head=fcn(1, 16))
    probe(cfg)
    (text,) = warnings_of
    assert 'backbone.layers.2.norm.weight and' in text
    assert text.endswith(
        ': set model.backbone.out_indices=(1,), model.decode_head.in_index=0.'
    )
    warnings_of.clear()
    probe(apply(cfg, text))
    assert not warnings_of


def test_what_to_set_beside_is_left_open_where_it_is_not_known(cfg, warnings_of):
    @MODELS.register_module(force=True)
    class ThirdMap(nn.Module):
        def forward(self, maps):
            return maps[2:3]

    segmentor(cfg, neck=dict(type='ThirdMap'), decode_head=fcn(0, 32))
    probe(cfg)
    (text,) = warnings_of
    assert text.endswith(
        'set model.backbone.out_indices=(2,), and in_channels, in_index or start_level '
        'of what takes the maps to match.'
    )


# Detectors


def retinanet(norm=None, **neck):
    return dict(
        type='mmdet.RetinaNet',
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor'),
        backbone=dict(type='mmvssm.VSSM', arch=ARCH),
        neck=[
            dict(
                type='mmdet.FPN',
                in_channels=WIDTHS,
                start_level=1,
                add_extra_convs='on_input',
                out_channels=8,
                num_outs=5,
            )
            | neck
        ],
        bbox_head=dict(
            type='mmdet.RetinaSepBNHead' if norm else 'mmdet.RetinaHead',
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            **(dict(norm_cfg=norm, num_ins=5) if norm else {}),
            anchor_generator=dict(
                type='mmdet.AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[8, 16, 32, 64, 128],
            ),
            bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder'),
        ),
        train_cfg=dict(
            assigner=dict(
                type='mmdet.MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.4,
                min_pos_iou=0,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type='mmdet.PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
        ),
    )


def detector(size=256, **parts):
    resize = dict(type='Resize', scale=(size, size), keep_ratio=False)
    loader = dict(batch_size=2, dataset=dict(pipeline=[resize]))
    return Config(
        dict(
            default_scope='mmdet',
            model=retinanet(**parts),
            train_dataloader=loader,
            train_cfg=dict(max_epochs=1),
        )
    )


@tiny_det.needs_detection
def test_retinanet_without_the_first_level(group, warnings_of):
    cfg = detector()
    probe(cfg)
    text = refusal(cfg, DistributedDataParallel(build(cfg)))
    assert text.startswith('no loss depends on map 0 of model.backbone.out_indices=')
    assert text.endswith(
        'set model.backbone.out_indices=(1, 2, 3), model.neck.0.in_channels='
        '[16, 32, 64], model.neck.0.start_level=0.'
    )
    assert 'did not receive grad' in train(cfg)
    warnings_of.clear()
    apply(cfg, text)
    probe(cfg, DistributedDataParallel(build(cfg)))
    assert not warnings_of and train(cfg) == ''


@tiny_det.needs_detection
def test_a_map_is_one_place_in_small_images_alone():
    """Level 7 of a pyramid has a stride of 128."""
    parts = dict(norm=dict(type='BN'), start_level=0, num_outs=5)
    parts |= dict(in_channels=WIDTHS[1:])
    for size, fails in ((256, False), (64, True)):
        cfg = detector(size, **parts)
        cfg.model.backbone.out_indices = (1, 2, 3)
        cfg.train_dataloader.batch_size = 1
        if fails:
            text = refusal(cfg)
            assert 'bbox_head.cls_convs.3.0.bn and 3 more' in text
            with pytest.raises(ValueError, match='more than 1 value per channel'):
                loss_of(build(cfg), cfg, 1, (size, size))
        else:
            probe(cfg)
            loss_of(build(cfg), cfg, 1, (size, size))


def test_a_model_of_another_kind_is_let_pass(cfg, monkeypatch):
    logged = []
    monkeypatch.setattr(check, 'print_log', lambda *args: logged.append(args))
    probe(cfg, nn.Linear(2, 2))
    (text, _, level), *others = logged
    assert 'not looked into: AttributeError' in text and level == 10 and not others


def test_it_can_be_switched_off(cfg, monkeypatch):
    cfg.train_dataloader.batch_size = 1
    monkeypatch.setenv(check.VARIABLE, '0')
    probe(cfg)


# All that is published here


@pytest.mark.parametrize(
    'path', sorted((tiny.REPO / 'configs').glob('upernet_*.py'))[::4]
)
def test_our_segmentors(path, warnings_of, monkeypatch):
    one_of_ours(tiny.shrink(load_config(str(path))), warnings_of, monkeypatch)


@tiny_det.needs_detection
@pytest.mark.parametrize('path', tiny_det.DETECTORS[::5])
def test_our_detectors(path, warnings_of, monkeypatch):
    cfg = tiny_det.shrink(load_config(str(path)))
    cfg.train_dataloader.batch_size = 1
    one_of_ours(cfg, warnings_of, monkeypatch)


def one_of_ours(cfg, warnings_of, monkeypatch):
    monkeypatch.setattr(check, '_refuses_unused', lambda model: True)
    probe(cfg)
    assert not warnings_of
