"""How the Triton kernels divide their work: every number that a GPU may tune.

A tile that was measured to be faster on the GPU at hand takes the place of what
is chosen here (``tuning.py``). What is chosen here has not been measured on a GPU
yet; it keeps the kernels within the registers of a thread for sm_90
(``tests/ops/test_triton_compiled.py``).
"""

from typing import NamedTuple

from mmvssm.ops.triton.tuning import tunable

# Positions from one state that the scan keeps to the next.
SCAN_CHUNK = 16
# A scanned sequence is cut until there are so many programs, if that leaves
# each stretch so many positions.
SCAN_PROGRAMS = 1024
SHORTEST_STRETCH = 256
# Step sizes are computed in the scan from their low-rank form if the rank times
# the number of states is at most this, else by a matrix product before it. The
# more states a channel has, the fewer channels share what a program loads.
LARGEST_RANK_IN_SCAN = 23


class ScanTile(NamedTuple):
    """The share of a program of the scan.

    Attributes:
        channels: A power of two.
        warps: That work on them.
        part: Positions whose states backward has in registers at once, a
            divisor of ``SCAN_CHUNK``.
    """

    channels: int
    warps: int
    part: int


class Tile(NamedTuple):
    """The share of a program of another kernel.

    Attributes:
        rows: Positions of a sequence, or rows of a matrix, at a time; a power
            of two.
        channels: A power of two.
        warps: That work on them.
        repeats: Times that many rows for which a program sums up the gradients
            of the weights.
    """

    rows: int
    channels: int
    warps: int
    repeats: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@tunable
def scan_tile(states: int, group_size: int, backward: bool) -> ScanTile:
    """For the scan of channels with so many states, in groups of that size.

    A warp is full, and its registers suffice. They hold more states in the forward
    pass: the more channels share B and C, the fewer loads there are.
    """
    block = power_of_two(states)
    of_warp = 512 if block >= 16 and not backward else 256
    channels = min(64, max(4, of_warp // block), power_of_two(group_size))
    return ScanTile(channels, max(1, block * channels // of_warp), part=4)


@tunable
def convolution_tile(channels: int) -> Tile:
    """For the convolutions of the bidirectional scan."""
    return Tile(8, min(64, power_of_two(channels)), warps=1, repeats=32)


@tunable
def norm_tile(channels: int) -> Tile:
    """For the RMS norm, whose programs own whole rows."""
    block = power_of_two(channels)
    rows = max(1, 2048 // block)
    return Tile(rows, block, warps=max(1, min(16, rows * block // 512)), repeats=8)
