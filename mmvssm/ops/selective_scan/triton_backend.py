"""The selective scan by Triton kernels, forward and backward.

Only the states before every chunk of positions are kept for the backward pass,
which recomputes the rest. Where batch and channels alone would leave most of a
GPU idle, the sequence is cut into stretches that run side by side: what each
one makes of a zero state and how much it forgets give the states that they
really start from. Sums over channels, stretches and the batch are made of
parts that are added in a fixed order, so the same inputs give the same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmvssm.ops import checks
from mmvssm.ops.triton import runtime

# Positions from one kept state to the next.
_CHUNK = 16
# Positions whose states the backward kernel has in registers at once. With more
# of them it would spill on sm_90 (tests/ops/test_triton.py).
_PART = 4
# A sequence is cut until there are so many programs, if that leaves each
# stretch so many positions.
_PROGRAMS = 1024
_SHORTEST_STRETCH = 256


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int]:
    """Shape of what forward keeps: the state before each chunk but the first."""
    return (-(-length // _CHUNK) - 1, batch, channels, states)


def _array(x: Tensor | None) -> tuple | None:
    """A tensor as the kernels take it, with its strides."""
    return None if x is None else (x, *x.stride())


@dataclass(frozen=True)
class Plan:
    """How the work of one call is divided.

    Attributes:
        sizes: Batch, groups, channels of a group, tiles of them, stretches.
        length: Positions.
        stretch_length: Positions of a stretch, a multiple of the chunk.
        states: States of a channel.
        tile: Channels of a program.
        softplus: Whether steps go through softplus.
        height: Rows of the map that the sequence is, 1 if it is none.
        route: The order of its positions, see ``triton_kernels.py``.
    """

    sizes: tuple[int, int, int, int, int]
    length: int
    stretch_length: int
    states: int
    tile: int
    softplus: bool
    height: int = 1
    route: int = 0

    @classmethod
    def of(
        cls,
        u: Tensor,
        B: Tensor,
        softplus: bool,
        height: int = 1,
        route: int = 0,
    ) -> 'Plan':
        """The plan for u (B, D, L) and B (B, G, N, L)."""
        batch, channels, length = u.shape
        groups, states = B.shape[1:3]
        group_size = channels // groups
        tile = _tile(states, group_size)
        tiles = -(-group_size // tile)
        wanted = -(-_PROGRAMS // (batch * groups * tiles))
        stretches = max(1, min(wanted, length // _SHORTEST_STRETCH))
        stretch_length = -(-length // (stretches * _CHUNK)) * _CHUNK
        stretches = -(-length // stretch_length)
        sizes = (batch, groups, group_size, tiles, stretches)
        return cls(sizes, length, stretch_length, states, tile, softplus, height, route)

    @property
    def stretches(self) -> int:
        return self.sizes[-1]

    @property
    def channels(self) -> int:
        return self.sizes[1] * self.sizes[2]

    def grid(self) -> tuple[int]:
        batch, groups, _, tiles, stretches = self.sizes
        return (batch * groups * tiles * stretches,)

    def state_block(self) -> dict[str, int]:
        """Constants of every kernel."""
        block = _power_of_two(self.states)
        return dict(
            STATES=self.states,
            BLOCK_N=block,
            BLOCK_D=self.tile,
            num_warps=max(1, block * self.tile // 256),
        )

    def constants(self) -> dict[str, int]:
        """Constants of the kernels that walk along the sequence."""
        return dict(
            **self.state_block(),
            CHUNK=_CHUNK,
            SOFTPLUS=self.softplus,
            ROUTE=self.route,
        )

    def positions(self) -> tuple:
        return self.sizes, self.length, self.stretch_length, self.height

    def new_states(self, like: Tensor) -> Tensor:
        """Memory for a state of every stretch, (stretches, B, D, N)."""
        shape = (self.stretches, self.sizes[0], self.channels, self.states)
        return like.new_empty(shape, dtype=torch.float32)

    def new_totals(self, like: Tensor) -> Tensor:
        """Memory for a number of every stretch and channel, (stretches, B, D)."""
        shape = (self.stretches, self.sizes[0], self.channels)
        return like.new_empty(shape, dtype=torch.float32)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _tile(states: int, group_size: int) -> int:
    """Channels of a program: so many that a warp is full and registers suffice."""
    full = 64 if states == 1 else max(4, 256 // _power_of_two(states))
    return min(full, _power_of_two(group_size))


def _join(plan: Plan, A: Tensor, ends: Tensor, steps: Tensor, first, reverse: bool):
    """Replace what the stretches end with by what they start from."""
    from mmvssm.ops.selective_scan import triton_kernels

    grid = (plan.grid()[0] // plan.stretches,)
    triton_kernels.join_kernel[grid](
        _array(A), ends, steps, first, plan.sizes, REVERSE=reverse, **plan.state_block()
    )


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L).

    Returns:
        The output (B, D, L) with u's strides, the last state (B, D, N), with
        ``keep_states`` the states before the chunks (chunks - 1, B, D, N), and
        whether there is NaN.
    """
    batch, channels, length = u.shape
    plan = Plan.of(u, B, delta_softplus)
    out = torch.empty_like(u, dtype=out_dtype)
    last_state = u.new_empty(batch, channels, plan.states, dtype=torch.float32)
    saved = None
    if keep_states:
        shape = saved_states_shape(batch, length, plan.states, channels)
        saved = u.new_empty(shape, dtype=torch.float32)
    scan_forward(plan, (u, delta, A, B, C, D, z, delta_bias), out, last_state, saved)
    return out, last_state, saved, checks.has_nan(out, last_state)


