"""Declaration of SS2D's core."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.contract import Flops, KernelBackend
from mmvssm.ops.deterministic_math import linear_product, product_of_columns
from mmvssm.ops.operator import Op
from mmvssm.ops.scan_orders import KernelOrders, kernel_orders
from mmvssm.ops.scan_orders.tables import orders_of
from mmvssm.ops.selective_scan.declaration import scan_flops


class Ss2dInputs(NamedTuple):
    """Inputs of SS2D's core, or their gradients.

    Attributes:
        x: Map (B, C, H, W).
        x_proj_weight: (K, R + 2N, C).
        dt_projs_weight: (K, C, R).
        dt_projs_bias: (K, C).
        A: (K C, N).
        Ds: (K C,).
    """

    x: Tensor
    x_proj_weight: Tensor
    dt_projs_weight: Tensor
    dt_projs_bias: Tensor
    A: Tensor
    Ds: Tensor


class Ss2dOptions(NamedTuple):
    """Options of SS2D's core.

    Attributes:
        orders: The scan orders, as a word of ``order_word``.
        out_dtype: Dtype of the merged map.
        projected_dtype: Dtype in which the map is projected.
    """

    orders: str
    out_dtype: torch.dtype
    projected_dtype: torch.dtype


def outputs_like(inputs: Ss2dInputs, options: Ss2dOptions) -> tuple[Tensor]:
    """Memory for the merged map (B, C, H, W), channels-last."""
    batch, channels, height, width = inputs.x.shape
    out = inputs.x.new_empty(batch, height, width, channels, dtype=options.out_dtype)
    return (out.permute(0, 3, 1, 2),)


def _flops(shapes: Ss2dInputs, options: Ss2dOptions) -> list[Flops]:
    batch, channels, height, width = shapes.x
    length = height * width
    (count, _, _), (_, states) = shapes.x_proj_weight, shapes.A
    weights = prod(shapes.x_proj_weight) + prod(shapes.dt_projs_weight)
    scans = scan_flops(batch, count * channels, length, states)
    return [
        Flops(batch * length * weights, part='projections'),
        Flops(0, scans, part='scan'),
    ]


SS2D_SCAN = Op(
    'ss2d_scan',
    Ss2dInputs,
    Ss2dOptions,
    returns=('y',),
    saves=2,
    outputs_like=outputs_like,
    flops=_flops,
    axes=dict(x=(0, 2)),
)


class KernelInputs(NamedTuple):
    """The inputs for kernels that follow the scan orders themselves.

    The projections of a place do not depend on the scan order. So one matrix product
    over the map makes all of them.

    Attributes:
        x: Map (B, H, W, C), contiguous, of a dtype that the kernels can read.
        projected: (B, H, W, K (R + 2N)), of such a dtype; perhaps a view of a tensor
            with more columns.
        dt_weight, dt_bias, A, Ds: Like the inputs, contiguous float32.
    """

    x: Tensor
    projected: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    Ds: Tensor

    @classmethod
    def of(
        cls,
        inputs: Ss2dInputs,
        options: Ss2dOptions,
        dtypes: tuple[torch.dtype, ...],
        projected: Tensor | None = None,
    ) -> 'KernelInputs':
        """Make them for kernels with these dtypes; ``projected`` may be given."""
        maps = inputs.x.permute(0, 2, 3, 1)
        if projected is None:
            weight = inputs.x_proj_weight.flatten(0, 1).to(options.projected_dtype)
            projected = linear_product(maps.to(options.projected_dtype), weight)
        x, projected = (
            t if t.dtype in dtypes else t.float() for t in (maps, projected)
        )
        weights = (t.float().contiguous() for t in inputs[2:])
        return cls(x.contiguous(), projected, *weights)

    def kept(self, options: Ss2dOptions) -> Tensor:
        """The projections in the form that is saved for the backward pass."""
        return self.projected.to(options.projected_dtype).contiguous()


def walked_orders(inputs: Ss2dInputs, options: Ss2dOptions) -> KernelOrders:
    """The scan orders in the form that kernels need."""
    x = inputs.x
    height, width = x.shape[2:]
    return kernel_orders(orders_of(options.orders), height, width, x.device)


class FusedSs2d(KernelBackend):
    """Base of backends whose kernels follow the scan orders themselves.

    Attributes:
        dtypes: Dtypes of the map and its projections that the kernels can read.
    """

    dtypes: tuple[torch.dtype, ...]

    def states_shape(
        self, batch: int, positions: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Shape of the states that are saved for one scan."""
        raise NotImplementedError

    def states_like(self, inputs: Ss2dInputs, orders: KernelOrders) -> Tensor:
        """Memory for the states that are saved for all scans."""
        batch, channels, height, width = inputs.x.shape
        positions = orders.positions(height * width)
        shape = self.states_shape(batch, positions, inputs.A.shape[1], channels)
        return inputs.x.new_empty(len(orders.routes), *shape, dtype=torch.float32)

    def saved_like(
        self, inputs: Ss2dInputs, options: Ss2dOptions
    ) -> tuple[Tensor, ...]:
        """The projections, and the states of all scans."""
        batch, _, height, width = inputs.x.shape
        columns = prod(inputs.x_proj_weight.shape[:2])
        shape = (batch, height, width, columns)
        projected = inputs.x.new_empty(shape, dtype=options.projected_dtype)
        return projected, self.states_like(inputs, walked_orders(inputs, options))


def gradients_of(
    inputs: Ss2dInputs,
    options: Ss2dOptions,
    grad_x: Tensor,
    grad_projected: Tensor,
    *others: Tensor,
) -> Ss2dInputs:
    """Gradients of the inputs from those of :class:`KernelInputs`."""
    dtype = options.projected_dtype
    weight = inputs.x_proj_weight.flatten(0, 1).to(dtype)
    rows = grad_projected.flatten(0, 2).to(dtype)
    maps = inputs.x.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
    through = linear_product(rows, weight.t()).view(grad_x.shape)
    by_weight = product_of_columns(rows, maps)
    return Ss2dInputs(
        grad_x.add_(through).permute(0, 3, 1, 2),
        by_weight.reshape(inputs.x_proj_weight.shape),
        *others,
    )
