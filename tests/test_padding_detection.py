"""``mask_padding`` in detectors: mmdet tells the backbone the sizes of its images."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper

import mmvssm
from mmvssm.engine.hooks.float32_regions import keep_regions_in_float32
from mmvssm.registry import MODELS
from tiny import REPO, write_ade, write_config
from tiny_det import batch, build, needs_detection, shrink, total_loss
from toy import free_port

NAMES = ('vmamba_t', 'mlla_t', 'vim_t', 'mambar_s')
every = pytest.mark.parametrize('name', NAMES)
# The first shares its batch with two larger ones.
SIZES = [(64, 96), (96, 160), (80, 60)]


def config(name='vmamba_t', masked=True):
    cfg = shrink(Config.fromfile(REPO / f'configs/mask_rcnn_{name}_1x.py'))
    cfg.model.backbone.drop_path_rate = 0.0
    cfg.model.data_preprocessor.type = 'mmvssm.DetDataPreprocessor'
    cfg.model.backbone.mask_padding = masked
    return cfg


def detector(cfg):
    """With weights behind the backbone that tell positions apart."""
    model = build(cfg)
    for part in (model.neck, model.rpn_head, model.roi_head):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.data.normal_(std=(2 / fan_in) ** 0.5)
            else:
                parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def mixed(sizes=SIZES):
    """A batch of images of these sizes, each with the same objects."""
    torch.manual_seed(5)
    found = dict(inputs=[], data_samples=[])
    for size in sizes:
        for key, value in batch(number=1, size=size).items():
            found[key] += value
    return found


def maps_of(model, step):
    """What the backbone returns in a call."""
    maps = []
    handle = model.backbone.register_forward_hook(
        lambda module, args, outs: maps.append(outs)
    )
    with torch.no_grad():
        result = step()
    handle.remove()
    return result, maps[0]


def difference(alone, padded):
    """The largest of all maps, in deviations of the image's map alone."""
    assert all(x.isfinite().all() for x in (*alone, *padded))
    return max(
        float((a - b[:1, :, : a.shape[2], : a.shape[3]]).abs().max() / a.std())
        for a, b in zip(alone, padded, strict=True)
    )


def agreement(alone, padded):
    """Share of the objects of an image alone that are there when it is padded."""
    from mmdet.structures.bbox import bbox_overlaps

    overlaps = bbox_overlaps(alone.bboxes, padded.bboxes)
    overlaps[alone.labels[:, None] != padded.labels] = 0
    return float((overlaps.max(1).values > 0.9).float().mean())


@needs_detection
@every
def test_prediction(name):
    """Maps agree; boxes do as far as neck and heads see no padding."""
    model, shares = detector(config(name)).eval(), {}
    for masked in (True, False):
        model.backbone.mask_padding = masked
        (alone,), maps = maps_of(model, lambda: model.test_step(mixed(SIZES[:1])))
        found, padded = maps_of(model, lambda: model.test_step(mixed()))
        assert len(found) == len(SIZES)
        changed = difference(maps, padded)
        assert changed < 1e-4 if masked else changed > 1e-2
        shares[masked] = agreement(alone.pred_instances, found[0].pred_instances)
    assert shares[True] > shares[False] + 0.1, shares


@needs_detection
@every
def test_training_step(name):
    model = build(config(name)).train()
    data = model.data_preprocessor(mixed(), True)
    assert data['inputs'].shape[2:] == (96, 160)
    loss = total_loss(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    # DDP's default flags need a gradient for every parameter.
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # And the images are masked: their content beyond the size has no say.
    data['inputs'][0, :, 64:] = 7
    other = model.eval().backbone(data['inputs'])
    data['inputs'][0, :, 64:] = 0
    assert all(map(torch.equal, other, model.backbone(data['inputs'])))


@needs_detection
def test_losses_of_half_precision_and_recomputed_blocks():
    cfg = config()
    cfg.model.backbone.with_cp = True
    model = build(cfg)
    keep_regions_in_float32(model)
    with torch.autocast('cpu', torch.bfloat16):
        data = model.data_preprocessor(mixed(), True)
        loss = total_loss(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite()


@needs_detection
def test_through_ddp():
    """mmengine's wrapper hands the batch on as it is."""
    from mmengine.model import MMDistributedDataParallel
    from torch import distributed

    distributed.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{free_port()}', rank=0, world_size=1
    )
    try:
        model = build(config())
        want = build(config())
        losses = want.train_step(mixed(), optimizer(want))
        got = MMDistributedDataParallel(model)
        torch.testing.assert_close(
            got.train_step(mixed(), optimizer(got))['loss'], losses['loss']
        )
        got.train_step(mixed(), optimizer(got))
    finally:
        distributed.destroy_process_group()


def optimizer(model):
    torch.manual_seed(0)
    return OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))


@needs_detection
def test_without_sizes_it_is_refused():
    cfg = config()
    cfg.model.data_preprocessor.type = 'DetDataPreprocessor'
    with pytest.raises(ValueError, match="type to 'mmvssm.DetDataPreprocessor'"):
        build(cfg).test_step(mixed())


@needs_detection
def test_is_mmdets_preprocessor_in_all_else():
    from mmdet.models import DetDataPreprocessor

    options = dict(config(masked=False).model.data_preprocessor)
    options.pop('type')
    ours = MODELS.build(dict(options, type='DetDataPreprocessor'))
    assert isinstance(ours, DetDataPreprocessor)
    got, want = (x(mixed(), True) for x in (ours, DetDataPreprocessor(**options)))
    assert torch.equal(got['inputs'], want['inputs'])
    for a, b in zip(got['data_samples'], want['data_samples']):
        assert a.metainfo == b.metainfo
    copy.deepcopy(ours)(mixed())


