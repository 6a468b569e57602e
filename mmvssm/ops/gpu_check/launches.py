"""Which kernels calls of ops launch, and their compilation before they are needed."""

from collections.abc import Iterable

import torch

from mmvssm.ops.cuda import kernels
from mmvssm.ops.gpu_check import measure
from mmvssm.ops.gpu_check.calls import OpCall
from mmvssm.ops.gpu_check.values import empty
from mmvssm.ops.operator import all_ops
from mmvssm.ops.scan_orders.registry import real_tensors

BACKEND = 'cuda'


def launches_of(
    calls: Iterable[OpCall], multiprocessors: int = 132
) -> list[kernels.Launch]:
    """The launches of calls, forward and backward, found without a GPU.

    Args:
        calls: Of ops; those without kernels of their own launch none.
        multiprocessors: Of the GPU that is thought of.
    """
    with real_tensors(), kernels.recording(multiprocessors) as launches:
        for call in dict.fromkeys(calls):
            if BACKEND in all_ops[call.op].backends:
                tensors = [empty(x) for x in call.tensors]
                measure.results(call, BACKEND, tensors, measure.empty_grads(call))
    return launches


def compile_for(calls: Iterable[OpCall], device: torch.device) -> int:
    """Compile what calls launch on a GPU, in as many processes as there are cores.

    Returns:
        The number of kernels that were not there yet.

    Raises:
        RuntimeError: One cannot be compiled.
        OSError: There is no compiler, or no place for what it makes.
    """
    gpu = torch.cuda.get_device_properties(device)
    launches = launches_of(calls, gpu.multi_processor_count)
    return kernels.prepare(launches, 10 * gpu.major + gpu.minor)
