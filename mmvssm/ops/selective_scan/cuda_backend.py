"""The selective scan by own CUDA kernels, forward and backward.

The states before every chunk of positions are kept for the backward pass, which
recomputes the rest; where batch and channels alone would leave most of a GPU idle,
the sequence is cut into stretches that run side by side; sums are made of parts
that are added in a fixed order, so the same inputs give the same bits. See
``mmvssm/ops/cuda/`` for the kernels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.cuda import library
from mmvssm.ops.cuda.library import CHUNK, ScanProblem
from mmvssm.ops.kernel_args import Array, parameter, pointer, readable
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions, outputs_like

# A sequence is cut until there are so many blocks, if that leaves each stretch
# so many positions.
_BLOCKS = 512
_SHORTEST_STRETCH = 128


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int]:
    """Shape of what forward keeps: the state before each chunk but the first."""
    return (-(-length // CHUNK) - 1, batch, channels, states)


@dataclass
class Scan:
    """Inputs of a scan of a map along one order.

    Attributes:
        u: (B, D, L), in the order of the image.
        A: (D, N).
        B, C: (B, G, N, L).
        delta: (B, D, L), or None with features.
        D, bias: (D,) or None.
        z: (B, D, L) or None.
        features: (B, R, L), low-rank steps, or None with delta.
        weight: Of the features (D, R).
        softplus: Whether steps go through softplus.
        width: Of the map, the length for a plain sequence.
        route: The order of the positions, see ``problem.h``.
        table: int32 (length,), contiguous: the order in place of a route, or None.
    """

    u: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    delta: Tensor | None = None
    D: Tensor | None = None
    z: Tensor | None = None
    bias: Tensor | None = None
    features: Tensor | None = None
    weight: Tensor | None = None
    softplus: bool = True
    width: int = 0
    route: int = 0
    table: Tensor | None = None
    _kept: list[Tensor] = field(default_factory=list)

    def problem(self, function: str) -> ScanProblem:
        """What the kernels are told of the inputs.

        Raises:
            ValueError: There are more positions, channels or batch elements than
                the kernels can count.
        """
        batch, channels, places = self.u.shape
        length = places if self.table is None else len(self.table)
        groups, states = self.B.shape[1:3]
        sizes = dict(batch=batch, channels=channels, length=length)
        for name, size in sizes.items():
            if size >= 2**31:
                raise ValueError(f"{name} is {size}; the backend 'cuda' counts to 2^31")
        group_size = channels // groups
        tile = library.tile(function, states, group_size)
        blocks = batch * groups * -(-group_size // tile)
        stretches = max(1, min(-(-_BLOCKS // blocks), length // _SHORTEST_STRETCH))
        stretch_length = -(-length // (stretches * CHUNK)) * CHUNK
        problem = ScanProblem(
            device=self.u.device.index or 0,
            **dict(batch=batch, groups=groups, group_size=group_size, length=length),
            **dict(places=places, width=self.width or places),
            route=self.route,
            states=states,
            rank=0 if self.weight is None else self.weight.shape[1],
            stretches=-(-length // stretch_length),
            stretch_length=stretch_length,
            softplus=self.softplus,
            tile=tile,
        )
        for name in ('u', 'delta', 'z', 'features', 'B', 'C'):
            setattr(problem, name, self._array(getattr(self, name)))
        for name in ('weight', 'A', 'D', 'bias'):
            setattr(problem, name, self._pointer(parameter(getattr(self, name))))
        problem.table = self._pointer(self.table)
        if problem.stretches > 1:
            problem.edges = self._pointer(self.of_stretches(problem, states))
            problem.steps = self._pointer(self.of_stretches(problem))
        return problem

    def of_stretches(self, problem: ScanProblem, *states: int) -> Tensor:
        """Memory for numbers of every stretch and channel, (stretches, B, D)."""
        shape = (problem.stretches, *self.u.shape[:2], *states)
        return self.u.new_empty(shape, dtype=torch.float32)

    def keep(self, x: Tensor | None) -> Tensor | None:
        """The tensor, which lives on until the kernels are on their stream."""
        if x is not None:
            self._kept.append(x)
        return x

    def _pointer(self, x: Tensor | None) -> int | None:
        return pointer(self.keep(x))

    def _array(self, x: Tensor | None) -> Array:
        # The kernels multiply positions by strides in bytes of 32 bits.
        if x is not None and x.stride(-1) * x.element_size() >= 2**31:
            x = x.contiguous()
        return Array.of(self.keep(x))


def scan_forward(
    scan: Scan,
    out: Tensor,
    last_state: Tensor | None = None,
    saved: Tensor | None = None,
    add: bool = False,
) -> None:
    """Put the kernels of the forward pass onto the stream.

    Args:
        scan: The inputs.
        out: (B, D, L), to be written.
        last_state: (B, D, N), to be written unless None.
        saved: See :func:`saved_states_shape`, to be written unless None.
        add: Add to what is in ``out``.
    """
    problem = scan.problem('scan_forward')
    problem.out = Array.of(out)
    problem.last_state, problem.saved = pointer(last_state), pointer(saved)
    problem.add = add
    library.call('scan_forward', problem, on=out)


def scan_backward(
    scan: Scan,
    saved: Tensor,
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor | None],
    add: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Put the kernels of the backward pass onto the stream.

    Args:
        scan: The inputs, with ``delta``.
        saved: What the forward pass kept.
        grad_out: (B, D, L).
        grad_last_state: (B, D, N), None for zero.
        rows: Gradients of u, delta and z (B, D, L), to be written.
        add: Add to what is in the gradient of u.

    Returns:
        Gradients of A (D, N), B and C (B, G, L, N), D and bias (D,).
    """
    problem = scan.problem('scan_backward')
    batch, _, places = scan.u.shape
    groups, states = scan.B.shape[1:3]
    tiles = -(-problem.group_size // problem.tile)
    grad_B, grad_C = (
        grad_out.new_empty((tiles, batch, groups, places, states), dtype=torch.float32)
        for _ in 'BC'
    )
    grad_A = scan.of_stretches(problem, states)
    grad_D, grad_bias = (
        None if x is None else scan.of_stretches(problem) for x in (scan.D, scan.bias)
    )
    grad_last_state = parameter(grad_last_state)
    problem.saved, problem.grad_last_state = pointer(saved), pointer(grad_last_state)
    problem.grad_out = Array.of(grad_out)
    names = ('grad_u', 'grad_delta', 'grad_z')
    for name, x in zip(names, rows):
        setattr(problem, name, Array.of(x))
    sums = dict(A=grad_A, B=grad_B, C=grad_C, D=grad_D, bias=grad_bias)
    for name, x in sums.items():
        setattr(problem, f'grad_{name}', pointer(x))
    problem.add = add
    library.call('scan_backward', problem, on=grad_out)
    by_D, by_bias = (None if x is None else x.sum((0, 1)) for x in (grad_D, grad_bias))
    return grad_A.sum((0, 1)), grad_B.sum(0), grad_C.sum(0), by_D, by_bias


class CudaScan(KernelBackend):
    """Stretches side by side, in each the positions one after the other."""

    supplier = backends.CUDA

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        out, last_state = outputs_like(inputs, options)
        saved = self.saved_like(inputs, options) if keep else ()
        states = saved[0] if keep else None
        scan_forward(_scan(inputs, options), out, last_state, states)
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
        grad_out, grad_last_state = readable(grads[0], Array), grads[1]
        if grad_out is None:
            grad_out = inputs.u.new_zeros(()).expand_as(inputs.u)
        scan = _scan(inputs, options)
        assert scan.delta is not None, 'steps of low rank are not for this op'
        by_u, by_delta = torch.empty_like(scan.u), torch.empty_like(scan.delta)
        by_z = None if scan.z is None else torch.empty_like(scan.z)
        by_A, by_B, by_C, by_D, by_bias = scan_backward(
            scan, saved[0], grad_out, grad_last_state, (by_u, by_delta, by_z)
        )
        return ScanInputs(
            u=by_u,
            delta=by_delta,
            A=by_A,
            B=by_B.mT,
            C=by_C.mT,
            D=by_D,
            z=by_z,
            delta_bias=by_bias,
        )


def _scan(inputs: ScanInputs, options: ScanOptions) -> Scan:
    return Scan(
        u=inputs.u,
        A=inputs.A,
        B=readable(inputs.B, Array),
        C=readable(inputs.C, Array),
        delta=readable(inputs.delta, Array),
        D=inputs.D,
        z=readable(inputs.z, Array),
        bias=inputs.delta_bias,
        softplus=options.delta_softplus,
    )
