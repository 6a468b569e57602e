import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops import deterministic_math


@pytest.mark.parametrize('name', ['softplus', 'sigmoid', 'silu'])
def test_against_float64(name):
    """Relative accuracy over the whole range, small step sizes included."""
    x = torch.linspace(-80, 80, 4001)
    exact = x.double()
    want = {
        'softplus': exact.clamp(min=0) + torch.log1p(torch.exp(-exact.abs())),
        'sigmoid': torch.sigmoid(exact),
        'silu': F.silu(exact),
    }[name]
    got = getattr(deterministic_math, name)(x).double()
    error = (got - want).abs() / want.abs().clamp(min=1e-37)
    assert error.max() < 5e-7


@pytest.mark.parametrize('name', ['softplus', 'sigmoid', 'silu'])
def test_one_kernel_elsewhere(name):
    """What another device than the CPU computes is one call of torch, and as exact."""
    calls = []

    class Elsewhere(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append((function, args[1:], kwargs or {}))
            return function(*args, **(kwargs or {}))

    x = torch.empty(3, device='meta')
    with Elsewhere():
        getattr(deterministic_math, name)(x)
    ((function, others, options),) = calls
    x = torch.linspace(-80, 80, 4001, dtype=torch.float64)
    got = function(x, *others, **options)
    want = getattr(deterministic_math, name)(x)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


def test_far_out():
    x = torch.tensor([-1e5, 1e5])
    assert deterministic_math.softplus(x).tolist() == [0, 1e5]
    assert deterministic_math.sigmoid(x).tolist() == [0, 1]
    assert deterministic_math.silu(x).tolist() == [0, 1e5]


@pytest.mark.parametrize('name', ['softplus', 'sigmoid', 'silu'])
def test_derivatives(name):
    x = [-1e5, -90.0, -3.0, -1e-9, 0.0, 1e-9, 3.0, 90.0, 1e5]
    x = torch.tensor(x, dtype=torch.float64)
    got, want = (
        torch.autograd.functional.jacobian(f, x).diag()
        for f in (getattr(deterministic_math, name), getattr(F, name))
    )
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-30)


@pytest.mark.parametrize('name', ['softplus', 'sigmoid', 'silu'])
def test_derivatives_far_out_in_float32(name):
    """Where exp overflows there is no NaN."""
    x = torch.tensor([-1e4, -200.0, -89.0, 89.0, 200.0, 1e4], requires_grad=True)
    got = torch.autograd.grad(getattr(deterministic_math, name)(x).sum(), x)[0]
    want = torch.autograd.grad(getattr(F, name)(x).sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize('shape', [(3, 50, 2, 4), (2, 50, 1), (2, 50, 1, 1)])
def test_sum_rows(shape):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(deterministic_math.sum_rows(x), x.sum((0, 1)))


@pytest.mark.parametrize('rows, columns, swapped', [(64, 2, True), (2, 64, False)])
def test_product_of_columns_takes_the_smaller_factor_first(rows, columns, swapped):
    a, b = torch.randn(100, rows), torch.randn(100, columns)
    found = deterministic_math.product_of_columns(a, b)
    wanted = a.double().T @ b.double()
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert found.T.is_contiguous() == swapped
