"""SS2D's core by own CUDA kernels, in the order of the image.

The kernels of the selective scan read the map and the projections along a scan order,
by index arithmetic or by a table, so there is never an array in the order of a scan.
The forward kernels make the step sizes of their low-rank form on the way. Scans follow
one another on the device, each adding to the sum, or, where one alone would leave most
of a GPU idle, run side by side and are merged then. Either way each writes every place
once and the sums are in a fixed order: the same inputs give the same bits.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import Result
from mmvssm.ops.cuda import one_state
from mmvssm.ops.cuda.one_state_call import run_side_by_side
from mmvssm.ops.cuda.scan import Scan, sum_for, turns
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.scan_orders import KernelOrders
from mmvssm.ops.selective_scan.cuda_backend import kernels_for
from mmvssm.ops.ss2d_scan.declaration import (
    FusedSs2d,
    KernelInputs,
    Ss2dInputs,
    Ss2dOptions,
    gradients_of,
    walked_orders,
)
from mmvssm.ops.ss2d_scan.per_order import (
    OrderGradients,
    OrderInputs,
    join_gradients,
    sequence,
    split_orders,
)
from mmvssm.ops.typed import sole


class CudaSs2d(FusedSs2d):
    """The scans of the selective scan's kernels, each adding to the merged map."""

    supplier = backends.CUDA
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def states_shape(
        self, batch: int, positions: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Of the states before each chunk but the first."""
        return kernels_for(states).saved_shape(batch, positions, states, channels)

    def forward(self, inputs: Ss2dInputs, options: Ss2dOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.ss2d_scan`."""
        orders = walked_orders(inputs, options)
        read = KernelInputs.of(inputs, options, self.dtypes)
        memory = read.x.new_empty(read.x.shape, dtype=options.out_dtype)
        kept = self.states_like(inputs, orders) if keep else None
        scans = [scan for scan, _ in _scans(read, orders, low_rank=True)]
        if inputs.A.shape[1] == 1:
            states = None if kept is None else list(kept)
            one_state.forward_merged(scans, sequence(memory), states)
        else:
            _forward_in_turn(scans, sequence(memory), kept)
        saved = () if kept is None else (read.kept(options), kept)
        return Result((memory.permute(0, 3, 1, 2),), saved)

    def backward(
        self,
        inputs: Ss2dInputs,
        options: Ss2dOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: Ss2dInputs,
    ) -> Ss2dInputs:
        """All gradients."""
        orders = walked_orders(inputs, options)
        read = KernelInputs.of(inputs, options, self.dtypes, projected=saved[0])
        grad_out = sequence(sole(grads).permute(0, 2, 3, 1).contiguous())
        one = inputs.A.shape[1] == 1
        scans = list(_scans(read, orders, low_rank=one))
        grad_x = torch.empty_like(read.x, dtype=torch.float32)
        if one and run_side_by_side([scan for scan, _ in scans]):
            found = _backward_at_once(scans, saved[1], grad_out, sequence(grad_x))
        else:
            found = _backward_in_turn(scans, saved[1], grad_out, sequence(grad_x))
        rest = join_gradients(read.projected, found)
        return gradients_of(inputs, options, grad_x, *rest)


def _backward_at_once(
    scans: Sequence[tuple[Scan, OrderInputs]],
    saved: Tensor,
    grad_out: Tensor,
    grad_x: Tensor,
) -> list[OrderGradients]:
    """Gradients of scans of one state that run side by side."""
    by_delta = [_delta_like(scan, own) for scan, own in scans]
    found = one_state.backward_at_once(
        [scan for scan, _ in scans], list(saved), grad_out, grad_x, by_delta
    )
    return [
        _order_gradients(own, by_delta[k], found[k]) for k, (_, own) in enumerate(scans)
    ]


def _backward_in_turn(
    scans: Sequence[tuple[Scan, OrderInputs]],
    saved: Tensor,
    grad_out: Tensor,
    grad_x: Tensor,
) -> list[OrderGradients]:
    """Gradients scan by scan, so that those of one's step sizes are there at a time."""
    kernels = kernels_for(scans[0][0].A.shape[1])
    found = []
    for k, (scan, own) in enumerate(scans):
        by_delta = _delta_like(scan, own)
        rest = kernels.backward(
            *(scan, saved[k], grad_out, None),
            rows=(grad_x, by_delta, None),
            add=k > 0,
        )
        found.append(_order_gradients(own, by_delta, rest))
    return found


def _delta_like(scan: Scan, inputs: OrderInputs) -> Tensor:
    """Memory for the gradient of whole step sizes (B, D, L), channels-last."""
    dtype = inputs.dt.dtype if scan.delta is None else scan.delta.dtype
    return torch.empty_like(inputs.u, dtype=dtype)


def _order_gradients(
    inputs: OrderInputs, by_delta: Tensor, rest: one_state.Gradients
) -> OrderGradients:
    """Put together, given those of step sizes (B, D, L) and what kernels give."""
    by_A, by_B, by_C, by_D, by_bias = rest
    assert by_D is not None and by_bias is not None, 'SS2D has both'
    dt = inputs.dt.to(by_delta.dtype).flatten(0, 1)
    weight = inputs.weight.to(by_delta.dtype)
    return OrderGradients(
        dt=linear_product(by_delta.mT, weight.t()),
        B=by_B[:, 0],
        C=by_C[:, 0],
        weight=linear_product(by_delta.transpose(0, 1).flatten(1), dt.t()),
        bias=by_bias,
        A=by_A,
        D=by_D,
    )


def _forward_in_turn(scans: Sequence[Scan], out: Tensor, saved: Tensor | None) -> None:
    """Scans of several states, each adding to the sum of those before it."""
    total = sum_for(out)
    forward = kernels_for(scans[0].A.shape[1]).forward
    order = turns(scans)
    for k in order:
        forward(
            *(scans[k], out if k == order[-1] else total),
            saved=None if saved is None else saved[k],
            add=None if k == order[0] else total,
        )


def _scans(
    inputs: KernelInputs, orders: KernelOrders, low_rank: bool
) -> Iterator[tuple[Scan, OrderInputs]]:
    """Of every order the inputs of its scan."""
    width = inputs.x.shape[2]
    for k, own in enumerate(split_orders(*inputs)):
        scan_inputs = Scan(
            u=own.u,
            A=own.A,
            B=own.B,
            C=own.C,
            D=own.D,
            bias=own.bias,
            width=width,
            route=orders.route(k),
            order=orders.row(k),
        )
        if low_rank:
            scan_inputs.dt_low_rank, scan_inputs.dt_weight = own.dt.mT, own.weight
        else:
            scan_inputs.delta = linear_product(own.dt.float(), own.weight).mT
        yield scan_inputs, own
