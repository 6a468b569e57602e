import sys

import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import linear
from mmvssm.ops.deterministic_math import linear_product

from .backends_under_test import BACKENDS, on_backends
from .scan_inputs import as_double, gradients, relative_error

backends = on_backends(*BACKENDS)


def make_inputs(*shape, outputs=24, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(outputs, shape[-1], generator=generator)
    inputs = dict(x=x, weight=weight)
    if bias:
        inputs['bias'] = torch.randn(outputs, generator=generator)
    return {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}


@backends
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(2, 5, 24), (7, 1), (9,), (3, 0, 4), (1, 1, 1, 17)])
def test_matches_torch(backend, shape, bias):
    inputs = make_inputs(*shape, bias=bias)
    double = as_double(inputs)
    got, want = linear(**inputs, backend=backend), F.linear(*double.values())
    assert got.shape == want.shape and got.dtype == torch.float32
    results = dict(y=got, **gradients((got,), inputs))
    for name, truth in dict(y=want, **gradients((want,), double)).items():
        assert relative_error(results[name], truth) < 2e-6 or not truth.any(), name


@pytest.mark.parametrize(
    'view',
    [
        lambda x: x[..., :5],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[::2],
        lambda x: x[:1].expand(4, -1, -1),
    ],
)
def test_any_strides(view):
    x = view(make_inputs(4, 7, 24)['x'].detach())
    weight = torch.randn(x.shape[-1], 30).t()
    got, want = linear_product(x, weight), x.double() @ weight.double().t()
    assert relative_error(got, want) < 2e-6
    assert relative_error(linear(x, weight), want) < 2e-6


@on_backends('cpu')
def test_only_gradients_that_are_needed(backend):
    for name in ('x', 'weight', 'bias'):
        inputs = make_inputs(3, 4)
        inputs[name].requires_grad_(False)
        linear(**inputs, backend=backend).sum().backward()
        assert inputs[name].grad is None
        assert all(t.grad is not None for key, t in inputs.items() if key != name)


@backends
def test_dtypes(backend):
    half = make_inputs(3, 4, dtype=torch.bfloat16)
    assert linear(**half, backend=backend).dtype == torch.bfloat16
    full = make_inputs(3, 4)
    with torch.autocast('cpu', torch.bfloat16):
        assert linear(**full, backend=backend).dtype == torch.bfloat16


@backends
def test_compile_fullgraph(backend):
    inputs = make_inputs(2, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend='aot_eager')
    got, want = (f(**inputs, backend=backend) for f in (compiled, linear))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients((got,), inputs), gradients((want,), inputs))


def test_without_onednn(monkeypatch):
    inputs = [t.detach() for t in make_inputs(2, 5, 8).values()]
    module = sys.modules[linear_product.__module__]
    monkeypatch.setattr(module, '_has_onednn', lambda: False)
    assert torch.equal(linear_product(*inputs), F.linear(*inputs))


@pytest.mark.parametrize('backend', [None, 'cpu', 'torch', 'reference'])
@pytest.mark.parametrize(
    ('shapes', 'dtype', 'message'),
    [
        (((2, 4), (3, 5), None), torch.float32, r'\(2, 4\) and \(3, 5\)'),
        (((2, 4), (4,), None), torch.float32, r'weight \(N, K\)'),
        (((), (3, 4), None), torch.float32, r'linear: x must be'),
        (((2, 4), (3, 4), (2,)), torch.float32, r'bias must be \(3,\)'),
        (((2, 4), (3, 4), (1, 3)), torch.float32, r'bias must be \(3,\)'),
        (((2, 4), (3, 4), None), torch.float64, 'dtype of x'),
    ],
)
def test_what_does_not_fit_is_refused(shapes, dtype, message, backend):
    x, weight, bias = (None if s is None else torch.randn(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        linear(x, weight.to(dtype), bias, backend=backend)
