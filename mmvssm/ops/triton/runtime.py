"""Whether Triton can run here, and on which tensors.

Environment variables, read when this module is imported:
    TRITON_INTERPRET: 1 runs the kernels in Triton's interpreter, on tensors of
        any device and without a GPU: to check them, very slowly.
"""

import contextlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor

INTERPRETED = os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'on')
_INSTALLED = find_spec('triton') is not None


def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    if not _INSTALLED:
        return 'Triton is not installed (pip install triton)'
    if INTERPRETED or torch.cuda.is_available():
        return None
    return (
        'torch sees no CUDA device (TRITON_INTERPRET=1, set before the start, '
        'runs the kernels in the interpreter on any tensors, very slowly)'
    )


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which kernels are launched on the device of a tensor."""
    if x.device.type == 'cpu':
        return contextlib.nullcontext()
    device = torch.get_device_module(x.device).device
    context: contextlib.AbstractContextManager[object] = device(x.device)
    return context
