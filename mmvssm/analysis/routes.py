"""What the mixers of a model compute with on an image, as matrices can be made of it.

The ops of a mixer are recorded while the model runs, so nothing of a layer is repeated
here: scan orders, padded places, class tokens and layers that adapters changed are
those of the model.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmvssm.families import families
from mmvssm.layers import SS2D, BidirectionalMamba, CascadeSS2D, LinearAttention2d
from mmvssm.layers.unified_attention import (
    SMALLEST_STEP,
    StepSize2d,
    UnifiedAttention2d,
    unified_attention,
)
from mmvssm.ops import (
    bidirectional_scan,
    linear_attention,
    scan_order,
    selective_scan,
    ss2d_scan,
)
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.bidirectional_scan.reference import direction_scan
from mmvssm.ops.deterministic_math import softplus
from mmvssm.ops.linear_attention.declaration import AttentionInputs, AttentionOptions
from mmvssm.ops.linear_attention.reference import attention_weights, products
from mmvssm.ops.scan_orders.tables import orders_of
from mmvssm.ops.selective_scan.declaration import ScanInputs
from mmvssm.ops.ss2d_scan.reference import scans

MIXERS = (SS2D, BidirectionalMamba, LinearAttention2d, UnifiedAttention2d)
_OPS = {ss2d_scan, bidirectional_scan, selective_scan, linear_attention}
_EPS = inspect.signature(unified_attention).parameters['eps'].default


@dataclass(frozen=True)
class ScanRoute:
    """One selective scan over the places of one image.

    Attributes:
        places: The place that is visited at each of the L positions, int64 (L,); -1 for
            a padded place. Places are numbered row by row of a map, or along the
            sequence of an isotropic backbone.
        values: What is mixed (D, L), in the order of the scan.
        dt: Step sizes Δ after the softplus (D, L).
        A: Decay rates (D, N).
        B, C: (G, N, L); each of the G groups serves D / G neighbouring channels.
        D: Skip weights (D,), or None.
        columns: What a value is multiplied by before it enters the state, (D, L): Δ;
            1 where a study model has no input gate.
        rows: What an output is multiplied by, (D, L): one over the normaliser of
            :func:`mmvssm.layers.unified_attention.unified_attention`. None for 1.
    """

    places: Tensor
    values: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    columns: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True)
class LinearRoute:
    """Linear attention over the places of one image, which has no order.

    Attributes:
        inputs, options: Of :func:`mmvssm.ops.linear_attention`, for this image.
        dt: Step sizes of an input gate (D, L), or None. They multiply the values.
    """

    inputs: AttentionInputs
    options: AttentionOptions
    dt: Tensor | None = None

    @property
    def products(self) -> Tensor:
        """Inner products of the features of queries and keys (heads, L, L).

        They are without rotation and normalisation.
        """
        pair = (x.to(self.options.dtype) for x in self.inputs[:2])
        features = (nn.functional.elu(x) + 1 for x in pair)
        return products(*features, self.options.heads)[0]

    @property
    def weights(self) -> Tensor:
        """The weights of the values (heads, L, L), with both."""
        return attention_weights(self.inputs, self.options)[0]


@dataclass(frozen=True)
class Mixing:
    """What one mixer computed with on one image.

    Attributes:
        layer: Name of the mixer in the backbone.
        position: Its block: stage and block, or block alone.
        size: Height and width of the map.
        routes: Its scans, or its linear attention, by name.
        patches: The place of each of the H * W patches, int64; there may be more
            places, of class tokens or registers.
        scale: What the sum of the routes is multiplied by.
    """

    layer: str
    position: tuple[int, ...]
    size: tuple[int, int]
    routes: dict[str, ScanRoute | LinearRoute]
    patches: Tensor
    scale: float = 1.0


def find_mixers(backbone: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names of the mixers of a backbone, from the image on, and the block of each.

    Raises:
        ValueError: The backbone has none of the mixers of :mod:`mmvssm.layers`, or
            belongs to no family.
    """
    family = next((f for f in families() if isinstance(backbone, f.backbone)), None)
    found = {}
    if family is not None:
        for name, module in backbone.named_modules():
            if isinstance(module, MIXERS):
                found[name] = family.depth(f'{name}.weight') or ()
    if not found:
        raise ValueError(
            f'{type(backbone).__name__} has no selective scan and no linear attention '
            f'of mmvssm.layers to look into'
        )
    return found


@torch.no_grad()
def record_mixings(
    backbone: nn.Module, image: Tensor, layers: Sequence[str] | None = None
) -> Iterator[Mixing]:
    """Run a backbone on an image, and yield what its mixers compute with.

    Args:
        backbone: A backbone of a registered family. It runs in eval mode.
        image: (1, in_channels, H, W), of the dtype and on the device of the weights.
        layers: Names of mixers; None for all of :func:`find_mixers`.

    Yields:
        One :class:`Mixing` for each layer, in the order of ``layers``.

    Raises:
        ValueError: The image is no batch of one, a layer is no mixer of the backbone,
            or a mixer has no matrix, as :class:`mmvssm.layers.CascadeSS2D`.
    """
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(f'expected one image (1, C, H, W), got {tuple(image.shape)}')
    known = find_mixers(backbone)
    unknown = [name for name in layers or () if name not in known]
    if unknown:
        raise ValueError(f'no mixer {unknown[0]!r}; there are {", ".join(known)}')
    records = _run(backbone, image, list(known if layers is None else layers))
    for name, record in records.items():
        yield _mixing(backbone, image, name, known[name], record)


