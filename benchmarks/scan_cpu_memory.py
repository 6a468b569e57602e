"""Peak memory of forward and backward, each in a process of its own.

The kernels' buffers do not come from torch's allocator, so what counts is the
memory the process holds: glibc is told to give every large block back at once,
and the peak is the kernel's high-water mark, reset after the inputs are made.

    python benchmarks/scan_cpu_memory.py '{"what": "op", ...}'

is one measurement, see :func:`measure`, and prints it as JSON.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from scan_cpu_inputs import op_inputs, ss2d_inputs
from torch import Tensor
from unfused import unfused

from mmvssm.analysis.measuring import process_memory
from mmvssm.ops import selective_scan, ss2d_scan

# glibc's malloc: what is this large is mapped, so that freeing it unmaps it.
MALLOC = dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')


def measure(what: str, threads: int, **shape: int) -> dict:
    """Measure one peak in a new process.

    Args:
        what: ``'op'``, ``'fused'`` (SS2D) or ``'unfused'``.
        threads: Of torch.
        **shape: Of :func:`op_inputs` or :func:`ss2d_inputs`.

    Returns:
        Bytes of ``inputs``, ``outputs`` and ``gradients`` (of the inputs), and
        of the ``peak`` above the inputs, which holds the latter two.
    """
    task = dict(what=what, threads=threads, **shape)
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(task)],
        env={**os.environ, **MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _problem(what: str, shape: dict) -> tuple[list[Tensor], Callable[..., Tensor]]:
    if what == 'op':
        return op_inputs(**shape, channels_last=True), _scan
    fused = functools.partial(ss2d_scan, backend='cpu')
    return ss2d_inputs(**shape), fused if what == 'fused' else unfused(ss2d_scan, 'cpu')


def _scan(u, delta, A, B, C, D, bias):
    return selective_scan(u, delta, A, B, C, D, None, bias, True, backend='cpu')


def _size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _child(what: str, threads: int, **shape: int) -> dict:
    torch.set_num_threads(threads)
    # Whatever is loaded or started once must not count.
    small = {name: min(size, 16) for name, size in shape.items()}
    inputs, function = _problem(what, small)
    torch.autograd.grad(function(*inputs).sum(), inputs)

    inputs, function = _problem(what, shape)
    with torch.no_grad():
        grad_out = torch.empty_like(inputs[0]).fill_(1)
    before = process_memory.held()
    process_memory.reset_peak()
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, grad_out)
    peak = process_memory.peak() - before
    return dict(
        inputs=_size(inputs),
        outputs=_size([out]),
        gradients=_size(gradients),
        peak=peak,
    )


if __name__ == '__main__':
    print(json.dumps(_child(**json.loads(sys.argv[1]))))
