"""SS2D's core by Triton kernels: one scan after the other, in the image's order.

The kernels of the selective scan read the map and the projections along a scan
order, by index arithmetic or by a table, and add to the merged map, so there is
never an array with all scans, forward or backward. Scans follow one another on the
device, and each writes every place once: the same inputs give the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import Result
from mmvssm.ops.scan_orders import KernelOrders
from mmvssm.ops.selective_scan.triton_backend import scan_backward, scan_forward
from mmvssm.ops.selective_scan.triton_plan import (
    Inputs,
    Plan,
    low_rank_gradients,
    low_rank_steps,
    saved_states_shape,
)
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


class TritonSs2d(FusedSs2d):
    """The scans of the selective scan's kernels, each adding to the merged map."""

    supplier = backends.TRITON
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def states_shape(
        self, batch: int, positions: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Of the states before each chunk but the first."""
        return saved_states_shape(batch, positions, states, channels)

    def forward(self, inputs: Ss2dInputs, options: Ss2dOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.ss2d_scan`."""
        orders = walked_orders(inputs, options)
        read = KernelInputs.of(inputs, options, self.dtypes)
        states = self.states_like(inputs, orders) if keep else None
        written = (
            options.out_dtype if options.out_dtype in self.dtypes else torch.float32
        )
        out = torch.empty_like(read.x, dtype=written)
        sums = _running_sum(out, orders)
        for k, (plan, scan, _) in enumerate(_scans(read, orders, backward=False)):
            added = None if k == 0 else sums[k - 1]
            kept = None if states is None else states[k]
            scan_forward(plan, scan, sums[k], added=added, saved=kept)
        saved = () if states is None else (read.kept(options), states)
        return Result((out.permute(0, 3, 1, 2).to(options.out_dtype),), saved)

    def backward(
        self,
        inputs: Ss2dInputs,
        options: Ss2dOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: Ss2dInputs,
    ) -> Ss2dInputs:
        """All gradients, one scan after the other."""
        orders = walked_orders(inputs, options)
        read = KernelInputs.of(inputs, options, self.dtypes, projected=saved[0])
        grad_out = sequence(sole(grads).permute(0, 2, 3, 1))
        x = read.x
        grad_x = torch.empty_like(x)
        sums = _running_sum(grad_x, orders)
        found = []
        for k, (plan, scan, own) in enumerate(_scans(read, orders, backward=True)):
            dt, weight = own.dt, own.weight
            by_scan = scan_backward(
                *(plan, scan, saved[1][k], grad_out),
                grad_u=sums[k],
                grad_delta=x.new_empty(dt.shape[:2] + x.shape[3:], dtype=dt.dtype).mT,
                added=None if k == 0 else sums[k - 1],
            )
            by_D, by_bias = by_scan.D, by_scan.delta_bias
            assert by_D is not None and by_bias is not None, 'SS2D has both'
            by_dt, by_weight = low_rank_gradients(by_scan.delta, dt, weight)
            found.append(
                OrderGradients(
                    dt=by_dt,
                    B=by_scan.B[:, 0].mT,
                    C=by_scan.C[:, 0].mT,
                    weight=by_weight,
                    bias=by_bias,
                    A=by_scan.A,
                    D=by_D,
                )
            )
        rest = join_gradients(read.projected, found)
        return gradients_of(inputs, options, grad_x, *rest)


def _scans(
    inputs: KernelInputs, orders: KernelOrders, backward: bool
) -> Iterator[tuple[Plan, Inputs, OrderInputs]]:
    """Of every order the plan and the inputs of its scan."""
    height, states = inputs.x.shape[1], inputs.A.shape[1]
    for k, own in enumerate(split_orders(*inputs)):
        delta, weight = low_rank_steps(own.dt, own.weight, states)
        scan = Inputs(
            u=own.u,
            delta=delta,
            A=own.A,
            B=own.B,
            C=own.C,
            D=own.D,
            delta_bias=own.bias,
            delta_weight=weight,
        )
        plan = Plan.of(
            *(scan, True),
            backward=backward,
            height=height,
            route=orders.route(k),
            table=orders.row(k),
        )
        yield plan, scan, own


def _running_sum(out: Tensor, orders: KernelOrders) -> list[Tensor]:
    """Where each scan leaves the sum so far: in float32, and then in ``out``."""
    sums = out
    if out.dtype != torch.float32:
        sums = torch.empty_like(out, dtype=torch.float32)
    return [sequence(sums)] * (len(orders.routes) - 1) + [sequence(out)]