class _Recorder(TorchFunctionMode):
    """Notes the calls of the ops of the layer that runs."""

    def __init__(self):
        super().__init__()
        self.calls: list | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _OPS and self.calls is not None:
            self.calls.append((func, func.__wrapped__(*args, **kwargs)))
        return func(*args, **kwargs)


@dataclass
class _Record:
    calls: list
    size: tuple[int, int] | None = None
    step: Tensor | None = None


def _run(
    backbone: nn.Module, image: Tensor, layers: Sequence[str]
) -> dict[str, _Record]:
    recorder, records = _Recorder(), {}
    training = backbone.training
    with ExitStack() as hooks:
        hooks.callback(backbone.train, training)
        for name in layers:
            records[name] = record = _Record([])
            module = backbone.get_submodule(name)

            def begin(module, args, record=record):
                recorder.calls = record.calls
                if args[0].ndim == 4:
                    record.size = tuple(args[0].shape[2:])

            def end(module, args, out):
                recorder.calls = None

            hooks.callback(module.register_forward_pre_hook(begin).remove)
            hooks.callback(module.register_forward_hook(end).remove)
            for child in module.modules():
                if isinstance(child, StepSize2d):

                    def note(module, args, out, record=record):
                        record.step = out[0].flatten(1)

                    hooks.callback(child.register_forward_hook(note).remove)
        backbone.eval()
        with recorder:
            backbone.compute_maps(image)
    return records


def _mixing(
    backbone: nn.Module,
    image: Tensor,
    name: str,
    position: tuple[int, ...],
    record: _Record,
) -> Mixing:
    module = backbone.get_submodule(name)
    if isinstance(module, CascadeSS2D):
        raise ValueError(
            f'{name} is a CascadeSS2D, which scans the columns of what it found along '
            'the rows: there is no one matrix for it'
        )
    size = record.size or tuple(backbone.map_sizes(tuple(image.shape[2:]))[0])
    patches = torch.arange(size[0] * size[1], device=image.device)
    scale = 1.0
    if isinstance(module, SS2D):
        routes = _ss2d_routes(record.calls, size)
    elif isinstance(module, BidirectionalMamba):
        routes = _bidirectional_routes(record.calls, module.directions)
        scale = 0.5 if module.average and len(routes) == 2 else 1.0
        tokens = backbone.token_positions(len(patches))
        length = len(patches) + len(tokens)
        patches = torch.tensor(
            [place for place in range(length) if place not in set(tokens)],
            device=image.device,
        )
    else:
        input_gate = getattr(module, 'input_gate', False)
        routes = _attention_routes(record, input_gate)
    return Mixing(name, position, size, routes, patches, scale)


def _ss2d_routes(calls: list, size: tuple[int, int]) -> dict[str, ScanRoute]:
    ((_, call),) = calls
    orders = orders_of(call.options.orders)
    table = scan_order(orders, *size).to(call.inputs.x.device)
    return {
        f'route {k}': _scan_route(scan, places)
        for k, (scan, places) in enumerate(zip(scans(call.inputs, orders), table))
    }


def _bidirectional_routes(calls: list, directions: str) -> dict[str, ScanRoute]:
    if calls[0][0] is bidirectional_scan:
        x, _, *weights = calls[0][1].inputs
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = (Direction(*(t.to(wide) for t in way)) for way in weights)
        ways = (x.to(wide), x.to(wide).flip(-1))
        found = [direction_scan(*pair) for pair in zip(ways, weights)]
    else:
        # Layers that adapters changed are called one by one, and so are those of the
        # other choices of directions.
        found = [call.inputs for _, call in calls]
    places = torch.arange(found[0].u.shape[2], device=found[0].u.device)
    ways = dict(forward=places, backward=places.flip(0))
    if directions in ways:
        ways = {directions: ways[directions]}
    return {
        name: _scan_route(scan, ways[name])
        for name, scan in zip(ways, found, strict=True)
    }


def _attention_routes(
    record: _Record, input_gate: bool
) -> dict[str, ScanRoute | LinearRoute]:
    op, call = record.calls[0]
    if op is selective_scan:
        return {'forward': _gated_route(record.calls, input_gate)}
    q, k, v = (x[:1] for x in call.inputs[:3])
    inputs = call.inputs._replace(q=q, k=k, v=v)
    return {'attention': LinearRoute(inputs, call.options, record.step)}


def _gated_route(calls: list, input_gate: bool) -> ScanRoute:
    """The recurrence of :func:`unified_attention`, with and without its gates."""
    inputs: list[Any] = [call.inputs for _, call in calls]
    places = torch.arange(inputs[0].u.shape[2], device=inputs[0].u.device)
    route = _scan_route(inputs[0], places, softplus_first=False)
    if not input_gate:
        # The layer divides the values by Δ, because the scan multiplies by it.
        least = route.dt.clamp(min=SMALLEST_STEP)
        route = replace(route, values=route.values * least, columns=route.dt / least)
    if len(inputs) > 1:
        # The normaliser is the same scan over ones.
        normaliser = selective_scan(*inputs[1][:6])[0]
        route = replace(route, rows=1 / (normaliser + _EPS))
    return route


def _scan_route(
    scan: ScanInputs, places: Tensor, softplus_first: bool = True
) -> ScanRoute:
    dtype = torch.promote_types(scan.u.dtype, torch.float32)
    u, delta, B, C = (x[0].to(dtype) for x in (scan.u, scan.delta, scan.B, scan.C))
    if scan.delta_bias is not None:
        delta = delta + scan.delta_bias.to(dtype)[:, None]
    dt = softplus(delta) if softplus_first else delta
    B, C = (x if x.ndim == 3 else x.unsqueeze(0) for x in (B, C))
    return ScanRoute(places, u, dt, scan.A.to(dtype), B, C, scan.D, dt)
