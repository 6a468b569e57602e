"""Results of emulated kernels in many orders of their warps and CTAs.

Run as a program it is the process that leaves a barrier out: there threads may wait
for each other for ever, which ends it.
"""

import importlib
import os
import sys

import torch

from mmvssm.ops.cuda import kernels

from . import SEED_VARIABLE, Emulator, run_with

WITHOUT_VARIABLE = 'MMVSSM_EMULATION_WITHOUT'
SEEDS = 20


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
    done = run_with('orders', results, barrier)
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
    module, function, barrier = sys.argv[1:]
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
