"""Check and time one call of an op by one backend."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmvssm.ops.contract import Call
from mmvssm.ops.gpu_check.calls import OpCall
from mmvssm.ops.gpu_check.memory import Guarded
from mmvssm.ops.gpu_check.values import Values, empty, graded, packed, wanted

# What the kernels are compared with.
TRUTH = 'torch'
# Allowed errors, relative to the size of the whole tensor, by dtype of the call.
_ALLOWED = dict(float32=1e-5, bfloat16=2**-6, float16=2**-9)
# If plain tensor code of the same dtype has a larger error, this many times that error.
# If that error leaves no digit (of terms that cancel out), this many times.
_TIMES_PLAIN, _TIMES_NOISE, _NOISE = 3, 10, 0.05
# Parts of the names of results.
_GRADIENT, _INFERENCE = 'the gradient of ', ' without gradients'


def fault(call: OpCall, backend: str, device: torch.device, repeats: int) -> str | None:
    """Check a call of an op by a backend, forward and backward.

    Args:
        call: The call.
        backend: Name of the backend.
        device: Where to run it.
        repeats: How often the bits are compared with those of the first run.

    Returns:
        None if it is right, or a sentence that names the tensor and the error.
    """
    values = Values.of(call, device)
    memory = Guarded()
    inputs = [None if x is None else memory.tensor(x, device) for x in call.tensors]
    values.fill(inputs)
    with memory, _nan_in_new_memory():
        got = results(call, backend, inputs, values.grads)
    _wait(device)
    beside = memory.damaged()
    if beside:
        return f'a kernel wrote outside of {beside}'
    found = _compare(call, values, got, inputs)
    if found:
        return found
    for _ in range(repeats):
        with _busy(device):
            again = results(call, backend, inputs, values.grads)
        _wait(device)
        for name, x in got.items():
            if not torch.equal(again[name], x):
                return f'{name} has different bits in a second run with the same inputs'
    return None


def milliseconds(
    call: OpCall, backend: str, device: torch.device, repeats: int = 5
) -> float:
    """Median time of a forward and backward pass, as in a training."""
    values = Values.of(call, device)
    tensors = [None if x is None else empty(x, str(device)) for x in call.tensors]
    values.fill(tensors)
    need = wanted(call)
    leaves = [
        x.requires_grad_() if x is not None and w else x for x, w in zip(tensors, need)
    ]
    inputs, options = packed(call, leaves)
    asked = Call(inputs, options, backend, call.states)
    op, grads = call.declaration, list[Tensor | None]()

    def step() -> None:
        function, arguments = op.route(asked)
        outputs = op.outputs(asked, function(*arguments))
        if not grads:
            grads.extend(values.grads(outputs))
        _gradients(outputs, leaves, grads)

    step()
    return statistics.median(_timed(step, device) for _ in range(repeats))


def results(
    call: OpCall,
    backend: str,
    tensors: Sequence[Tensor | None],
    grads_of: Callable[[Sequence[Tensor]], list[Tensor | None]],
) -> dict[str, Tensor]:
    """Outputs and gradients of the inputs, by their names in messages.

    This calls the backend without torch's dispatcher, which would hide its allocations.

    Args:
        call: The call.
        backend: Name of the backend.
        tensors: The inputs.
        grads_of: Makes the gradients of the outputs, from the outputs.
    """
    op, need = call.declaration, wanted(call)
    inputs, options = packed(call, tensors)
    chosen = op.backend(backend, inputs, options)
    if chosen.differentiable:
        leaves = [
            x.detach().requires_grad_() if x is not None and w else x
            for x, w in zip(tensors, need)
        ]
        with torch.enable_grad():
            inputs, options = packed(call, leaves)
            outputs = chosen.forward(inputs, options, False).outputs
        gradients = iter(_gradients(outputs, leaves, grads_of(outputs)))
        by_input = [next(gradients) if w else None for w in need]
    else:
        context = _Context()
        result = chosen.forward(inputs, options, True)
        outputs = result.outputs
        saved = op.returned(outputs, result.saved)[len(outputs) :]
        op.remember(context, inputs, options, backend, outputs, saved)
        by_input = op.gradients(op.backward, context, tuple(grads_of(outputs)), need)
    found = {name: out.detach() for name, out in zip(op.returns, outputs)}
    # If no backward pass follows, other kernels may compute the same results.
    for name, out in zip(op.returns, chosen.forward(inputs, options, False).outputs):
        found[name + _INFERENCE] = out.detach()
    return found | {
        _GRADIENT + name: x
        for name, x, w in zip(op.labels, by_input, need)
        if w and x is not None
    }


def _gradients(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The gradients that torch computes, for the leaves that need one, in order."""
    there = [x for x in leaves if x is not None and x.requires_grad]
    pairs = [(y, g) for y, g in zip(outputs, grads) if g is not None]
    return torch.autograd.grad([y for y, _ in pairs], there, [g for _, g in pairs])


