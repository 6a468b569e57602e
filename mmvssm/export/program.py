"""Models as programs of ``torch.export``, for images of any size."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmvssm.export.errors import DifferenceError, ExportError
from mmvssm.export.wrappers import least_size, refuse

DYNAMIC = ('batch', 'size')
# At this size the smallest map of a model has several rows and columns.
_TRACED = 160
# Relative to the largest number of an output.
_BOUND = 1e-4


def to_exported_program(
    model: nn.Module,
    size: int | tuple[int, int] = 224,
    dynamic: Sequence[str] = (),
    batch: int = 1,
) -> ExportedProgram:
    """Trace a model for inference with ``torch.export``.

    The graph has torch's own operators and the ops of this package, which keep nothing
    for a backward pass. Programs of dynamic size or batch are run before they are
    returned, at small sizes, and compared with the model.

    Args:
        model: A classifier, a backbone, a module of :mod:`mmvssm.export.wrappers`, or
            any other module from an image (B, C, H, W) to tensors; in eval mode.
        size: Height and width of the image in pixels, or one number for both.
        dynamic: Any of ``'batch'`` and ``'size'``: with ``'size'`` the program takes
            images of all sizes that the model takes, square or not.
        batch: Number of images, where it is not dynamic.

    Returns:
        The program. ``program.module()`` is a module again; :func:`torch.export.save`,
        ``torch._inductor.aoti_compile_and_package`` and
        :func:`mmvssm.export.to_onnx` go on from here.

    Raises:
        ExportError: The model cannot be traced so.
        DifferenceError: The program does not compute what the model computes.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    _check(model, sides, dynamic, batch)
    refuse(model)
    first = next((x for x in model.modules() if isinstance(x, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    parameter = next(model.parameters(), torch.empty(0))
    shape = (batch, channels, *sides)
    dims: dict[int, Any] = {}
    if 'batch' in dynamic:
        dims[0] = Dim.DYNAMIC
        shape = (2, *shape[1:])
    if 'size' in dynamic:
        refuse_fixed_orders(model)
        dims[2] = dims[3] = Dim.DYNAMIC
        height, width = (max(side, _TRACED) for side in sides)
        # One symbol would stand for two equal sides.
        shape = (*shape[:2], height, width + 32 * (height == width))
    image = parameter.new_zeros(shape)
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=(dims,))
    if dims:
        _widen(program, image, dims, least_size(model))
        _compare(model, program, image, dims)
    return program


def refuse_fixed_orders(model: nn.Module) -> None:
    """Raise :class:`ExportError` where a scan order is a table for one size."""
    for layer in model.modules():
        orders = getattr(layer, 'orders', 'cross')
        if orders not in ('cross', None):
            raise ExportError(
                f'the scan order {orders!r} is a table for one size of the map: leave '
                "out 'size' of dynamic"
            )


def _check(
    model: nn.Module, size: tuple[int, ...], dynamic: Sequence[str], batch: int
) -> None:
    if model.training:
        raise ExportError('the model is in training mode: call model.eval() before')
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ExportError(f'size must be height and width in pixels, got {size}')
    least = least_size(model)
    if min(size) < least:
        raise ExportError(f'the model takes {least}x{least} pixels or more, got {size}')
    if unknown := sorted(set(dynamic) - set(DYNAMIC)):
        raise ExportError(f'dynamic takes {DYNAMIC}, got {unknown}')
    if batch < 1:
        raise ExportError(f'batch must be 1 or more, got {batch}')


def _widen(
    program: ExportedProgram, image: Tensor, dims: Collection[int], least: int
) -> None:
    """Let a program take batches of one image, and images with maps of 1x1.

    While torch traces, it asks whether sides are larger than 1, to know the strides of
    a convolution's output. It keeps the answers as guards, though the operators of the
    graph are the same for both answers. A guard that does not hold at some larger size
    is another matter: with it the graph is not for all sizes.
    """
    from torch.utils._sympy.value_ranges import ValueRanges

    name = program.graph_signature.user_inputs[0]
    guards = getattr(program, '_guards_code', [])
    shapes = list(_shapes(image.shape, dims, least))
    kept = []
    for guard in guards:
        failed = _where_not(guard, name, shapes)
        large = [shape for shape in failed if min(shape[2:]) >= _TRACED]
        if large:
            raise ExportError(
                f'the graph of this model is not for images of {large[0]}, because it '
                f'was traced under the condition {guard}: leave out dynamic'
            )
        if not failed:
            kept.append(guard)
    guards[:] = kept
    (node,) = (node for node in program.graph.nodes if node.name == name)
    for dim in dims:
        symbol = node.meta['val'].shape[dim].node.expr
        upper = program.range_constraints[symbol].upper
        program.range_constraints[symbol] = ValueRanges(least if dim else 1, upper)


def _shapes(
    shape: torch.Size, dims: Collection[int], least: int
) -> Iterator[tuple[int, ...]]:
    """Shapes of images: all heights, narrow, square and wide."""
    batch, channels, height, width = shape
    batches = (1, 2, 3) if 0 in dims else (batch,)
    sides = range(least, 3 * _TRACED + 64) if 2 in dims else (height,)
    for number, down in product(batches, sides):
        for across in (least, 2 * _TRACED + 1, down) if 2 in dims else (width,):
            yield number, channels, down, across
            yield number, channels, across, down


def _where_not(
    guard: str, name: str, shapes: Iterable[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The shapes of an image for which a guard of torch does not hold."""
    code = compile(guard, '<guard>', 'eval')
    found = []
    for shape in shapes:
        known = dict(min=min, max=max, L={name: _Image(shape)})
        if not eval(code, dict(known, __builtins__={})):
            found.append(shape)
    return found


@dataclass
class _Image:
    """What a guard asks of an image."""

    shape: tuple[int, ...]

    def size(self) -> tuple[int, ...]:
        return self.shape


def _compare(
    model: nn.Module, program: ExportedProgram, image: Tensor, dims: Collection[int]
) -> None:
    """Run a program at small sizes, where maps of one row or column are."""
    least = least_size(model)
    run = program.module()
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in ((1, least, least), (3, least + 9, 3 * least + 2)):
        shape = list(image.shape)
        if 0 in dims:
            shape[0] = batch
        if 2 in dims:
            shape[2:] = height, width
        x = torch.randn(shape, generator=generator).to(image)
        with torch.no_grad():
            pairs = zip(_tensors(run(x)), _tensors(model(x)), strict=True)
            error = max(_difference(got, want) for got, want in pairs)
        if not error < _BOUND:
            raise DifferenceError(
                f'the program differs from the model by {error:.1e} of the largest '
                f'output, at an image of {tuple(shape)}: leave out dynamic'
            )


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors among the outputs of a module."""
    return [
        x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)
    ]


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative; of classes the share that differs."""
    if got.shape != want.shape:
        return float('inf')
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return float((got != want).double().mean()) / 100
    scale = want.abs().max().clamp(min=1e-12)
    return float((got - want).abs().max() / scale)
