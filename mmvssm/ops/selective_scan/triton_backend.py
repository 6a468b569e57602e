"""The selective scan by Triton kernels, forward and backward.

Only the states before every chunk of positions are kept for the backward pass,
which recomputes the rest. Where batch and channels alone would leave most of a
GPU idle, the sequence is cut into stretches that run side by side: what each
one makes of a zero state and how much it forgets give the states that they
really start from. Sums over channels, stretches and the batch are made of
parts that are added in a fixed order, so the same inputs give the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions, outputs_like
from mmvssm.ops.selective_scan.triton_plan import Inputs, Plan, saved_states_shape
from mmvssm.ops.triton import runtime
from mmvssm.ops.triton.arrays import array


class TritonScan(KernelBackend):
    """Stretches side by side, in each the positions one after the other."""

    supplier = backends.TRITON

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        out, last_state = outputs_like(inputs, options)
        saved = self.saved_like(inputs, options) if keep else ()
        scan = Inputs(*inputs)
        plan = Plan.of(scan, options.delta_softplus)
        states = saved[0] if keep else None
        scan_forward(plan, scan, out, last_state=last_state, saved=states)
        return Result((out, last_state), saved)

    def saved_like(
        self, inputs: ScanInputs, options: ScanOptions
    ) -> tuple[Tensor, ...]:
        """The state before each chunk but the first, (chunks - 1, B, D, N)."""
        batch, channels, length = inputs.u.shape
        shape = saved_states_shape(batch, length, inputs.A.shape[1], channels)
        return (inputs.u.new_empty(shape, dtype=torch.float32),)

    def backward(
        self,
        inputs: ScanInputs,
        options: ScanOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: ScanInputs,
    ) -> ScanInputs:
        """All gradients, stretch by stretch from the last chunk to the first."""
        u, z = inputs.u, inputs.z
        grad_out, grad_last_state = grads
        if grad_out is None:
            grad_out = u.new_zeros(()).expand_as(u)
        scan = Inputs(*inputs)
        plan = Plan.of(scan, options.delta_softplus, backward=True)
        found = scan_backward(
            *(plan, scan, saved[0], grad_out),
            grad_u=torch.empty_like(u),
            grad_delta=torch.empty_like(inputs.delta),
            grad_z=None if z is None else torch.empty_like(z),
            grad_last_state=grad_last_state,
        )
        return ScanInputs._make(found[: len(inputs)])


def scan_forward(
    plan: Plan,
    inputs: Inputs,
    out: Tensor,
    *,
    added: Tensor | None = None,
    total: Tensor | None = None,
    last_state: Tensor | None = None,
    saved: Tensor | None = None,
) -> None:
    """Run the kernels of the forward pass.

    Args:
        plan: Of these inputs.
        inputs: Of the scan.
        out: (B, D, L), to be written.
        added: (B, D, L) to be added to the scan, before the gate.
        total: (B, D, L), to be written unless None: that sum.
        last_state: (B, D, N), to be written unless None.
        saved: See :func:`saved_states_shape`, to be written unless None.
    """
    from mmvssm.ops.selective_scan import triton_kernels

    arrays, grid, starts = inputs.arrays(), plan.grid(), None
    with runtime.on_device_of(out):
        if plan.work.stretches > 1:
            starts, steps = plan.new_states(out), plan.new_totals(out)
            triton_kernels.forward_ends_kernel[grid](
                inputs=arrays,
                work=plan.work,
                ends=starts,
                steps=steps,
                **plan.constants(),
            )
            _join(plan, arrays, starts, steps, None, reverse=False)
        triton_kernels.forward_kernel[grid](
            inputs=arrays,
            work=plan.work,
            out=array(out),
            added=array(added),
            total=array(total),
            last_state=last_state,
            saved=saved,
            starts=starts,
            **plan.constants(),
            SCALE=plan.scale,
        )


def scan_backward(
    plan: Plan,
    inputs: Inputs,
    saved: Tensor,
    grad_out: Tensor,
    *,
    grad_u: Tensor,
    grad_delta: Tensor,
    grad_z: Tensor | None = None,
    added: Tensor | None = None,
    total: Tensor | None = None,
    grad_last_state: Tensor | None = None,
) -> Inputs:
    """Run the kernels of the backward pass.

    Args:
        plan: Of these inputs.
        inputs: Of the scan.
        saved: What the forward pass kept.
        grad_out: (B, D, L).
        grad_u, grad_delta: (B, D, L), to be written.
        grad_z: (B, D, L), to be written unless None.
        added: (B, D, L) to be added to the gradient of u.
        total: What the forward pass wrote there, None if nothing was added.
        grad_last_state: (B, D, N), None for zero.

    Returns:
        The gradients, that of ``delta`` always of the steps themselves; that
        of ``delta_weight`` is left out.
    """
    from mmvssm.ops.selective_scan import triton_kernels

    work = plan.work
    places = work.height * work.width
    shape = (work.tiles, work.batch, work.groups, places, plan.states)
    grads = Inputs(
        u=grad_u,
        delta=grad_delta,
        A=plan.new_states(grad_out),
        B=grad_out.new_empty(shape, dtype=torch.float32),
        C=grad_out.new_empty(shape, dtype=torch.float32),
        D=None if inputs.D is None else plan.new_totals(grad_out),
        z=grad_z,
        delta_bias=None if inputs.delta_bias is None else plan.new_totals(grad_out),
    )
    rows: dict[str, Any] = {
        name: array(getattr(grads, name)) for name in ('u', 'delta', 'z')
    }
    arrays = inputs.arrays()
    with runtime.on_device_of(grad_out):
        triton_kernels.backward_kernel[plan.grid()](
            inputs=arrays,
            work=work,
            saved=saved,
            grad_out=array(grad_out),
            carries=_carries(plan, arrays, grad_out, grad_last_state),
            added=array(added),
            total=array(total),
            grads=grads._replace(**rows),
            **plan.constants(),
            SCALE=plan.scale,
            PART=plan.tile.part,
        )
    return grads._replace(
        A=grads.A.sum((0, 1)),
        B=grads.B.sum(0).mT,
        C=grads.C.sum(0).mT,
        D=None if grads.D is None else grads.D.sum((0, 1)),
        delta_bias=None if grads.delta_bias is None else grads.delta_bias.sum((0, 1)),
    )


def _carries(
    plan: Plan, arrays: Inputs, grad_out: Tensor, grad_last_state: Tensor | None
) -> Tensor | None:
    """Gradients of the states after the stretches (stretches, B, D, N)."""
    from mmvssm.ops.selective_scan import triton_kernels

    if grad_last_state is not None:
        grad_last_state = grad_last_state.float().contiguous()
    if plan.work.stretches == 1:
        return grad_last_state
    carries, steps = plan.new_states(grad_out), plan.new_totals(grad_out)
    triton_kernels.backward_ends_kernel[plan.grid()](
        inputs=arrays,
        work=plan.work,
        grad_out=array(grad_out),
        ends=carries,
        steps=steps,
        **plan.constants(),
        SCALE=plan.scale,
    )
    _join(plan, arrays, carries, steps, grad_last_state, reverse=True)
    return carries


def _join(
    plan: Plan,
    arrays: Inputs,
    ends: Tensor,
    steps: Tensor,
    start: Tensor | None,
    reverse: bool,
) -> None:
    """Replace what the stretches end with by what they start from."""
    from mmvssm.ops.selective_scan import triton_kernels

    grid = (plan.grid()[0] // plan.work.stretches,)
    triton_kernels.join_kernel[grid](
        inputs=arrays,
        work=plan.work._replace(stretches=1),
        stretches=plan.work.stretches,
        ends=ends,
        steps=steps,
        start=start,
        **plan.state_block(),
        REVERSE=reverse,
    )