def scan_forward(
    plan: Plan,
    inputs: tuple[Tensor | None, ...],
    out: Tensor,
    last_state: Tensor | None,
    saved: Tensor | None,
    add: bool = False,
) -> None:
    """Run the kernels of the forward pass.

    Args:
        plan: Of these inputs.
        inputs: u, delta, A, B, C, D, z, delta_bias.
        out: (B, D, L), to be written.
        last_state: (B, D, N), to be written unless None.
        saved: See :func:`saved_states_shape`, to be written unless None.
        add: Add to what is in ``out``.
    """
    from mmvssm.ops.selective_scan import triton_kernels

    arrays = [_array(x) for x in inputs]
    starts = None
    with runtime.on_device_of(out):
        if plan.stretches > 1:
            starts, steps = plan.new_states(out), plan.new_totals(out)
            triton_kernels.forward_ends_kernel[plan.grid()](
                *(*arrays[:4], arrays[7], starts, steps),
                *plan.positions(),
                **plan.constants(),
            )
            _join(plan, inputs[2], starts, steps, None, reverse=False)
        triton_kernels.forward_kernel[plan.grid()](
            *(*arrays, _array(out), last_state, saved, starts),
            *plan.positions(),
            **plan.constants(),
            ADD=add,
        )


def backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias.

    Args:
        grad_out: Gradient of the output (B, D, L), None for zero.
        grad_last_state: Gradient of the last state (B, D, N), None for zero.
        saved: The third result of :func:`forward`.
    """
    plan = Plan.of(u, B, delta_softplus)
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if grad_out is None:
        grad_out = u.new_zeros(()).expand_as(u)
    rows = tuple(None if x is None else torch.empty_like(x) for x in (u, delta, z))
    sums = scan_backward(plan, inputs, saved, grad_out, grad_last_state, rows)
    grad_A, grad_B, grad_C, grad_D, grad_bias = sums
    found = (*rows[:2], grad_A, grad_B.mT, grad_C.mT, grad_D, rows[2], grad_bias)
    return tuple(
        None if x is None else _like(grad, x) for grad, x in zip(found, inputs)
    )


def scan_backward(
    plan: Plan,
    inputs: tuple[Tensor | None, ...],
    saved: Tensor,
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    rows: tuple[Tensor | None, ...],
    add: bool = False,
) -> tuple[Tensor | None, ...]:
    """Run the kernels of the backward pass.

    Args:
        plan: Of these inputs.
        inputs: u, delta, A, B, C, D, z, delta_bias.
        saved: What the forward pass kept.
        grad_out: (B, D, L).
        grad_last_state: (B, D, N), None for zero.
        rows: Gradients of u, delta and z (B, D, L), to be written.
        add: Add to what is in the gradient of u.

    Returns:
        Gradients of A (D, N), B and C (B, G, L, N), D and delta_bias (D,).
    """
    from mmvssm.ops.selective_scan import triton_kernels

    batch, groups, _, tiles, _ = plan.sizes
    shape = (tiles, batch, groups, plan.length, plan.states)
    grad_B, grad_C = (grad_out.new_empty(shape, dtype=torch.float32) for _ in 'BC')
    grad_A = plan.new_states(grad_out)
    grad_D, grad_bias = (
        None if x is None else plan.new_totals(grad_out) for x in (inputs[5], inputs[7])
    )
    with runtime.on_device_of(grad_out):
        carries = _carries(plan, inputs, grad_out, grad_last_state)
        triton_kernels.backward_kernel[plan.grid()](
            *(_array(x) for x in inputs),
            *(saved, _array(grad_out), carries),
            *(_array(x) for x in rows),
            *(grad_B, grad_C, grad_A, grad_D, grad_bias),
            *plan.positions(),
            **plan.constants(),
            PART=_PART,
            ADD=add,
        )
    stretched = (None if x is None else x.sum((0, 1)) for x in (grad_D, grad_bias))
    return grad_A.sum((0, 1)), grad_B.sum(0), grad_C.sum(0), *stretched


def _carries(
    plan: Plan,
    inputs: tuple[Tensor | None, ...],
    grad_out: Tensor,
    grad_last_state: Tensor | None,
) -> Tensor | None:
    """Gradients of the states after the stretches (stretches, B, D, N)."""
    from mmvssm.ops.selective_scan import triton_kernels

    u, delta, A, _, C, _, z, delta_bias = inputs
    if grad_last_state is not None:
        grad_last_state = grad_last_state.float().contiguous()
    if plan.stretches == 1:
        return grad_last_state
    carries, steps = plan.new_states(u), plan.new_totals(u)
    triton_kernels.backward_ends_kernel[plan.grid()](
        *(_array(x) for x in (delta, A, C, z, delta_bias, grad_out)),
        *(carries, steps),
        *plan.positions(),
        **plan.constants(),
    )
    _join(plan, A, carries, steps, grad_last_state, reverse=True)
    return carries


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient with x's dtype and strides."""
    if grad.dtype == x.dtype and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad)
