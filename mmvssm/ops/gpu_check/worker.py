"""The process that checks: ``python -m mmvssm.ops.gpu_check.worker``.

A kernel may break its whole process or never return, so this process does nothing else.
``run.py`` starts it. ``tasks.py`` has the messages between the two.
"""

import json
import sys
from typing import Any

import torch

from mmvssm.ops import backends
from mmvssm.ops.gpu_check import launches, measure, stand_in
from mmvssm.ops.gpu_check.tasks import MARK, Job, Task


def main() -> None:
    """Run the job that comes on standard input."""
    job = Job.from_json(json.load(sys.stdin))
    device = torch.device(job.device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    else:
        # One thread is as fast for small calls, and does not wait for other processes.
        torch.set_num_threads(1)
        stand_in.install(job.fault)
    uncompiled = _compile(job, device)
    # An op that has failed is not checked any further.
    failed = set()
    for number, task in enumerate(job.tasks):
        op = task.call.op
        if op in failed:
            continue
        _tell(begins=number)
        reason = uncompiled.get(op)
        found = dict(failure=reason) if reason else _do(task, device)
        _tell(ends=number, **found)
        if found.get('failure') and task.backend == job.backend:
            failed.add(op)
        if found.get('broken') and device.type == 'cuda':
            # After a CUDA error everything else fails, too.
            return


def _do(task: Task, device: torch.device) -> dict[str, Any]:
    """Run a step.

    Returns:
        ``failure``: a sentence or None. ``milliseconds``: the time, if it was measured.
        ``certain``: False if the failure may not come again. ``broken``: True after an
        error.
    """
    try:
        if task.kind == 'check':
            fault = measure.fault(task.call, task.backend, device, task.repeats)
            return dict(failure=fault)
        reason = _refusal(task, device)
        if reason:
            return dict(failure=reason)
        return dict(milliseconds=measure.milliseconds(task.call, task.backend, device))
    except torch.OutOfMemoryError as error:
        return dict(failure=_first_line(error), certain=False)
    except Exception as error:
        reason = f'{type(error).__name__}: {_first_line(error)}'
        return dict(failure=reason, broken=True)


def _refusal(task: Task, device: torch.device) -> str | None:
    """The reason why a backend does not take a call, or None."""
    dtype = getattr(torch, task.call.main_dtype())
    supplier = backends.suppliers[task.backend]
    return supplier.refuses(device.type, dtype, task.call.states)


def _compile(job: Job, device: torch.device) -> dict[str, str]:
    """Compile all kernels. Returns the failures by op."""
    failures: dict[str, str] = {}
    if device.type == 'cuda':
        training = [*(task.call for task in job.tasks), *job.training]
        try:
            launches.compile_for(training, job.inference, device)
        except (RuntimeError, OSError):
            # Find the op of the kernel that failed.
            for op in {call.op for call in training}:
                try:
                    own = [call for call in training if call.op == op]
                    launches.compile_for(own, (), device)
                except (RuntimeError, OSError) as error:
                    failures[op] = f'its kernels: {_first_line(error)}'
    _tell(compiled=True)
    return failures


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _tell(**event: Any) -> None:
    print(MARK + json.dumps(event), flush=True)


if __name__ == '__main__':
    main()
