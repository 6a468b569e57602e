"""Models as programs of ``torch.export``, for images of any size."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

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
    _share(program)
    if dims:
        least = _least_side(model, image) if 'size' in dynamic else 1
        doubtful = _widen(program, image, dims, least)
        _compare(model, program, image, doubtful)
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


def _share(program: ExportedProgram) -> None:
    """Compute once what blocks with maps of one size compute alike, such as tables."""
    graph, outputs = program.graph, program.graph.output_node().all_input_nodes
    detach = torch.ops.aten.detach_.default
    if any(_changes(node.target) for node in graph.nodes if node.target is not detach):
        # Two results may be equal until one of them is changed.
        return
    seen: dict[Any, Node] = {}
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in list(graph.nodes):
        if node.name in constants:
            value = program.constants[constants[node.name]]
            key: Any = (value.dtype, value.shape, str(value.tolist()))
        elif node.target is detach:
            # There are no gradients here.
            key = node.args[0]
            seen[key] = node.args[0]
        elif node.op == 'call_function' and _is_pure(node.target):
            key = _key((node.target, node.args, node.kwargs))
        else:
            continue
        first = seen.setdefault(key, node)
        if first is not node and node not in outputs:
            node.replace_all_uses_with(first)
            if node.op != 'placeholder':
                graph.erase_node(node)
    program.graph_module.recompile()


def _changes(target: Any) -> bool:
    """Whether an operator changes one of its inputs."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_pure(target: Any) -> bool:
    """Whether two calls with the same arguments can be one."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, '__module__', '') in ('_operator', 'math')
    random = torch.Tag.nondeterministic_seeded in target.tags
    return bool(target._schema.returns) and not random


def _key(value: Any) -> Any:
    """Something to look an argument up by."""
    if isinstance(value, (tuple, list)):
        return tuple(_key(part) for part in value)
    if isinstance(value, Mapping):
        return tuple((name, _key(part)) for name, part in value.items())
    if isinstance(value, slice):
        return _key((value.start, value.stop, value.step))
    # 1, 1.0 and True are different arguments.
    return type(value), value


def _least_side(model: nn.Module, image: Tensor) -> int:
    """The smallest height and width that a model does not refuse."""
    for side in range(least_size(model), min(image.shape[2:])):
        try:
            with torch.no_grad():
                model(image[:, :, :side, :side])
        except (ValueError, RuntimeError):
            continue
        return side
    return min(image.shape[2:])


def _widen(
    program: ExportedProgram, image: Tensor, dims: Collection[int], least: int
) -> set[tuple[int, ...]]:
    """Let a program take batches of one image, and images with maps of 1x1.

    While torch traces, it asks whether sides are larger than 1, to know the strides of
    a convolution's output. It keeps the answers as guards, though the operators of the
    graph are the same for both answers. A guard that does not hold at some larger size
    is another matter: with it the graph is not for all sizes.

    Returns:
        The smallest shape of images, and for every guard that is given up the smallest
        one for which it does not hold.
    """
    from torch.utils._sympy.value_ranges import ValueRanges

    name = program.graph_signature.user_inputs[0]
    guards = getattr(program, '_guards_code', [])
    shapes = sorted(set(_shapes(image.shape, dims, least)), key=prod)
    kept, doubtful = [], {shapes[0]}
    for guard in guards:
        failed = _where_not(guard, name, shapes)
        large = [shape for shape in failed if min(shape[2:]) >= _TRACED]
        if large:
            raise ExportError(
                f'the graph of this model is not for images of {large[0]}, because it '
                f'was traced under the condition {guard}: leave out dynamic'
            )
        if failed:
            doubtful.add(failed[0])
        else:
            kept.append(guard)
    guards[:] = kept
    (node,) = (node for node in program.graph.nodes if node.name == name)
    for dim in dims:
        symbol = node.meta['val'].shape[dim].node.expr
        upper = program.range_constraints[symbol].upper
        program.range_constraints[symbol] = ValueRanges(least if dim else 1, upper)
    return doubtful


def _shapes(
    shape: torch.Size, dims: Collection[int], least: int
) -> Iterator[tuple[int, ...]]:
    """Shapes of images: all heights, narrow, square and wide."""
    batch, channels, height, width = shape
    batches = (1, 3) if 0 in dims else (batch,)
    sides = range(least, 3 * _TRACED + 64) if 2 in dims else (height,)
    for number, down in product(batches, sides):
        for across in (least, 2 * _TRACED + 1, down) if 2 in dims else (width,):
            yield number, channels, down, across
            if 2 in dims:
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
    model: nn.Module,
    program: ExportedProgram,
    image: Tensor,
    shapes: Iterable[tuple[int, ...]],
) -> None:
    """Run a program on images of these shapes, beside the model."""
    run = program.module()
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        x = torch.randn(shape, generator=generator).to(image)
        with torch.no_grad():
            pairs = zip(_tensors(run(x)), _tensors(model(x)), strict=True)
            error = max(_difference(got, want) for got, want in pairs)
        if not error < _BOUND:
            raise DifferenceError(
                f'the program differs from the model by {error:.1e} of the largest '
                f'output, at an image of {shape}: leave out dynamic'
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
