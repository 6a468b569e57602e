"""Calls that skip torch's dispatcher, and when they must not."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops import add_rms_norm, bypass, linear, selective_scan, ss2d_scan

from . import bidirectional_inputs
from .backends_under_test import FAST_BACKENDS, on_backends
from .scan_inputs import scan_inputs, ss2d_inputs

backends = on_backends(*FAST_BACKENDS)


class Watch(TorchDispatchMode):
    """Remembers the ops that are run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def x():
    return torch.ones(2)


@backends
@pytest.mark.parametrize('op', ['selective_scan', 'ss2d_scan'])
def test_same_bits(op, backend):
    """Without gradients to come nothing is kept for them; else all is the same."""
    if op == 'selective_scan':
        inputs = scan_inputs(2, 20, 100, 3, 2, dtype=torch.float32)
        run = functools.partial(selective_scan, delta_softplus=True)
    else:
        inputs = ss2d_inputs(2, 20, 7, 9, 3, 2, dtype=torch.float32)
        run = ss2d_scan
    want = run(**inputs, backend=backend)
    assert want.requires_grad
    with torch.no_grad():
        got = run(**inputs, backend=backend)
        with Watch() as watch:
            watched = run(**inputs, backend=backend)
    assert torch.equal(got, want) and torch.equal(watched, want)
    assert any('mmvssm' in str(func) for func in watch.seen)


@on_backends('cpu')
@pytest.mark.parametrize('op', ['bidirectional_scan', 'add_rms_norm', 'linear'])
def test_same_bits_around_projections(op, backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 24, generator=generator).requires_grad_()
    weight = torch.randn(24, generator=generator)
    inputs = bidirectional_inputs.make_inputs(2, 20, 70, 3, 2, 4, dtype=torch.float32)
    run = {
        'bidirectional_scan': lambda: bidirectional_inputs.call(
            inputs, backend=backend
        ),
        'add_rms_norm': lambda: add_rms_norm(x, weight, x, backend=backend)[0],
        'linear': lambda: linear(x, weight.expand(5, 24), backend=backend),
    }[op]
    want = run()
    assert want.requires_grad
    with torch.no_grad():
        got = run()
        with Watch() as watch:
            watched = run()
    assert torch.equal(got, want) and torch.equal(watched, want)
    assert any('mmvssm' in str(func) for func in watch.seen)


def test_gradients_need_the_dispatcher(x):
    assert bypass.possible(x, None)
    weight = torch.nn.Parameter(x)
    assert not bypass.possible(x, weight)
    with torch.no_grad():
        assert bypass.possible(x, weight)
    with torch.inference_mode():
        assert bypass.possible(x, weight)


def test_other_kinds_of_tensors(x):
    assert not bypass.possible(x, x.as_subclass(Subclass))
    assert not bypass.possible(x.to('meta'))


@pytest.mark.parametrize(
    'watcher',
    [Watch, forward_ad.dual_level, lambda: profile(activities=[ProfilerActivity.CPU])],
)
def test_watched(x, watcher):
    with watcher():
        assert not bypass.possible(x)
    assert bypass.possible(x)


def test_transformed(x):
    found = []

    def function(x):
        found.append(bypass.possible(x))
        return x * 2

    torch.func.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    torch.jit.trace(function, x, check_trace=False)
    assert found == [False] * 3


def test_compiled(x):
    function = torch.compile(
        lambda x: x + 1 if bypass.possible(x) else x - 1,
        fullgraph=True,
        backend='eager',
    )
    assert torch.equal(function(x), x - 1)
