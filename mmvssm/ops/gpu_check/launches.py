"""Find the kernels that calls of ops launch, and compile them in advance."""

from collections.abc import Iterable

import torch

from mmvssm.ops.cuda import kernels
from mmvssm.ops.gpu_check import measure
from mmvssm.ops.gpu_check.calls import OpCall
from mmvssm.ops.gpu_check.values import empty, packed
from mmvssm.ops.operator import all_ops
from mmvssm.ops.scan_orders.registry import real_tensors

BACKEND = 'cuda'


def launches_of(
    training: Iterable[OpCall],
    inference: Iterable[OpCall] = (),
    multiprocessors: int = 132,
) -> list[kernels.Launch]:
    """The launches of calls, found without a GPU.

    Args:
        training: Calls that run forward and backward. Ops without kernels launch none.
        inference: Calls that run forward only.
        multiprocessors: Number of multiprocessors of the GPU in question.
    """
    with real_tensors(), kernels.recording(multiprocessors) as launches:
        for call in filter(_has_kernels, dict.fromkeys(training)):
            tensors = [empty(x) for x in call.tensors]
            measure.results(call, BACKEND, tensors, measure.empty_grads(call))
        for call in filter(_has_kernels, dict.fromkeys(inference)):
            inputs, options = packed(call, [empty(x) for x in call.tensors])
            backend = call.declaration.backend(BACKEND, inputs, options)
            backend.forward(inputs, options, False)
    return launches


def compile_for(
    training: Iterable[OpCall], inference: Iterable[OpCall], device: torch.device
) -> int:
    """Compile the kernels of calls, in as many processes as there are cores.

    Returns:
        The number of kernels that were compiled now.

    Raises:
        RuntimeError: A kernel cannot be compiled.
        OSError: There is no compiler, or its output cannot be written.
    """
    gpu = torch.cuda.get_device_properties(device)
    launches = launches_of(training, inference, gpu.multi_processor_count)
    return kernels.prepare(launches, 10 * gpu.major + gpu.minor)


def _has_kernels(call: OpCall) -> bool:
    return BACKEND in all_ops[call.op].backends
