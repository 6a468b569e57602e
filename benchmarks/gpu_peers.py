"""What our scan on the GPU is compared with, where the user has installed it.

A peer takes the tensors of :func:`mmvssm.ops.selective_scan` without a gate,
with grouped B and C (B, G, N, L), and applies the softplus.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import scan_cpu_peers
import torch
from gpu_device import Device
from torch import Tensor

from mmvssm.analysis.measuring.timing import reason
from mmvssm.ops import backend_status, choose_backend, mamba_ssm, selective_scan

# Backends of ours that are made for a GPU, and what stands for them on a CPU.
OURS = {True: ('cuda',), False: ('cpu', 'torch')}


@dataclass(frozen=True)
class Scan:
    """A scan, and whether its tensors are to be channels-last in memory.

    Attributes:
        work_arrays: Float32 arrays (B, D, L, N) that its forward pass makes.
    """

    function: Callable[..., Tensor]
    channels_last: bool
    work_arrays: int = 0


def our_scan(*inputs: Tensor, backend: str) -> Tensor:
    """:func:`mmvssm.ops.selective_scan` with the arguments of the peers."""
    u, delta, A, B, C, D, bias = inputs
    return selective_scan(u, delta, A, B, C, D, None, bias, True, backend=backend)


def our_backends(device: Device) -> tuple[list[str], dict[str, str]]:
    """Backends of ours that can run, and why others cannot."""
    names, missing = [], {}
    for name in OURS[device.is_cuda]:
        # One that this version does not have is no loss to report.
        if name in backend_status():
            why = backend_status()[name]
            missing |= {name: why} if why else {}
            names += [] if why else [name]
    kind = torch.device(device.name).type
    return names or [choose_backend(kind, torch.float32)], missing


def scans(device: Device) -> tuple[dict[str, Scan], dict[str, str]]:
    """All that can run here by name, and why the others are left out."""
    names, missing = our_backends(device)
    found = {
        name: Scan(functools.partial(our_scan, backend=name), True) for name in names
    }
    for name, load in (('mamba_ssm', _load_mamba_ssm), ('oflex', _load_oflex)):
        try:
            found[name] = Scan(load(), channels_last=False)
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def compiled_scan(device: Device) -> Scan:
    """The parallel scan in plain torch by torch.compile, in float32 inside."""
    # Without a GPU the stand-in need not wait for a C++ compiler.
    backend = 'inductor' if device.is_cuda else 'aot_eager'
    compiled = torch.compile(
        scan_cpu_peers.parallel_scan, dynamic=False, backend=backend
    )

    def scan(*inputs: Tensor) -> Tensor:
        return compiled(*(x.float() for x in inputs)).to(inputs[0].dtype)

    return Scan(scan, channels_last=True, work_arrays=8)


def _load_mamba_ssm() -> Callable[..., Tensor]:
    """mamba_ssm's own function.

    Raises:
        ImportError: It is not installed, or not with its kernels.
    """
    published = mamba_ssm.scan_function()

    def scan(u, delta, A, B, C, D, bias):
        return published(u, delta, A, B, C, D, None, bias, True)

    return scan


def _load_oflex(float32_out: bool = False) -> Callable[..., Tensor]:
    """VMamba's kernel, from its folder ``kernels/selective_scan``.

    Raises:
        ImportError: It is not installed, or cannot be loaded.
    """
    try:
        library = import_module('selective_scan_cuda_oflex')
    except Exception as error:
        raise ImportError(
            f"VMamba's selective_scan_cuda_oflex is not installed ({reason(error)})"
        ) from error

    class Oflex(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            u, delta, A, B, C, D, bias = inputs
            out, states, *_ = library.fwd(
                u, delta, A, B, C, D, bias, True, 1, float32_out
            )
            ctx.save_for_backward(*inputs, states)
            return out

        @staticmethod
        def backward(ctx, grad):
            *inputs, states = ctx.saved_tensors
            *tensors, bias = inputs
            grads = library.bwd(*tensors, bias, grad.contiguous(), states, True, 1)
            return tuple(grads[:7])

    return Oflex.apply


def published_ss2d() -> tuple[str, Callable[..., Tensor]]:
    """The name of VMamba's core as published with the best kernel there is.

    Raises:
        ImportError: Neither kernel is installed.
    """
    try:
        name, scan = 'oflex', _load_oflex(float32_out=True)
    except ImportError as first:
        try:
            name, scan = 'mamba_ssm', _load_mamba_ssm()
        except ImportError as second:
            raise ImportError(f'{first}; {second}') from second

    def core(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds):
        def one_dtype(u, delta, A, B, C, D, bias):
            delta, B, C = (t.to(u.dtype).contiguous() for t in (delta, B, C))
            return scan(u, delta, A, B, C, D, bias).float()

        return scan_cpu_peers.loop_ss2d(
            *(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds), scan=one_dtype
        )

    return name, core
