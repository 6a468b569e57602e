"""Step sizes from 1e-6 to above 50 and decay rates to -1e4, against float64."""

import pytest
import torch

from export.runtimes import exported, inlined, run_onnxruntime
from export.test_bodies import (
    bidirectional_scan,
    largest_error,
    softplus,
)
from mmvssm import ops
from ops.bidirectional_inputs import WAYS
from ops.bidirectional_inputs import make_inputs as bidirectional_inputs
from ops.scan_inputs import scan_inputs, ss2d_inputs

CHANNELS = 24
# Softplus of these is 1e-6 to 60. The decay of the largest is 0, that of the smallest
# 1 - 1e-9.
BEFORE_SOFTPLUS = torch.linspace(-13.8, 60, CHANNELS, dtype=torch.float64)
RATES = -torch.logspace(-3, 4, CHANNELS, dtype=torch.float64)


def rates(rows, states):
    """Every rate beside small and large step sizes."""
    columns = [RATES.roll(7 * i) for i in range(states)]
    return torch.stack(columns, dim=1).repeat(rows, 1)


def ss2d(states):
    inputs = ss2d_inputs(2, CHANNELS, 6, 5, 2, states)
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs['dt_projs_bias'] = BEFORE_SOFTPLUS.repeat(4, 1)
    # What depends on the input does not move a small step size far.
    inputs['dt_projs_weight'] /= 10
    # The skip would hide the states.
    return inputs | dict(A=rates(4, states), Ds=torch.zeros(4 * CHANNELS).double())


def bidirectional(states):
    inputs = bidirectional_inputs(2, CHANNELS, 11, 2, states, 4)
    inputs = {name: x.detach() for name, x in inputs.items()}
    for way in WAYS:
        inputs[f'{way}.dt_proj_bias'] = BEFORE_SOFTPLUS
        inputs[f'{way}.dt_proj_weight'] /= 10
        inputs[f'{way}.A'] = rates(1, states)
        inputs[f'{way}.D'] = torch.zeros(CHANNELS).double()
    return inputs


def selective(states):
    inputs = scan_inputs(2, CHANNELS, 13, states, 2, optional=('delta_bias',))
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs['delta'] /= 10
    return inputs | dict(A=rates(1, states), delta_bias=BEFORE_SOFTPLUS)


OPS = {
    'ss2d': (ops.ss2d_scan, ss2d, ['x']),
    'bidirectional': (bidirectional_scan, bidirectional, ['x', 'z']),
    'selective': (softplus, selective, ['u', 'delta', 'B', 'C']),
}


@pytest.mark.parametrize(
    ('name', 'states', 'form'),
    [
        *((name, states, 'plain') for name in OPS for states in (1, 3)),
        ('ss2d', 1, 'unrolled'),
        ('bidirectional', 3, 'unrolled'),
    ],
)
def test_extremes(name, states, form):
    function, make, names = OPS[name]
    # Both sides get the same float32 values.
    weights = {name: x.float().double() for name, x in make(states).items()}
    with ops.use_backend('reference'):
        want = function(**weights)
    inputs = {name: weights.pop(name) for name in names}
    (got,) = run_onnxruntime(inlined(exported(function, inputs, weights, form)), inputs)
    assert largest_error(got, want) < 2e-6
