"""The selective scan in plain tensor code, forward and backward.

The sequence is cut into chunks; the state is carried from one to the next. Within a
chunk the recurrence

    h_t = a_t h_{t-1} + b_t,   a_t = exp(Δ_t A),   b_t = Δ_t B_t u_t

is solved for many short pieces at the same time, in three steps. First every piece is
solved from a zero state, which gives its end state and its total decay. Then the start
states of the pieces follow by the same recurrence over fewer positions. Then every
piece is solved again from its true start state. Nothing is divided by a decay, so no A
and no Δ can cause an overflow (in the form with ``cumsum`` and ``exp(-cumsum)`` they
can). Only the states at the starts of the chunks are kept for the backward pass, which
computes the others again.

The length of a chunk depends on the type of device. On a CPU the work arrays of a chunk
stay in the cache. On other devices there are few chunks, because every call is a kernel
launch (``benchmarks/launches.py`` counts them).

All arrays are channels-last, (batch, position, state, channel). No reduction runs over
an axis whose order depends on the number of threads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmvssm.ops import backends, deterministic_math
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions, outputs_like

# Positions of a piece. Two or three would need the fewest calls, but then the arrays of
# end states and decays would be as large as those of the chunk.
_PIECE = 8


@dataclass(frozen=True)
class Sizes:
    """How the work is divided on a type of device.

    Attributes:
        work: The most elements of one work array of a chunk.
        quarters: A work array may always have this many quarters of u's elements.
        beside: The work arrays without states count as this many states.
        positions: The fewest positions of a chunk.
        step: Elements that one step of the recurrence should have to be worth its
            call. If two positions have more, the chunk is not divided into pieces.
    """

    work: int
    quarters: int
    beside: int
    positions: int
    step: int

    def chunk_length(self, batch: int, length: int, states: int, channels: int) -> int:
        """Positions of one chunk."""
        work = max(self.work, self.quarters * batch * channels * length // 4)
        position = batch * channels * (states + self.beside)
        return min(length, max(self.positions, work // position))


# The few arrays of a chunk stay in the cache.
_CPU = Sizes(work=2**18, quarters=0, beside=0, positions=16, step=2**15)
# About four work arrays with states and eight without are alive at once, 0.4 GB in
# float32; with one state at most a quarter of the sequence is a chunk. From a step of
# 2**18 elements on, memory takes longer than the launch.
_OTHERS = Sizes(work=3 * 2**23, quarters=3, beside=2, positions=1, step=2**19)


def sizes(device_type: str) -> Sizes:
    """How the work is divided on ``'cpu'``, ``'cuda'`` ..."""
    return _CPU if device_type == 'cpu' else _OTHERS


def _linear_scan_(
    a: Tensor, b: Tensor, h: Tensor, step: int, reverse: bool = False
) -> None:
    """Solve h_t = a_t h_{t-1} + b_t in place of ``b``.

    Args:
        a: Decays (B, S, R), any strides.
        b: Inputs (B, S, R); holds the states afterwards.
        h: State before the first position, (B, R).
        step: See :class:`Sizes`.
        reverse: Run from the last position to the first.
    """
    length = b.shape[1]
    pieces, rest = divmod(length, _PIECE)
    # Every piece is solved twice, so a few pieces save no calls.
    if pieces < 4 or 2 * h.numel() > step:
        _run_steps(_steps(a, reverse), _steps(b, reverse), h)
        return
    # Positions that do not fill a piece come last in the direction of the scan.
    main = slice(rest, None) if reverse else slice(0, length - rest)
    a_steps, b_steps = (
        _steps(x[:, main].unflatten(1, (pieces, _PIECE)), reverse, dim=2)
        for x in (a, b)
    )

    # States at the starts of the pieces, and after the last one.
    states = b.new_empty(b.shape[0], pieces + 1, b.shape[2])
    ends, starts = states[:, 1:], states[:, :-1]
    if reverse:
        ends, starts = starts, ends
    first, *_, last = _steps(states, reverse)
    first.copy_(h)
    torch.addcmul(b_steps[1], a_steps[1], b_steps[0], out=ends)
    decays = a_steps[0] * a_steps[1]
    for a_t, b_t in zip(a_steps[2:], b_steps[2:]):
        torch.addcmul(b_t, a_t, ends, out=ends)
        decays.mul_(a_t)
    # If growth factors overflow, a zero state must not become NaN.
    decays.clamp_(max=torch.finfo(decays.dtype).max)
    _linear_scan_(decays, ends, first, step, reverse)
    _run_steps(a_steps, b_steps, starts)
    if rest:
        tail = slice(0, rest) if reverse else slice(length - rest, None)
        _run_steps(_steps(a[:, tail], reverse), _steps(b[:, tail], reverse), last)


def _steps(x: Tensor, reverse: bool, dim: int = 1) -> list[Tensor]:
    views = x.unbind(dim)
    return list(reversed(views)) if reverse else list(views)


def _run_steps(a_steps: list[Tensor], b_steps: list[Tensor], h: Tensor) -> None:
    for a_t, b_t in zip(a_steps, b_steps):
        torch.addcmul(b_t, a_t, h, out=b_t)
        h = b_t


def _sum_states(x: Tensor) -> Tensor:
    """(B, S, N, D) summed over N. ``x`` may be overwritten."""
    return x.squeeze(2) if x.shape[2] == 1 else x.sum(2)


@dataclass
class _Chunk:
    """Parts of the inputs, channels-last: S positions, in the working dtype."""

    u: Tensor  # (B, S, D)
    dt: Tensor  # (B, S, D)
    B: Tensor  # (B, S, N, G, 1)
    C: Tensor  # (B, S, N, G, 1)
    a: Tensor  # (B, S, N, D)
    z: Tensor | None  # (B, S, D)
    step: int  # see Sizes

    def grouped(self, x: Tensor) -> Tensor:
        """(..., D) seen as (..., G, D / G)."""
        found: Tensor = x.unflatten(-1, (self.B.shape[3], -1))
        return found

    def states(self, h: Tensor) -> Tensor:
        """States (B, S + 1, N, D); the first one is ``h`` (B, N, D)."""
        batch, length, channels = self.u.shape
        states = self.u.new_empty(batch, length + 1, self.B.shape[2], channels)
        states[:, 0] = h
        torch.mul(
            self.grouped(self.dt * self.u).unsqueeze(2),
            self.B,
            out=self.grouped(states[:, 1:]),
        )
        flat = states.flatten(2)
        _linear_scan_(self.a.flatten(2), flat[:, 1:], flat[:, 0], self.step)
        return states

    def scan_back_(self, grad_h: Tensor, carry: Tensor) -> Tensor:
        """Complete the gradients of the states in place.

        Args:
            grad_h: (B, S, N, D), at first the gradients by the outputs only.
            carry: Gradient of the last state from all later positions, (B, N, D).

        Returns:
            The carry for the chunk before.
        """
        grad_h[:, -1] += carry
        flat = grad_h.flatten(2)
        decays = self.a[:, 1:].flatten(2)
        _linear_scan_(decays, flat[:, :-1], flat[:, -1], self.step, reverse=True)
        return self.a[:, 0] * grad_h[:, 0]

    def readout(self, states: Tensor, D: Tensor | None) -> Tensor:
        """C·h + D u, (B, S, D)."""
        products = self.grouped(states[:, 1:]) * self.C
        y = _sum_states(products.flatten(-2))
        return y if D is None else y.addcmul_(self.u, D)


class _Sequence:
    """The inputs of one call, seen channels-last and cut into chunks."""

    def __init__(self, inputs: ScanInputs, options: ScanOptions) -> None:
        u, delta, A, B, C, D, z, delta_bias = inputs
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.u, self.delta = u.transpose(1, 2), delta.transpose(1, 2)
        self.z = None if z is None else z.transpose(1, 2)
        self.B, self.C = B.permute(0, 3, 2, 1), C.permute(0, 3, 2, 1)
        self.A = A.to(self.dtype).T.contiguous()  # (N, D)
        self.D = None if D is None else D.to(self.dtype)
        self.bias = None if delta_bias is None else delta_bias.to(self.dtype)
        self.softplus = options.delta_softplus
        self.batch, self.length, self.channels = self.u.shape
        self.states = A.shape[1]
        self.sizes = sizes(u.device.type)

    def bounds(self) -> list[tuple[int, int]]:
        """First position of each chunk, and the one after its last."""
        size = self.sizes.chunk_length(
            self.batch, self.length, self.states, self.channels
        )
        return [(s, min(s + size, self.length)) for s in range(0, self.length, size)]

    def zero_state(self) -> Tensor:
        return self.u.new_zeros(
            self.batch, self.states, self.channels, dtype=self.dtype
        )

    def chunk(self, start: int, stop: int) -> _Chunk:
        dt = self.load(self.delta, start, stop)
        if self.bias is not None:
            dt = dt + self.bias
        if self.softplus:
            dt = deterministic_math.softplus(dt)
        return _Chunk(
            u=self.load(self.u, start, stop),
            dt=dt,
            B=self.load(self.B, start, stop).unsqueeze(-1),
            C=self.load(self.C, start, stop).unsqueeze(-1),
            a=(dt.unsqueeze(2) * self.A).exp_(),
            z=None if self.z is None else self.load(self.z, start, stop),
            step=self.sizes.step,
        )

    def load(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Some positions, contiguous in the working dtype."""
        return x[:, start:stop].to(self.dtype).contiguous()


