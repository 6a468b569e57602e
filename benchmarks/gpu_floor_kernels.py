"""Kernels that do nothing but exp2, or nothing but multiply-add. Needs Triton."""

import triton
import triton.language as tl

# Values of a program, and operations on each in one turn of the loop.
BLOCK = 1024
UNROLLED = 16


@triton.jit
def exp2_kernel(x, turns, BLOCK: tl.constexpr, UNROLLED: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    for _ in range(turns):
        for _ in tl.static_range(UNROLLED):
            value = tl.exp2(-value)
    tl.store(x + offsets, value)


@triton.jit
def fma_kernel(x, turns, BLOCK: tl.constexpr, UNROLLED: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    factor = value
    for _ in range(turns):
        for _ in tl.static_range(UNROLLED):
            value = value * factor + 0.5
    tl.store(x + offsets, value)
