"""The example of CONTRIBUTING.md runs."""

import torch

from compare import relative_error
from contributing import run_example
from mmvssm import ops


def test_example_of_a_backend():
    found = run_example('Adding a backend')
    try:
        assert relative_error(found['y'], found['x'] @ found['weight'].t()) < 1e-6
        x = found['x'].double().requires_grad_()
        weight, bias = torch.randn(3, 8).double().requires_grad_(), torch.randn(3)
        y = ops.linear(x, weight, bias.double().requires_grad_(), backend='doubled')
        got = torch.autograd.grad(y.square().sum(), (x, weight))
        y = x @ weight.t() + bias.double()
        for g, w in zip(got, torch.autograd.grad(y.square().sum(), (x, weight))):
            assert relative_error(g, w) < 1e-12
        assert 'doubled' in ops.list_backends()
    finally:
        found['registration'].remove()
    assert 'doubled' not in ops.list_backends()