@needs_detection
def test_resized_batches(monkeypatch):
    """Batch augmentations change the sizes of images, and say so."""
    cfg = config()
    cfg.model.data_preprocessor.batch_augments = [
        dict(type='BatchSyncRandomResize', random_size_range=(192, 192))
    ]
    hub = SimpleNamespace(get_info=lambda key: 0)
    monkeypatch.setattr(MessageHub, 'get_current_instance', lambda: hub)
    model = build(cfg)
    model.data_preprocessor.batch_augments[0]._input_size = (192, 320)
    data = model.data_preprocessor(mixed(), True)
    assert data['inputs'].shape[2:] == (192, 320)
    *_, last = model.eval().backbone(data['inputs'])
    assert [s.img_shape for s in data['data_samples']] == [
        (128, 192),
        (192, 320),
        (160, 120),
    ]
    assert last[0, :, 3, 5].any() and not last[0, :, 4:].any()


@needs_detection
def test_images_without_data_samples():
    """The sizes are those of the images before they are padded."""
    model = build(config()).eval()
    data = model.data_preprocessor(dict(mixed(), data_samples=None))
    *_, last = model.backbone(data['inputs'])
    assert last[0, :, 1, 2].any() and not last[0, :, 2:].any()


@needs_detection
@torch.no_grad()
def test_inference_of_mmdet(tmp_path):
    """One array, and a batch of files of several sizes."""
    from mmdet.apis import DetInferencer, inference_detector
    from PIL import Image

    cfg = config()
    cfg.test_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale_factor=1.0),
        dict(
            type='PackDetInputs',
            meta_keys=('img_path', 'ori_shape', 'img_shape', 'scale_factor'),
        ),
    ]
    cfg.test_dataloader.dataset.pipeline = cfg.test_pipeline
    model = detector(cfg).eval()
    model.cfg = copy.deepcopy(cfg)
    rng = np.random.default_rng(0)
    paths = []
    for i, size in enumerate(SIZES[:2]):
        paths.append(str(tmp_path / f'{i}.png'))
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(paths[-1])
    picture = np.asarray(Image.open(paths[0]))[..., ::-1].copy()
    assert len(inference_detector(model, picture).pred_instances)

    cfg.load_from = None
    path = tmp_path / 'tiny.py'
    cfg.dump(path)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'tiny.pth')
    inferencer = DetInferencer(str(path), str(tmp_path / 'tiny.pth'), device='cpu')
    shapes = []
    inferencer.model.backbone.register_forward_hook(
        lambda module, args, outs: shapes.append((args[0].shape[0], outs[-1]))
    )
    inferencer(paths, batch_size=2, no_save_vis=True)
    ((number, last),) = shapes
    assert number == 2 and not last[0, :, 2:].any() and last[0, :, 1, 2].any()


@needs_detection
@torch.no_grad()
def test_test_time_augmentation():
    from mmdet.models import DetTTAModel

    cfg = config()
    cfg.model.roi_head.mask_head = cfg.model.roi_head.mask_roi_extractor = None
    tta = DetTTAModel(
        tta_cfg=ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=20),
        module=detector(cfg).eval(),
    )
    first, second = mixed(), mixed()
    for sample in (*first['data_samples'], *second['data_samples']):
        sample.set_metainfo(dict(flip=False, flip_direction=None))
    data = dict(
        inputs=[first['inputs'], second['inputs']],
        data_samples=[first['data_samples'], second['data_samples']],
    )
    found = tta.test_step(data)
    assert len(found) == len(SIZES) and len(found[0].pred_instances)


# ---------------------------------------------------------- without detection
def test_segmentors_say_what_to_do(tmp_path):
    """Slides are cut out of the batch: no size comes with them."""
    pytest.importorskip('mmseg')
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS as SEGMENTORS
    from mmseg.structures import SegDataSample

    cfg = Config.fromfile(write_config(tmp_path / 'c.py', write_ade(tmp_path / 'ade')))
    cfg.model.backbone.mask_padding = True
    init_default_scope('mmseg')
    model = revert_sync_batchnorm(SEGMENTORS.build(cfg.model)).eval()
    sample = SegDataSample(metainfo=dict(img_shape=(64, 80), ori_shape=(64, 80)))
    data = dict(
        inputs=[torch.zeros(3, 64, 80, dtype=torch.uint8)], data_samples=[sample]
    )
    with pytest.raises(ValueError, match=r'\(mmseg, classifiers\) leave mask_padding'):
        model.test_step(data)


def test_without_mmdet(tmp_path):
    """The file is imported by every look-up of a name; building says what lacks."""
    code = (
        'import sys; sys.modules["mmdet"] = sys.modules["mmdet.models"] = None\n'
        'from mmengine.registry import MODELS\n'
        'MODELS.build(dict(type="mmvssm.VSSM", arch=dict(depths=(1,), dims=8), '
        'out_indices=(0,), mask_padding=True))\n'
        'try:\n'
        '    MODELS.build(dict(type="mmvssm.DetDataPreprocessor"))\n'
        'except ImportError as error:\n'
        '    print(error)\n'
    )
    root = os.path.dirname(os.path.dirname(mmvssm.__file__))
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=root),
        check=True,
    )
    assert 'is for detectors of mmdet, and there is no' in done.stdout
