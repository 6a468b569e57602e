"""What a config's training asks of the ops: image sizes, calls, kernels, the check."""

import logging
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope

from mmvssm import engine
from mmvssm.backbones.vssm import ARCH_ZOO
from mmvssm.engine.configs.image_sizes import Batch, inference_batches, training_batches
from mmvssm.engine.launching import gpu_check
from mmvssm.engine.launching.gpu_check import autocast_dtype, calls_of, check_model
from mmvssm.ops import Result, backends
from mmvssm.ops.cuda import kernels
from mmvssm.ops.gpu_check import choice, run, stand_in
from mmvssm.ops.gpu_check.launches import launches_of
from mmvssm.ops.gpu_check.verdicts import Verdict
from mmvssm.ops.operator import all_ops
from tiny import REPO, shrink
from tiny_det import needs_detection

pytest.importorskip('mmseg')

CPU = torch.device('cpu')
CONFIGS = REPO / 'configs'


def config(name):
    return Config.fromfile(CONFIGS / name)


def build(cfg):
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.pop('init_cfg', None)
    return MODELS.build(cfg.model.backbone)


def through_pipeline(cfg, transforms, rng):
    """Height and width of a random image behind the real transforms."""
    init_default_scope(cfg.default_scope)
    height, width = (int(side) for side in rng.integers(240, 1100, 2))
    results = dict(
        img=np.zeros((height, width, 3), np.uint8),
        img_shape=(height, width),
        ori_shape=(height, width),
        seg_fields=[],
    )
    if cfg.default_scope == 'mmseg':
        labels = rng.integers(0, 9, (height, width), np.uint8)
        results.update(gt_seg_map=labels, seg_fields=['gt_seg_map'])
    for transform in transforms:
        kind = transform['type']
        if kind.startswith(('Load', 'Pack', 'Filter')) or kind == 'TestTimeAug':
            continue
        results = TRANSFORMS.build(transform)(results)
    return results['img'].shape[:2]


@pytest.fixture
def rng():
    """The transforms draw from NumPy's own."""
    np.random.seed(0)
    return np.random.default_rng(0)


# Sizes of images


@pytest.mark.parametrize(
    'name,training,number_of_tests',
    [
        ('upernet_vmamba_t.py', (2, 512, 512), None),
        ('upernet_vim_t.py', (8, 512, 512), 1),
        ('upernet_vmamba_quickstart.py', (4, 128, 128), None),
        pytest.param(
            'cascade_mask_rcnn_vim_t_lsj_100ep.py',
            (4, 1024, 1024),
            1,
            marks=needs_detection,
        ),
        pytest.param(
            'mask_rcnn_vmamba_t_1x.py', (2, 1344, 1344), None, marks=needs_detection
        ),
    ],
)
def test_sizes_of_the_configs(name, training, number_of_tests):
    cfg = config(name)
    assert training_batches(cfg)[0] == Batch(*training)
    found = inference_batches(cfg)
    assert len(found) == (number_of_tests or len(found)) > 0


def test_sizes_of_a_pipeline_written_for_this():
    def sizes(*transforms, model=None, number=1):
        loader = dict(batch_size=number, dataset=dict(pipeline=list(transforms)))
        cfg = Config(dict(train_dataloader=loader, model=model or {}))
        return training_batches(cfg)

    resize = dict(type='Resize', scale=(320, 240))
    assert sizes(resize) == [Batch(1, 240, 320)]
    assert sizes(resize, number=3) == [Batch(3, 240, 320), Batch(1, 240, 320)]
    assert sizes(resize, dict(type='mmseg.RandomCrop', crop_size=(100, 999))) == [
        Batch(1, 100, 320)
    ]
    assert sizes(resize, dict(type='Pad', size_divisor=64)) == [Batch(1, 256, 320)]
    assert sizes(resize, model=dict(data_preprocessor=dict(size=(256, 512)))) == [
        Batch(1, 256, 512)
    ]
    both = dict(type='RandomChoice', transforms=[[resize], [dict(resize, scale=64)]])
    assert sizes(both) == [Batch(1, 240, 320), Batch(1, 64, 64)]
    choice = dict(type='RandomChoiceResize', scales=[(64, 32), 96], keep_ratio=False)
    assert sizes(choice) == [Batch(1, 96, 96), Batch(1, 32, 64)]
    # A batch is as high as its highest image and as wide as its widest.
    turned = dict(choice, scales=[(64, 32), (32, 64)])
    assert Batch(2, 64, 64) in sizes(turned, number=2)
    random = dict(type='RandomResize', scale=(64, 64), ratio_range=(0.5, 2))
    found = sizes(random, dict(type='Unknown'))
    assert max(max(b[1:]) for b in found) == 128 and min(b[1] for b in found) < 32
    inner = dict(dataset=dict(pipeline=[resize]), pipeline=[dict(type='Pad', size=400)])
    cfg = Config(dict(train_dataloader=dict(dataset=inner), model={}))
    assert training_batches(cfg) == [Batch(1, 400, 400)]


