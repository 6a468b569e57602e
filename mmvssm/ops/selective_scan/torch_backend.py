"""The selective scan in plain tensor code, forward and backward.

The sequence is cut into segments that fit the cache; the state is carried
from one to the next. Within a segment the recurrence

    h_t = a_t h_{t-1} + b_t,   a_t = exp(Δ_t A),   b_t = Δ_t B_t u_t

is solved for many chunks at once: first every chunk from a zero state, which
gives its end state and total decay, then the chunks' start states one after
the other, then every chunk again from its true start. Nothing is ever divided
by a decay, so no A and no Δ can overflow it (the form with ``cumsum`` and
``exp(-cumsum)`` does). Only the states at the segments' starts are kept for
the backward pass, which recomputes the rest.

Everything inside is channels-last, (batch, position, state, channel), and
every reduction runs over axes whose order does not depend on the number of
threads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import backends, deterministic_math
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions, outputs_like

# Elements of one (batch, position, state, channel) work array: a segment's few
# arrays stay in the cache.
_SEGMENT_ELEMENTS = 2**18
# Elements one step of the recurrence should have to be worth its call.
_STEP_ELEMENTS = 2**15


def segment_length(batch: int, length: int, states: int, channels: int) -> int:
    """Positions of one segment."""
    return min(length, max(16, _SEGMENT_ELEMENTS // (batch * states * channels)))


def _linear_scan_(a: Tensor, b: Tensor, h: Tensor, reverse: bool = False) -> None:
    """Solve h_t = a_t h_{t-1} + b_t in place of ``b``.

    Args:
        a: Decays (B, S, R), any strides.
        b: Inputs (B, S, R); holds the states afterwards.
        h: State before the first position, (B, R).
        reverse: Run from the last position to the first.
    """
    length = b.shape[1]
    wanted = max(1, _STEP_ELEMENTS // (b.shape[0] * b.shape[2]))
    chunks = min(wanted, math.isqrt(length))
    size = length // chunks
    if chunks == 1:
        _run_steps(_steps(a, reverse), _steps(b, reverse), h)
        return
    # The positions that fill no chunk come last in the direction of the scan.
    rest = length - chunks * size
    main = slice(rest, None) if reverse else slice(0, chunks * size)
    a_steps = _steps(a[:, main].unflatten(1, (chunks, size)), reverse, dim=2)
    b_steps = _steps(b[:, main].unflatten(1, (chunks, size)), reverse, dim=2)

    end, decay = b_steps[0].clone(), a_steps[0].clone()
    for a_t, b_t in zip(a_steps[1:], b_steps[1:]):
        torch.addcmul(b_t, a_t, end, out=end)
        decay.mul_(a_t)
    # An overflowing product of growths must not turn a zero state into NaN.
    decay.clamp_(max=torch.finfo(decay.dtype).max)
    start = torch.empty_like(end)
    starts, ends, decays = (_steps(t, reverse) for t in (start, end, decay))
    starts[0].copy_(h)
    for c in range(1, chunks):
        torch.addcmul(ends[c - 1], decays[c - 1], starts[c - 1], out=starts[c])
    _run_steps(a_steps, b_steps, start)
    if rest:
        tail = slice(0, rest) if reverse else slice(chunks * size, None)
        last = b[:, rest] if reverse else b[:, chunks * size - 1]
        _run_steps(_steps(a[:, tail], reverse), _steps(b[:, tail], reverse), last)


def _steps(x: Tensor, reverse: bool, dim: int = 1) -> list[Tensor]:
    views = x.unbind(dim)
    return list(reversed(views)) if reverse else list(views)


def _run_steps(a_steps: list[Tensor], b_steps: list[Tensor], h: Tensor) -> None:
    for a_t, b_t in zip(a_steps, b_steps):
        torch.addcmul(b_t, a_t, h, out=b_t)
        h = b_t


def _sum_states(x: Tensor) -> Tensor:
    """(B, S, N, D) summed over N. ``x`` may be taken for the result."""
    return x.squeeze(2) if x.shape[2] == 1 else x.sum(2)


@dataclass
class _Segment:
    """Channels-last pieces of the inputs, S positions in the working dtype."""

    u: Tensor  # (B, S, D)
    dt: Tensor  # (B, S, D)
    B: Tensor  # (B, S, N, G, 1)
    C: Tensor  # (B, S, N, G, 1)
    a: Tensor  # (B, S + 1, N, D), the last one belongs to the next segment
    z: Tensor | None  # (B, S, D)

    def grouped(self, x: Tensor) -> Tensor:
        """(..., D) seen as (..., G, D / G)."""
        found: Tensor = x.unflatten(-1, (self.B.shape[3], -1))
        return found

    def states(self, h: Tensor) -> Tensor:
        """States (B, S + 1, N, D), the first one being ``h`` (B, N, D)."""
        batch, length, channels = self.u.shape
        states = self.u.new_empty(batch, length + 1, self.B.shape[2], channels)
        states[:, 0] = h
        torch.mul(
            self.grouped(self.dt * self.u).unsqueeze(2),
            self.B,
            out=self.grouped(states[:, 1:]),
        )
        flat = states.flatten(2)
        _linear_scan_(self.a[:, :-1].flatten(2), flat[:, 1:], flat[:, 0])
        return states

    def readout(self, states: Tensor, D: Tensor | None) -> Tensor:
        """C·h + D u, (B, S, D)."""
        products = self.grouped(states[:, 1:]) * self.C
        y = _sum_states(products.flatten(-2))
        return y if D is None else y.addcmul_(self.u, D)


class _Problem:
    """The inputs of one call, seen channels-last and cut into segments."""

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

    def bounds(self) -> list[tuple[int, int]]:
        """First and one-past-last position of each segment."""
        step = segment_length(self.batch, self.length, self.states, self.channels)
        return [(s, min(s + step, self.length)) for s in range(0, self.length, step)]

    def zero_state(self) -> Tensor:
        return self.u.new_zeros(
            self.batch, self.states, self.channels, dtype=self.dtype
        )

    def segment(self, start: int, stop: int) -> _Segment:
        raw = self._load(self.delta, start, stop + 1)
        if self.bias is not None:
            raw = raw + self.bias
        dt = deterministic_math.softplus(raw) if self.softplus else raw
        if stop == self.length:  # nothing follows: a decay of one
            dt = F.pad(dt, (0, 0, 0, 1))
        size = stop - start
        z = None if self.z is None else self._load(self.z, start, stop)
        return _Segment(
            u=self._load(self.u, start, stop),
            dt=dt[:, :size],
            B=self._load(self.B, start, stop).unsqueeze(-1),
            C=self._load(self.C, start, stop).unsqueeze(-1),
            a=(dt.unsqueeze(2) * self.A).exp_(),
            z=z,
        )

    def _load(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[:, start:stop].to(self.dtype).contiguous()


class TorchScan(KernelBackend):
    """Segments that fit the cache, in each many chunks at once."""

    def __init__(self, supplier: backends.Supplier):
        self.supplier = supplier

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        problem = _Problem(inputs, options)
        out, last_state = outputs_like(inputs, options)
        out_channels_last = out.transpose(1, 2)
        saved = self.saved_like(inputs, options) if keep else ()
        h = problem.zero_state()
        for index, (start, stop) in enumerate(problem.bounds()):
            if index and keep:
                saved[0][index - 1] = h
            segment = problem.segment(start, stop)
            states = segment.states(h)
            h = states[:, -1].clone()
            y = segment.readout(states, problem.D)
            if segment.z is not None:
                y.mul_(deterministic_math.silu(segment.z))
            out_channels_last[:, start:stop] = y
        last_state.copy_(h.transpose(1, 2))
        return Result((out, last_state), saved)

    def saved_like(
        self, inputs: ScanInputs, options: ScanOptions
    ) -> tuple[Tensor, ...]:
        """The state at each segment's start but the first, (segments - 1, B, N, D)."""
        batch, channels, length = inputs.u.shape
        states = inputs.A.shape[1]
        step = segment_length(batch, length, states, channels)
        shape = (-(-length // step) - 1, batch, states, channels)
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
        """All gradients, from the last segment to the first."""
        grad_out, grad_last_state = grads
        problem = _Problem(inputs, options)
        gradients = _Gradients(problem, inputs)
        carry = problem.zero_state()
        if grad_last_state is not None:
            carry += grad_last_state.transpose(1, 2)
        if grad_out is None:
            grad_out = torch.zeros_like(inputs.u)
        grad_out = grad_out.transpose(1, 2)
        for index, (start, stop) in reversed(list(enumerate(problem.bounds()))):
            h = saved[0][index - 1] if index else problem.zero_state()
            piece = grad_out[:, start:stop].to(problem.dtype).contiguous()
            carry = gradients.add_segment(start, stop, h, carry, piece)
        return gradients.result()


class _Gradients:
    """Gradients of one call, in the working dtype until :meth:`result`."""

    def __init__(self, problem: _Problem, inputs: ScanInputs) -> None:
        self.problem = problem
        u, delta, _, B, C, _, z, _ = inputs
        self.u, self.delta = torch.empty_like(u), torch.empty_like(delta)
        self.B, self.C = torch.empty_like(B), torch.empty_like(C)
        self.z = None if z is None else torch.empty_like(z)
        zeros = torch.zeros_like
        self.A = zeros(problem.A)
        self.D = None if problem.D is None else zeros(problem.D)
        self.bias = None if problem.bias is None else zeros(problem.bias)

    def add_segment(
        self, start: int, stop: int, h: Tensor, carry: Tensor, grad_out: Tensor
    ) -> Tensor:
        """Backward through one segment.

        Args:
            h: State before it, (B, N, D).
            carry: Gradient of the state right after it (B, N, D).
            grad_out: Gradient of its outputs (B, S, D).

        Returns:
            Gradient of the state at its first position, (B, N, D).
        """
        p, s = self.problem, self.problem.segment(start, stop)
        positions = slice(start, stop)
        states = s.states(h)
        grad_y = grad_out
        if s.z is not None and self.z is not None:
            gate = deterministic_math.sigmoid(s.z)
            y = s.readout(states, p.D)
            slope = gate * (1 + s.z * (1 - gate))
            self.z.transpose(1, 2)[:, positions] = grad_out * y * slope
            grad_y = grad_out * (s.z * gate)
        grad_y_grouped = s.grouped(grad_y).unsqueeze(2)  # (B, S, 1, G, D / G)
        self.C.permute(0, 3, 2, 1)[:, positions] = (
            s.grouped(states[:, 1:]) * grad_y_grouped
        ).sum(-1)

        grad_h = (grad_y_grouped * s.C).flatten(-2)  # (B, S, N, D)
        _linear_scan_(
            s.a[:, 1:].flatten(2), grad_h.flatten(2), carry.flatten(1), reverse=True
        )

        dtu = s.dt * s.u
        self.B.permute(0, 3, 2, 1)[:, positions] = (
            s.grouped(grad_h) * s.grouped(dtu).unsqueeze(2)
        ).sum(-1)
        grad_dtu = _sum_states((s.grouped(grad_h) * s.B).flatten(-2))
        # d(Δ A) of exp(Δ_t A) h_{t-1}
        grad_exponent = states[:, :-1].mul_(s.a[:, :-1]).mul_(grad_h)
        self.A += deterministic_math.sum_rows(grad_exponent * s.dt.unsqueeze(2))
        grad_dt = _sum_states(grad_exponent * p.A).addcmul_(grad_dtu, s.u)
        if p.softplus:
            # sigmoid(raw) is 1 - exp(-softplus(raw)).
            grad_dt.mul_(torch.expm1(-s.dt).neg_())
        grad_u = grad_dtu.mul_(s.dt)
        if p.D is not None and self.D is not None:
            self.D += deterministic_math.sum_rows(grad_y * s.u)
            grad_u.addcmul_(grad_y, p.D)
        if self.bias is not None:
            self.bias += deterministic_math.sum_rows(grad_dt)
        self.u.transpose(1, 2)[:, positions] = grad_u
        self.delta.transpose(1, 2)[:, positions] = grad_dt
        return grad_h[:, 0]

    def result(self) -> ScanInputs:
        """In any dtypes and strides."""
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