class TorchScan(KernelBackend):
    """A few long chunks, or many that fit a cache; each has many pieces."""

    def __init__(self, supplier: backends.Supplier):
        self.supplier = supplier

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        sequence = _Sequence(inputs, options)
        out, last_state = outputs_like(inputs, options)
        saved = self.saved_like(inputs, options) if keep else ()
        h = sequence.zero_state()
        for index, (start, stop) in enumerate(sequence.bounds()):
            if index and keep:
                saved[0][index - 1] = h
            y, h = _chunk_outputs(sequence, start, stop, h)
            out.transpose(1, 2)[:, start:stop] = y
        last_state.copy_(h.transpose(1, 2))
        return Result((out, last_state), saved)

    def saved_like(
        self, inputs: ScanInputs, options: ScanOptions
    ) -> tuple[Tensor, ...]:
        """The start state of each chunk but the first, (chunks - 1, B, N, D)."""
        batch, channels, length = inputs.u.shape
        states = inputs.A.shape[1]
        divided = sizes(inputs.u.device.type)
        size = divided.chunk_length(batch, length, states, channels)
        shape = (-(-length // size) - 1, batch, states, channels)
        dtype = torch.promote_types(inputs.u.dtype, torch.float32)
        return (inputs.u.new_empty(shape, dtype=dtype),)

    def backward(
        self,
        inputs: ScanInputs,
        options: ScanOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: ScanInputs,
    ) -> ScanInputs:
        """All gradients, from the last chunk to the first."""
        grad_out, grad_last_state = grads
        sequence = _Sequence(inputs, options)
        gradients = _Gradients(sequence, inputs)
        carry = sequence.zero_state()
        if grad_last_state is not None:
            carry += grad_last_state.transpose(1, 2)
        if grad_out is None:
            grad_out = torch.zeros_like(inputs.u)
        grad_out = grad_out.transpose(1, 2)
        for index, (start, stop) in reversed(list(enumerate(sequence.bounds()))):
            h = saved[0][index - 1] if index else sequence.zero_state()
            carry = gradients.add_chunk(start, stop, h, carry, grad_out)
        return gradients.result()


def _chunk_outputs(
    sequence: _Sequence, start: int, stop: int, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (B, S, D) of a chunk, from the state before it; and its last state."""
    chunk = sequence.chunk(start, stop)
    states = chunk.states(h)
    y = chunk.readout(states, sequence.D)
    if chunk.z is not None:
        y.mul_(deterministic_math.silu(chunk.z))
    return y, states[:, -1].clone()


class _Gradients:
    """Gradients of one call, kept in the working dtype until :meth:`result`."""

    def __init__(self, sequence: _Sequence, inputs: ScanInputs) -> None:
        self.sequence = sequence
        u, delta, _, B, C, _, z, _ = inputs
        self.u, self.delta = torch.empty_like(u), torch.empty_like(delta)
        self.B, self.C = torch.empty_like(B), torch.empty_like(C)
        self.z = None if z is None else torch.empty_like(z)
        zeros = torch.zeros_like
        self.A = zeros(sequence.A)
        self.D = None if sequence.D is None else zeros(sequence.D)
        self.bias = None if sequence.bias is None else zeros(sequence.bias)

    def add_chunk(
        self, start: int, stop: int, h: Tensor, carry: Tensor, grad_out: Tensor
    ) -> Tensor:
        """Backward through one chunk.

        Args:
            h: State before the chunk, (B, N, D).
            carry: Gradient of its last state from all later positions, (B, N, D).
            grad_out: Gradient of all outputs (B, L, D).

        Returns:
            Gradient of ``h``.
        """
        p, s = self.sequence, self.sequence.chunk(start, stop)
        positions = slice(start, stop)
        states = s.states(h)
        grad_y = p.load(grad_out, start, stop)
        if s.z is not None and self.z is not None:
            grad_y, grad_z = _gate_gradients(s.z, s.readout(states, p.D), grad_y)
            self.z.transpose(1, 2)[:, positions] = grad_z
        grad_y_grouped = s.grouped(grad_y).unsqueeze(2)  # (B, S, 1, G, D / G)
        self.C.permute(0, 3, 2, 1)[:, positions] = (
            s.grouped(states[:, 1:]) * grad_y_grouped
        ).sum(-1)

        grad_h = (grad_y_grouped * s.C).flatten(-2)  # (B, S, N, D)
        carry = s.scan_back_(grad_h, carry)

        dtu = s.dt * s.u
        self.B.permute(0, 3, 2, 1)[:, positions] = (
            s.grouped(grad_h) * s.grouped(dtu).unsqueeze(2)
        ).sum(-1)
        grad_dtu = _sum_states((s.grouped(grad_h) * s.B).flatten(-2))
        # d(Δ A) of exp(Δ_t A) h_{t-1}
        grad_exponent = states[:, :-1].mul_(s.a).mul_(grad_h)
        self.A += deterministic_math.sum_rows(grad_exponent * s.dt.unsqueeze(2))
        grad_dt = _sum_states(grad_exponent * p.A).addcmul_(grad_dtu, s.u)
        if p.softplus:
            # sigmoid(delta) is 1 - exp(-softplus(delta)).
            grad_dt.mul_((-s.dt).expm1_().neg_())
        grad_u = grad_dtu.mul_(s.dt)
        if p.D is not None and self.D is not None:
            self.D += deterministic_math.sum_rows(grad_y * s.u)
            grad_u.addcmul_(grad_y, p.D)
        if self.bias is not None:
            self.bias += deterministic_math.sum_rows(grad_dt)
        self.u.transpose(1, 2)[:, positions] = grad_u
        self.delta.transpose(1, 2)[:, positions] = grad_dt
        return carry

    def result(self) -> ScanInputs:
        """The gradients, in any dtypes and strides."""
        return ScanInputs(
            u=self.u,
            delta=self.delta,
            A=self.A.T,
            B=self.B,
            C=self.C,
            D=self.D,
            z=self.z,
            delta_bias=self.bias,
        )


def _gate_gradients(z: Tensor, y: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and z of the product y SiLU(z)."""
    gate = deterministic_math.sigmoid(z)
    slope = gate * (1 + z * (1 - gate))
    return grad_out * (z * gate), grad_out * y * slope