@pytest.mark.parametrize(
    'name',
    [
        'upernet_vmamba_t.py',
        pytest.param('mask_rcnn_vmamba_t_1x.py', marks=needs_detection),
        pytest.param('mask_rcnn_vmamba_t_3x.py', marks=needs_detection),
    ],
)
@pytest.mark.parametrize('mode', ['train', 'test'])
def test_sizes_lie_between_those_that_are_tried(rng, name, mode):
    cfg = config(name)
    padded = cfg.model.data_preprocessor.get('size') if mode == 'train' else None
    batches = training_batches(cfg) if mode == 'train' else inference_batches(cfg)
    for _ in range(8):
        size = through_pipeline(cfg, cfg[f'{mode}_pipeline'], rng)
        for axis, side in enumerate(np.maximum(size, padded or 0), start=1):
            sides = [batch[axis] for batch in batches]
            # They are padded to a multiple of 32.
            assert min(sides) - 31 <= side <= max(sides)


# Calls


@pytest.mark.parametrize(
    'wrapper,dtype',
    [
        (dict(type='OptimWrapper'), None),
        (dict(type='AmpOptimWrapper'), torch.float16),
        (dict(type='AmpOptimWrapper', dtype='bfloat16'), torch.bfloat16),
        (dict(type='mmvssm.Bf16OptimWrapper'), torch.bfloat16),
    ],
)
def test_dtype_of_a_training(wrapper, dtype):
    assert autocast_dtype(Config(dict(optim_wrapper=wrapper))) == dtype


@pytest.mark.parametrize(
    'name,op,blocks',
    [
        ('upernet_vmamba_t.py', 'ss2d_scan', 4),
        ('upernet_vim_t.py', 'bidirectional_scan', 4),
        ('upernet_mambar_s.py', 'bidirectional_scan', 4),
        ('upernet_mlla_t.py', 'linear_attention', 4),
    ],
)
def test_calls_of_a_model_that_stays_as_it_is(name, op, blocks):
    cfg = shrink(config(name))
    backbone = build(cfg)
    x = torch.randn(1, 3, 64, 96)
    before = [y.detach() for y in backbone.eval()(x)]
    backbone.train()
    state, random = dict(backbone.state_dict()), torch.get_rng_state()
    model = SimpleNamespace(backbone=backbone)
    batches = [Batch(2, 64, 96), Batch(1, 96, 96)]
    calls = calls_of(model, batches, CPU, torch.bfloat16)
    assert sum(call.count for call in calls if call.op == op) == 2 * blocks
    found = [call for call in calls if call.op == op]
    assert {call.batch() for call in found} == {1, 2}
    assert 'bfloat16' in {call.main_dtype() for call in found}
    exact = calls_of(backbone, batches, CPU)
    assert {call.main_dtype() for call in exact if call.op == op} == {'float32'}
    assert torch.equal(random, torch.get_rng_state())
    assert backbone.state_dict().keys() == state.keys() and backbone.training
    # What it keeps for a size has values.
    for size in ((64, 96), (96, 96)):
        backbone.eval()(torch.randn(1, 3, *size))
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), before))


# Kernels


class Toy(stand_in.StandIn):
    """Kernels that are compiled for kinds of lengths, but not for lengths."""

    def _launch(self, x, **constants):
        batch, *_, height, width = x.shape
        length = height * width
        constants |= dict(LONG=batch * length > 4000, ODD=length % 2, RANK=x.shape[1])
        kernels.Kernel('toy.cu', 'toy').launch(
            constants, None, grid=1, threads=32, on=x
        )

    def forward(self, inputs, options, keep):
        self._launch(inputs.x, KEEP=keep)
        return Result(all_ops['ss2d_scan'].outputs_like(inputs, options))

    def saved_like(self, inputs, options):
        return ()

    def backward(self, inputs, options, saved, grads, wanted):
        self._launch(inputs.x, BACKWARD=1)
        return inputs


def kernels_of(training, inference=()):
    return {launch.binary for launch in launches_of(training, inference)}


@pytest.fixture(params=['toy', 'ours'])
def ss2d_kernels(request, monkeypatch):
    if request.param == 'toy':
        found = all_ops['ss2d_scan'].backends
        toy = Toy(found['reference'], backends.CUDA, None)
        monkeypatch.setitem(found, 'cuda', toy)


