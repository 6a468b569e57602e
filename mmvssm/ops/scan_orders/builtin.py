"""The scan orders that come with the package, one small function each.

Each function takes the height and width of a map and returns rows of places, as
:func:`mmvssm.ops.register_scan_order` needs them. If the source does not say in which
order the rows come, two scans come first and then the same two from the end. The
sources are in ``docs/scan_orders.md``.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops.scan_orders.registry import register_scan_order


def _places(height: int, width: int) -> Tensor:
    """The map with the number of each place in it."""
    return torch.arange(height * width).view(height, width)


def _with_reverses(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second, first.flip(0), second.flip(0)))


@register_scan_order('cross')
def _cross(height: int, width: int) -> Tensor:
    """By rows, by columns, and both from the end: VMamba (arXiv 2401.10166)."""
    places = _places(height, width)
    return _with_reverses(places.flatten(), places.T.flatten())


@register_scan_order('unidi')
def _unidi(height: int, width: int) -> Tensor:
    """Four times by rows: Unidi-Scan of VMamba's ablations."""
    return _places(height, width).flatten().expand(4, -1)


@register_scan_order('bidi')
def _bidi(height: int, width: int) -> Tensor:
    """Twice by rows, twice the same from the end: Bidi-Scan of VMamba's ablations."""
    rows = _places(height, width).flatten()
    return torch.stack((rows, rows, rows.flip(0), rows.flip(0)))


@register_scan_order('corners')
def _corners(height: int, width: int) -> Tensor:
    """By rows, from each of the four corners."""
    places = _places(height, width)
    rows, mirrored = places.flatten(), places.flip(1).flatten()
    return torch.stack((rows, rows.flip(0), mirrored, mirrored.flip(0)))


@register_scan_order('zigzag')
def _zigzag(height: int, width: int) -> Tensor:
    """Rows and columns without jumps: PlainMamba (arXiv 2403.17695)."""
    places = _places(height, width)
    rows, columns = _snake(places), _snake(places.T)
    return torch.stack((rows, rows.flip(0), columns, columns.flip(0)))


def _snake(places: Tensor) -> Tensor:
    """Along the rows, every second one backwards."""
    places = places.clone()
    places[1::2] = places[1::2].flip(1)
    return places.flatten()


@register_scan_order('windows2')
def _windows2(height: int, width: int) -> Tensor:
    """Windows of 2 x 2: LocalMamba (arXiv 2403.09338)."""
    return _windows(height, width, 2)


@register_scan_order('windows7')
def _windows7(height: int, width: int) -> Tensor:
    """Windows of 7 x 7: LocalMamba (arXiv 2403.09338)."""
    return _windows(height, width, 7)


def _windows(height: int, width: int, size: int) -> Tensor:
    """One window after the other: all by rows, and all by columns.

    The map is padded on the right and at the bottom to whole windows.
    """
    padding = (0, -width % size, 0, -height % size)
    padded = F.pad(_places(height, width), padding, value=-1)
    windows = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    rows = windows.permute(0, 2, 1, 3).flatten()
    columns = windows.permute(2, 0, 3, 1).flatten()
    return _with_reverses(rows, columns)


@register_scan_order('diagonals')
def _diagonals(height: int, width: int) -> Tensor:
    """Diagonals of both directions, wrapped around: RS-Mamba (arXiv 2404.02668)."""
    row, start = torch.arange(height), torch.arange(width)[:, None]
    diagonal = row * width + (start + row) % width
    antidiagonal = row * width + (start - row) % width
    return _with_reverses(diagonal.flatten(), antidiagonal.flatten())


@register_scan_order('hilbert')
def _hilbert(height: int, width: int) -> Tensor:
    """Hilbert's curve on any rectangle along the width, its transpose along the height.

    The generalised curve ("gilbert") of J. Červený.
    """
    curves = torch.tensor(
        [[*_curve(0, width, 1j * height)], [*_curve(0, 1j * height, width)]],
        dtype=torch.complex128,
    )
    return _with_reverses(*(curves.imag * width + curves.real).long())


def _curve(start: complex, major: complex, minor: complex) -> Iterator[complex]:
    """The curve over a rectangle, from the start to the far end of the major side.

    Places are column + i row; the sides point to where the rectangle lies.
    """
    length, breadth = _length(major), _length(minor)
    if length == 1 or breadth == 1:
        side, count = (major, length) if breadth == 1 else (minor, breadth)
        for step in range(count):
            yield start + step * side / count
        return
    along, across = major / length, minor / breadth
    half_major, half_minor = _half(major), _half(minor)
    if 2 * length > 3 * breadth:
        # Two halves one behind the other; an odd first one would end on the wrong side.
        if _length(half_major) % 2 and length > 2:
            half_major += along
        yield from _curve(start, half_major, minor)
        yield from _curve(start + half_major, major - half_major, minor)
    else:
        # Up in the first quarter, along the far half, down in the last quarter.
        if _length(half_minor) % 2 and breadth > 2:
            half_minor += across
        yield from _curve(start, half_minor, half_major)
        yield from _curve(start + half_minor, major, minor - half_minor)
        end = start + (major - along) + (half_minor - across)
        yield from _curve(end, -half_minor, half_major - major)


def _length(side: complex) -> int:
    return int(abs(side.real + side.imag))


def _half(side: complex) -> complex:
    return complex(side.real // 2, side.imag // 2)


@register_scan_order('spiral')
def _spiral(height: int, width: int) -> Tensor:
    """Clockwise inwards from the top left, and from the bottom right."""
    rest, rings = _places(height, width), []
    while rest.numel():
        rings.append(rest[0])
        # Turns what is left so that its right column is the next row on top.
        rest = rest[1:].rot90()
    inwards = torch.cat(rings)
    return _with_reverses(inwards, height * width - 1 - inwards)
