"""The device of these tests, its backends, and the ops they run on them."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from mmvssm import ops
from mmvssm.layers import rotary_tables
from mmvssm.ops import backend_status, backends, list_backends
from ops.bidirectional_inputs import call as call_bidirectional
from ops.bidirectional_inputs import make_inputs
from ops.scan_inputs import scan_inputs, ss2d_inputs

DEVICE = os.environ.get('MMVSSM_GPU_TESTS_DEVICE', 'cuda')
CUDA = torch.device(DEVICE).type == 'cuda'
cuda = pytest.mark.cuda


def _serves(name: str) -> bool:
    devices = backends.suppliers[name].devices
    devices = devices() if callable(devices) else devices
    return name != 'reference' and (
        devices is None or torch.device(DEVICE).type in devices
    )


BACKENDS = [name for name in list_backends() if _serves(name)]
# The same inputs give the same bits.
DETERMINISTIC = [name for name in BACKENDS if backends.suppliers[name].deterministic]
# Those that are made for the device.
FAST = [name for name in DETERMINISTIC if name != 'torch']


def on(names=tuple(BACKENDS)):
    """Run a test on each of these backends; those that cannot run are skipped."""
    return pytest.mark.parametrize('backend', [_on(name) for name in names])


def _on(name: str):
    # Without a GPU all is skipped anyway, for that reason.
    reason = None
    if not CUDA or torch.cuda.is_available():
        reason = backend_status().get(name, 'this version does not have it')
    marks = [pytest.mark.skip(reason=f'{name}: {reason}')] if reason else []
    return pytest.param(name, marks=marks)


def moved(inputs: dict[str, torch.Tensor], dtype=None) -> dict[str, torch.Tensor]:
    """The inputs as leaves on the device, with their strides."""
    return {
        name: x.detach().to(DEVICE, dtype).requires_grad_()
        for name, x in inputs.items()
    }


@dataclass(frozen=True)
class Op:
    """An op under test: tensors by name -> outputs."""

    call: Callable[..., tuple[torch.Tensor, ...]]
    inputs: Callable[[], dict[str, torch.Tensor]]


def _scan(inputs, backend):
    out, last = ops.selective_scan(
        **inputs, delta_softplus=True, return_last_state=True, backend=backend
    )
    return (out,) if backend == 'mamba_ssm' else (out, last)


def _ss2d(inputs, backend):
    return (ops.ss2d_scan(**inputs, backend=backend),)


def _two_ways(inputs, backend):
    return (call_bidirectional(inputs, average=True, backend=backend),)


def _add_norm(inputs, backend):
    return ops.add_rms_norm(**inputs, residual_in_fp32=True, backend=backend)


def _norm_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(2, 197, 192), weight=(192,), residual=(2, 197, 192))
    return {k: torch.randn(s, generator=generator).double() for k, s in shapes.items()}


def _attention(inputs, backend):
    q = inputs['q']
    rotary = rotary_tables(13, 27, q.shape[2], like=q).unbind()
    heads = q.shape[2] // 32
    return (
        ops.linear_attention(**inputs, heads=heads, rotary=rotary, backend=backend),
    )


def _attention_inputs():
    generator = torch.Generator().manual_seed(0)
    shape = (2, 13 * 27, 96)
    return {k: torch.randn(shape, generator=generator).double() for k in 'qkv'}


# Of the sizes that models have, and none a multiple of anything.
OPS = {
    'selective_scan': Op(
        _scan, lambda: scan_inputs(2, 96, 197, 16, channels_last=True)
    ),
    'selective_scan of one state': Op(
        _scan, lambda: scan_inputs(2, 92, 1601, 1, 4, optional=('D', 'delta_bias'))
    ),
    'ss2d_scan': Op(
        _ss2d, lambda: ss2d_inputs(2, 48, 13, 11, 3, 1, channels_last=True)
    ),
    'ss2d_scan of high rank': Op(
        _ss2d, lambda: ss2d_inputs(1, 96, 7, 7, 24, 1, channels_last=True)
    ),
    'bidirectional_scan': Op(_two_ways, lambda: make_inputs(2, 96, 197, 6, 16, 4)),
    'add_rms_norm': Op(_add_norm, _norm_inputs),
    'linear_attention': Op(_attention, _attention_inputs),
}
every_op = pytest.mark.parametrize('op', OPS.values(), ids=OPS.keys())