@needs_detection
def test_what_is_compiled_is_all_that_is_launched(ss2d_kernels, rng):
    """At 50 random sizes of a training at many sizes; and it is not much."""
    cfg = config('mask_rcnn_vmamba_t_3x.py')
    # More blocks launch the same again.
    arch = dict(ARCH_ZOO[cfg.model.backbone.arch], depths=(1, 1, 1, 1))
    cfg.model.backbone.arch = arch
    backbone = build(cfg)
    training = calls_of(backbone, training_batches(cfg), CPU)
    inference = calls_of(backbone, inference_batches(cfg), CPU)
    compiled = kernels_of(training, inference)
    assert 0 < len(compiled) <= 24
    number = cfg.train_dataloader.batch_size
    launched = set()
    for i in range(50):
        mode = 'train' if i % 5 else 'test'
        sizes = [
            through_pipeline(cfg, cfg[f'{mode}_pipeline'], rng)
            for _ in range(number if mode == 'train' else 1)
        ]
        sides = [-(-max(side) // 32) * 32 for side in zip(*sizes)]
        calls = calls_of(backbone, [Batch(len(sizes), *sides)], CPU)
        launched |= kernels_of(*((calls,) if mode == 'train' else ((), calls)))
    assert launched <= compiled


# The check


@pytest.fixture
def quick_check(monkeypatch, tmp_path):
    """The check of kernels that stand in on the CPU, as if all passed."""
    monkeypatch.setenv('MMVSSM_CACHE_DIR', str(tmp_path))
    suppliers = dict(backends.suppliers)
    supplied = {op: dict(op.backends) for op in all_ops.values()}
    stand_in.install()
    choice.forget()
    runs = []

    def check(cases, backend, device, *, kernels_of, limits):
        runs.append((cases, kernels_of))
        times = dict(cuda=1.0, torch=2.0)
        return {
            case.call.op: Verdict(cases=len(cases), milliseconds=times)
            for case in cases
        }

    monkeypatch.setattr(run, 'check', check)
    yield runs
    choice.forget()
    backends.suppliers.update(suppliers)
    for op, found in supplied.items():
        op.backends.update(found)


def small_model():
    cfg = shrink(config('upernet_vmamba_t.py'))
    return SimpleNamespace(backbone=build(cfg)), cfg


def test_a_model_is_checked_once(quick_check, caplog, monkeypatch):
    monkeypatch.setattr(gpu_check, 'unwrap', lambda model: model)
    model, cfg = small_model()
    caplog.set_level(logging.WARNING)
    line = check_model(model, cfg, CPU)
    assert line.startswith('ss2d_scan by cuda (cuda: chosen: checked on this machine')
    assert 'calls are right, 2.0 times as fast as torch' in line
    ((cases, (training, inference)),) = quick_check
    # Of each of four maps, with one more row.
    assert len(cases) == 8 and {case.call.batch() for case in cases} == {2}
    assert {call.batch() for call in training} == {1, 2} and inference
    # The model's calls are served by them from now on, and other processes read it.
    assert backends.choose_backend('cpu', torch.float32, op='ss2d_scan') == 'cuda'
    choice.forget()
    assert check_model(model, cfg, CPU) == line and len(quick_check) == 1
    # Other sizes are another matter.
    cfg.val_dataloader.dataset.pipeline = [dict(type='Resize', scale=(96, 96))]
    check_model(model, cfg, CPU)
    assert len(quick_check) == 2
    cfg.train_dataloader.batch_size = 3
    check_model(model, cfg, CPU)
    assert len(quick_check) == 3


def test_a_model_without_our_ops(quick_check, monkeypatch):
    monkeypatch.setattr(gpu_check, 'unwrap', lambda model: model)
    cfg = shrink(config('upernet_vmamba_t.py'))
    plain = SimpleNamespace(backbone=torch.nn.Conv2d(3, 4, 1))
    assert check_model(plain, cfg, CPU) == 'the model asks for none'


def test_train_checks_before_it_loads_data(monkeypatch):
    """And when the model is there."""
    order = []
    runner = SimpleNamespace(train=lambda: order.append('train'))

    def build_runner(cfg):
        order.append('build')
        return runner

    monkeypatch.setattr(engine, 'build_runner', build_runner)
    monkeypatch.setattr(engine, 'check_inputs', lambda cfg, weights: None)
    monkeypatch.setattr(engine, 'check_labels', lambda cfg: order.append('labels'))
    monkeypatch.setattr(engine, 'check_gpu', lambda found: order.append(found))
    path = str(CONFIGS / 'upernet_vmamba_t.py')
    monkeypatch.setattr(sys, 'argv', ['train.py', path])
    train = runpy.run_path(str(REPO / 'tools' / 'train.py'))
    train['main'](train['parse_args']())
    assert order == ['build', 'labels', runner, 'train']


@pytest.mark.parametrize(
    'gpu,variables,asked',
    [
        (True, {}, True),
        (False, {}, False),
        (True, dict(MMVSSM_GPU_CHECK='0'), False),
        (True, dict(MMVSSM_GPU_CHECK='trust'), False),
        (True, dict(MMVSSM_SCAN_BACKEND='torch'), False),
    ],
)
def test_when_a_training_is_checked(quick_check, monkeypatch, gpu, variables, asked):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    devices, lines = [], []

    def check(model, cfg, device):
        devices.append(device)
        return 'all is well'

    monkeypatch.setattr(gpu_check, 'check_model', check)
    logger = SimpleNamespace(info=lambda text, *args: lines.append(text % args))
    gpu_check.check_gpu(SimpleNamespace(model=None, cfg=None, logger=logger))
    assert devices == [torch.device('cuda', 1)] * asked
    assert lines == ['GPU kernels: all is well'] * asked
