"""Results of emulated kernels in many orders of their warps and CTAs.

Run as a program it is the process that leaves barriers out, each in a child of its own:
there threads may wait for each other for ever, which ends it.
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
    return fail_without([barrier], results) == [barrier]


def fail_without(barriers, results):
    """Those of several barriers for which some order shows that one is left out."""
    done = run_with('orders', results, *barriers)
    first, *shown = done.stdout.splitlines()
    assert first == 'begins' and done.returncode == 0, done.stdout + done.stderr
    return shown


def _in_order(seed, results):
    before = os.environ.get(SEED_VARIABLE)
    os.environ[SEED_VARIABLE] = str(seed)
    try:
        return results()
    finally:
        os.environ.pop(SEED_VARIABLE)
        if before is not None:
            os.environ[SEED_VARIABLE] = before


def _shows(barrier, results, want):
    """In a child, as it may end, and nothing that it leaves behind counts."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    os.environ[WITHOUT_VARIABLE] = barrier
    same = all(
        torch.equal(x, y)
        for seed in range(SEEDS)
        for x, y in zip(_in_order(seed, results), want)
    )
    os._exit(not same)


def main():
    module, function, *barriers = sys.argv[1:]
    # Memory that is not written holds NaN.
    torch.use_deterministic_algorithms(True)
    # A child has no other threads than the one that makes it.
    torch.set_num_threads(1)
    results = getattr(importlib.import_module(module), function)
    with kernels.use_machine(Emulator()):
        want = results()
        print('begins', flush=True)
        for barrier in barriers:
            if _shows(barrier, results, want):
                print(barrier, flush=True)


if __name__ == '__main__':
    main()