def empty_grads(
    call: OpCall,
) -> Callable[[Sequence[Tensor]], list[Tensor | None]]:
    """Gradients without values, for :func:`results`."""

    def grads(outputs: Sequence[Tensor]) -> list[Tensor | None]:
        return [
            torch.empty_like(y) if wanted else None
            for y, wanted in zip(outputs, graded(call))
        ]

    return grads


class _Context:
    """The context that :meth:`Op.remember` writes to, for one backward pass."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Gradients that are None stay None."""


# The comparison


def _compare(
    call: OpCall,
    values: Values,
    got: dict[str, Tensor],
    inputs: Sequence[Tensor | None],
) -> str | None:
    """None if the results are right, or a sentence about what is wrong."""
    for name, x in got.items():
        bad = x.numel() - int(x.isfinite().sum())
        if bad:
            return f'{bad} of {x.numel()} values of {name} are not finite'
    want = _truth(values)
    errors = _errors(values, got, want)
    allowed = dict.fromkeys(errors, _ALLOWED[_coarsest(call)])
    if all(error <= allowed[name] for name, error in errors.items()):
        return None
    # Is the kernel wrong, or does any code have a large error on these numbers?
    plain = _errors(values, results(call, TRUTH, inputs, values.grads), want)
    for name, error in errors.items():
        times = _TIMES_NOISE if plain[name] > _NOISE else _TIMES_PLAIN
        most = max(allowed[name], times * plain[name])
        # NaN must fail here.
        if not error <= most:
            return f'{name} has an error of {error:.1e}; at most {most:.1e} is allowed'
    return None


def _truth(values: Values) -> dict[str, Tensor]:
    """Results for the distinct elements of the batch in float64.

    Gradients of inputs without batch are those of the whole batch.
    """
    small = values.call.with_batch(len(values.counts())).with_dtype(
        'float64', ('float32', 'bfloat16', 'float16')
    )
    # Every distinct element is several times in the batch.
    weights = torch.tensor(values.counts(), dtype=torch.float64)

    def grads(outputs: Sequence[Tensor]) -> list[Tensor | None]:
        few = values.few_grads
        return [None if g is None else g * _column(weights, g) for g in few]

    found = results(small, TRUTH, values.few, grads)
    for name in _with_batch(small, found):
        if name.startswith(_GRADIENT):
            axis = _batch_axis(small, name)
            rows = found[name].movedim(axis, 0)
            found[name] = (rows / _column(weights, rows)).movedim(0, axis)
    return found


def _errors(
    values: Values, got: dict[str, Tensor], want: dict[str, Tensor]
) -> dict[str, float]:
    """Relative errors of every tensor: of the whole, and of the worst value."""
    found = {}
    batched = set(_with_batch(values.call, got))
    for name, x in got.items():
        if name not in batched:
            found[name] = _error([(x, want[name])])
            continue
        axis = _batch_axis(values.call, name)
        rows, right = x.movedim(axis, 0), want[name].movedim(axis, 0)
        found[name] = _error([(row, right[p]) for row, p in zip(rows, values.places)])
    return found


def _error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    squares = size = largest = peak = 0.0
    for x, want in pairs:
        difference = (x.double() - want).abs()
        squares += float(difference.square().sum())
        size += float(want.square().sum())
        largest = max(largest, float(difference.max()))
        peak = max(peak, float(want.abs().max()))
    whole = math.sqrt(squares / size) if size else math.sqrt(squares)
    # Finds a single wrong value in a large tensor. Right values may differ in error.
    return max(whole, largest / (4 * peak) if peak else largest)


def _with_batch(call: OpCall, names: Sequence[str] | dict[str, Tensor]) -> list[str]:
    """The results that have a batch axis."""
    return [name for name in names if _axis(call, name) is not None]


def _batch_axis(call: OpCall, name: str) -> int:
    axis = _axis(call, name)
    assert axis is not None
    return axis


def _axis(call: OpCall, name: str) -> int | None:
    if name.removesuffix(_INFERENCE) in call.declaration.returns:
        return 0
    return call.axis_of(name.removeprefix(_GRADIENT), 0)


def _coarsest(call: OpCall) -> str:
    """Name of the least precise dtype of the call."""
    dtypes = {x.dtype for x in call.named().values()}
    dtypes |= {str(x) for _, x in call.options}
    return max(dtypes & set(_ALLOWED), key=_ALLOWED.__getitem__)


def _column(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device).view(-1, *(1,) * (like.ndim - 1))


# The device


@contextlib.contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Make torch fill new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def _busy(device: torch.device) -> Iterator[None]:
    """Keep a part of the GPU busy in another stream, to change the order of work."""
    if device.type != 'cuda':
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        x = torch.zeros(1024, 1024, device=device)
        for _ in range(20):
            x = x @ x
    yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)
