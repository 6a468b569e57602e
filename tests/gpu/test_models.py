"""Small models of all families on the device, as they are trained."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from mmvssm import build_classifier
from mmvssm.backbones import MLLA, VSSM, MambaR, Vim
from mmvssm.backbones.vssm import ARCH_ZOO
from mmvssm.ops import use_backend

from .on_device import CUDA, DETERMINISTIC, DEVICE, FAST, cuda, on

IMAGE = 96, 64
STAGES = dict(depths=(1, 1, 2, 1), dims=24)
PLAIN = dict(embed_dims=48, depth=3)
MODELS = {
    'VSSM': lambda: VSSM(STAGES, out_indices=(3,)),
    'VSSM v0': lambda: VSSM(dict(ARCH_ZOO['t_v0'], **STAGES), out_indices=(3,)),
    'Vim': lambda: Vim(PLAIN, img_size=IMAGE, out_indices=(2,)),
    'MambaR': lambda: MambaR(PLAIN, img_size=IMAGE, out_indices=(2,)),
    'MLLA': lambda: MLLA(dict(STAGES, num_heads=(1, 2, 4, 8)), out_indices=(3,)),
}
every_model = pytest.mark.parametrize('name', MODELS)


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().to(DEVICE)


def images(batch=2, height=IMAGE[0], width=IMAGE[1]):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator).to(DEVICE)


def step(model, x):
    """Loss and gradients by name."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    loss = 0
    for m in model(x):
        # Random: the mean square of a normalised map is the same for all weights.
        weight = torch.randn(m.shape, generator=generator).to(m.device)
        loss = loss + (m.float() * weight).sum()
    loss.backward()
    module = getattr(model, 'module', model)
    module = getattr(module, '_orig_mod', module)
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    return dict(loss=loss.detach(), **grads)


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys()
    largest = max(x.norm() for name, x in want.items() if name != 'loss')
    for name, x in want.items():
        # What is nothing but rounding beside the others has no digits to compare.
        error = (got[name] - x).norm() / torch.maximum(x.norm(), 1e-4 * largest)
        assert error < tolerance, (name, float(error))


@every_model
@on()
def test_training_step(name, backend):
    """As by the plain form of the scan."""
    model, x = make(name).eval(), images()
    with use_backend('torch'):
        want = step(model, x)
    with use_backend(backend):
        assert_close(step(model, x), want, 1e-3)


@every_model
@on(DETERMINISTIC)
def test_mixed_precision(name, backend):
    model, x = make(name), images()
    kind = torch.device(DEVICE).type
    with use_backend(backend), torch.autocast(kind, torch.bfloat16):
        found = step(model, x)
    for parameter, grad in found.items():
        assert grad.isfinite().all(), parameter


@every_model
@on(DETERMINISTIC)
def test_same_bits_run_after_run(monkeypatch, name, backend):
    # Without the mode torch's own convolutions may differ, not our scans.
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    model, x = make(name).eval(), images()
    with use_backend(backend):
        want = step(model, x)
        for deterministic in (True, False):
            torch.use_deterministic_algorithms(deterministic)
            got = step(model, x)
            for parameter, x_ in want.items():
                assert torch.equal(got[parameter], x_), parameter


@pytest.fixture
def process_group():
    """A group of this process alone."""
    dist.init_process_group(
        'nccl' if CUDA else 'gloo', store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@every_model
@on(DETERMINISTIC)
def test_distributed(process_group, name, backend):
    """Every parameter gets its gradient, with the default flags."""
    model, x = make(name).eval(), images()
    wrapped = DistributedDataParallel(
        copy.deepcopy(model), device_ids=[0] if CUDA else None
    )
    with use_backend(backend):
        want = step(model, x)
        for _ in range(2):
            got = step(wrapped, x)
    for parameter, x_ in want.items():
        assert torch.equal(got[parameter], x_), parameter


@cuda
@on(DETERMINISTIC)
def test_inference_in_a_cuda_graph(backend):
    model = build_classifier('vim_t', num_classes=10).to(DEVICE).eval()
    x = images(1, 224, 224)
    with use_backend(backend), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(x)
        x.mul_(-0.5)
        graph.replay()
        assert torch.equal(logits, model(x))


@on(DETERMINISTIC)
@pytest.mark.parametrize('name', ['VSSM', 'Vim'])
def test_losses_of_a_short_training(name, backend):
    """They fall, and are those of the plain form of the scan."""

    def losses(backend):
        torch.manual_seed(0)
        model = make(name)
        head = torch.nn.LazyLinear(4).to(DEVICE)
        x, labels = images(8), torch.arange(8, device=DEVICE) % 4
        with use_backend(backend):
            head(model(x)[-1].mean((2, 3)))
            parameters = [*model.parameters(), *head.parameters()]
            optimizer = torch.optim.AdamW(parameters, lr=1e-3)
            found = []
            for _ in range(6):
                loss = F.cross_entropy(head(model(x)[-1].mean((2, 3))), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(float(loss.detach()))
        return found

    got, want = losses(backend), losses('torch')
    assert got[-1] < got[0]
    assert got == pytest.approx(want, rel=2e-2)


@pytest.mark.parametrize('name', ['VSSM', 'Vim', 'MLLA'])
@on(FAST)
def test_compiled_in_one_graph(name, backend):
    model, x = make(name).eval(), images()
    with use_backend(backend):
        want = step(model, x)
        compiled = torch.compile(
            model, fullgraph=True, backend='inductor' if CUDA else 'aot_eager'
        )
        assert_close(step(compiled, x), want, 1e-3)
