"""Results of emulated kernels in many orders of their warps and CTAs.

Run as a program it is the process that leaves a barrier out: there threads may wait
for each other for ever, which ends it.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from mmvssm.ops.cuda import kernels

from . import SEED_VARIABLE, Emulator

WITHOUT_VARIABLE = 'MMVSSM_EMULATION_WITHOUT'
SEEDS = 20
TESTS = Path(__file__).parents[2]


def differs_in_some_order(results):
    """Whether a function's tensors are not the same bits in every order.

    Args:
        results: Function that returns tensors of CUDA kernels, here emulated.
    """
    with kernels.use_machine(Emulator()):
        first = _in_order(0, results)
        return any(
            not torch.equal(x, y)
            for seed in range(1, SEEDS)
            for x, y in zip(_in_order(seed, results), first)
        )


def fails_without(barrier, results):
    """Whether some order shows that a barrier is left out.

    Args:
        barrier: Its name in the kernel.
        results: Function of a test module, see :func:`differs_in_some_order`.
    """
    name = results.__module__.rpartition('.')[2]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, '-m', 'ops.cuda_emulation.orders']
        + [barrier, f'ops.{name}', results.__name__],
        cwd=TESTS,
        env=os.environ | {'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == 'begins\n', done.stdout + done.stderr
    return done.returncode != 0


def _in_order(seed, results):
    before = os.environ.get(SEED_VARIABLE)
    os.environ[SEED_VARIABLE] = str(seed)
    try:
        return results()
    finally:
        os.environ.pop(SEED_VARIABLE)
        if before is not None:
            os.environ[SEED_VARIABLE] = before


def main():
    barrier, module, function = sys.argv[1:]
    # Memory that is not written holds NaN.
    torch.use_deterministic_algorithms(True)
    results = getattr(importlib.import_module(module), function)
    with kernels.use_machine(Emulator()):
        want = results()
        print('begins', flush=True)
        os.environ[WITHOUT_VARIABLE] = barrier
        for seed in range(SEEDS):
            for x, y in zip(_in_order(seed, results), want):
                assert torch.equal(x, y), f'seed {seed}'


if __name__ == '__main__':
    main()
