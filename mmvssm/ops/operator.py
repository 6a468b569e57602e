"""An op, declared once.

A declaration has the inputs (a NamedTuple of tensors), the options (a NamedTuple of
plain values), the outputs and the cost. Backends compute the op. This module makes the
rest, in the same way for all ops:

- the op of ``torch.library`` with its fake kernel, and gradients of any order. Its
  arguments are the inputs, the options, ``keep`` and the backend's name. Without
  ``keep`` nothing is saved for a backward pass, and there is none;
- the bypass of torch's dispatcher for calls that need nothing but the result;
- the autocast rule: a backend never runs under autocast, and the options have the
  dtypes that autocast asks for;
- the refusal of NaN, with the name of the input that has it;
- forward-mode derivatives and ``vmap``, through the reference;
- the formula for torch's FLOP counter.

A backend is one object of :class:`mmvssm.ops.Backend`, in one file beside the op's
reference.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.flop_counter import register_flop_formula

from mmvssm.ops import autocast, bypass, checks
from mmvssm.ops.backends import OURS, choose_backend, suppliers
from mmvssm.ops.contract import Backend, Call, Flops, Outputs, Result
from mmvssm.ops.leaves import (
    leaves_of,
    names_of,
    optional_of,
    pack,
    tensors_in,
)
from mmvssm.ops.typed import is_tracing

I = TypeVar('I', bound=NamedTuple)  # noqa: E741
O = TypeVar('O', bound=tuple[Any, ...])  # noqa: E741
P = ParamSpec('P')
R = TypeVar('R')

_NO_AXES: Mapping[str, tuple[int | None, int | None]] = MappingProxyType({})


class Op(Generic[I, O]):
    """An op of this package.

    Args:
        name: Name in ``mmvssm.ops`` and in torch's namespace ``mmvssm``.
        inputs: NamedTuple of the inputs: tensors, optional tensors, or nested
            NamedTuples of these. The device and dtype of the first one choose the
            backend.
        options: NamedTuple of bool, int, float, str and ``torch.dtype``.
        returns: Names of the outputs.
        saves: The most tensors that a backend may save for its backward pass.
        outputs_like: Makes empty tensors like the outputs. A backend must return
            tensors of these shapes, dtypes and strides.
        flops: Computes the cost by parts. It gets the inputs with shapes instead of
            tensors.
        axes: The axes of batch and positions, by the labels of the inputs that have
            these axes. Outputs have the batch first.
        keep: Makes the tensors that are kept for the backward pass instead of the
            inputs, from inputs, outputs and options. By default the inputs are kept.
        gradients_like: Makes tensors with the shapes, dtypes and strides of the
            gradients, from the tensors that are kept; None for an input without
            gradient.
        spread: Makes the gradients of the inputs from those of the kept tensors.
    """

    def __init__(
        self,
        name: str,
        inputs: type[I],
        options: type[O],
        *,
        returns: tuple[str, ...],
        saves: int = 0,
        outputs_like: Callable[[I, O], Outputs],
        flops: Callable[[I, O], Sequence[Flops]],
        axes: Mapping[str, tuple[int | None, int | None]] = _NO_AXES,
        keep: Callable[[I, Outputs, O], I] | None = None,
        gradients_like: Callable[[I, O], I] | None = None,
        spread: Callable[[I, O], I] | None = None,
    ):
        self.name, self.returns, self._saves = name, returns, saves
        self.flops, self.outputs_like = flops, outputs_like
        self.names = names_of(inputs)
        self.labels = names_of(inputs, between='.')
        self.option_types = typing.get_type_hints(options)
        self.axes = axes
        self.backends: dict[str, Backend[I, O]] = {}
        self._composed: Callable[[str], Backend[I, O]] | None = None
        self._among: Collection[str] = OURS
        self._inputs, self._options = inputs, options
        self._keep, self._gradients_like = keep, gradients_like
        self._spread = spread
        self.torch_op, self.torch_backward_op = self._register()
        all_ops[name] = self

    # Backends

    def supply(
        self,
        *backends: Backend[I, O],
        composed: Callable[[str], Backend[I, O]] | None = None,
    ) -> None:
        """Add backends.

        Args:
            backends: One for each supplier that has its own code for this op.
            composed: Makes a backend out of other ops, from a supplier's name. It is
                used for all other suppliers, and for calls that a backend refuses.
        """
        for backend in backends:
            self.backends[backend.supplier.name] = backend
        self._composed = composed or self._composed
        # A supplier that needs a check counts only if it has a backend to check.
        unchecked = {name for name in OURS if not suppliers[name].checked}
        self._among = unchecked | set(self.backends)

    def backend(self, name: str, inputs: I, options: O) -> Backend[I, O]:
        """The backend for a call that the supplier ``name`` was chosen for."""
        found = self.backends.get(name)
        if found is not None and not found.refuses(inputs, options):
            return found
        if self._composed is None:
            reason = found.refuses(inputs, options) if found else 'it has no such op'
            raise TypeError(
                f'{self.name}: the backend {name!r} cannot compute it: {reason}'
            )
        return self._composed(name)

    def composed(self, name: str) -> Callable[..., Outputs]:
        """The op composed of other ops, even if the supplier ``name`` has its own code.

        Returns:
            A function with the arguments of the public one that returns the outputs.

        Raises:
            ValueError: It is not composed of others.
        """
        if self._composed is None:
            raise ValueError(f'{self.name} is not composed of other ops')
        compose = self._composed
        prepare = inspect.unwrap(next(f for f, op in public_ops.items() if op is self))

        def call(*args: Any, **kwargs: Any) -> Outputs:
            asked = prepare(*args, **kwargs)
            with autocast.disabled(asked.inputs[0]):
                backend = compose(name)
                return backend.forward(asked.inputs, asked.options, False).outputs

        return call

    # Calls

    def public(
        self, finish: Callable[[Outputs, O], R]
    ) -> Callable[[Callable[P, Call]], Callable[P, R]]:
        """Make the function that users call.

        Args:
            finish: Makes its return value from the op's outputs and options.

        Returns:
            A decorator for a function that checks its arguments and returns a
            :class:`Call`. Its docstring is the public one.
        """
        self.finish: Callable[[Outputs, O], Any] = finish

        def decorate(prepare: Callable[P, Call]) -> Callable[P, R]:
            @functools.wraps(prepare)
            def public_op(*args: P.args, **kwargs: P.kwargs) -> R:
                if has_torch_function((*args, *kwargs.values())):
                    # A mode or a tensor subclass sees the op as one function.
                    tensors = tensors_in((*args, *kwargs.values()))
                    found: R = handle_torch_function(
                        public_op, tensors, *args, **kwargs
                    )
                    return found
                call = prepare(*args, **kwargs)
                with autocast.disabled(call.inputs[0]):
                    function, arguments = self.route(call)
                    outputs = self.outputs(call, function(*arguments))
                return finish(outputs, call.options)

            signature = inspect.signature(prepare)
            returned = inspect.signature(finish).return_annotation
            # mypy does not know this attribute of functions.
            public_op.__signature__ = signature.replace(  # type: ignore[attr-defined]
                return_annotation=returned
            )
            public_ops[public_op] = self
            return public_op

        return decorate

    def route(self, call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function that computes a call, and its arguments.

        The caller runs this function and passes the result to :meth:`outputs`. So
        there is one Python frame less between the public function and the backend.

        Raises:
            ValueError: The named backend is unknown.
            BackendUnavailableError: The named backend cannot run.
            TypeError: An input is in shards.
        """
        inputs, options, backend, states, last_state = call
        tensors = tuple(leaves_of(inputs))
        unobserved = bypass.unobserved(*tensors)
        if not unobserved and not torch.compiler.is_compiling():
            checks.refuse_shards(self.name, dict(zip(self.labels, tensors)))
        x = inputs[0]
        name = choose_backend(
            *(x.device, x.dtype, backend),
            states=states,
            last_state=last_state,
            op=self.name,
            among=self._among,
        )
        chosen = self.backend(name, inputs, options)
        if not torch.compiler.is_compiling() and bypass.transformed():
            # torch can transform the operations of the reference.
            chosen = self.backends['reference']
        elif not chosen.differentiable:
            keep = bypass.wanted(*tensors)
            if not unobserved:
                # torch.jit.trace compares its graph with one that it makes without
                # gradients.
                keep = keep or is_tracing()
                return self.torch_op, (*tensors, *options, keep, name)
            if keep:
                return _Bypass.apply, (self, options, name, *tensors)
        return chosen.forward, (inputs, options, False)

    def outputs(self, call: Call, computed: Result | Tensor | Outputs) -> Outputs:
        """The outputs of the op, from the result of the function of :meth:`route`.

        Raises:
            NaNInputError: (On the CPU) an input has NaN.
        """
        if isinstance(computed, Tensor):
            return (computed,)
        if not isinstance(computed, Result):
            # The op of torch.library has already looked for NaN.
            return computed[: len(self.returns)]
        if not torch.compiler.is_compiling():
            self.refuse_nan(call.inputs, computed)
        return computed.outputs

    def refuse_nan(self, inputs: I, result: Result) -> None:
        """If a result has NaN, raise an error that names the input with NaN."""
        found = result.has_nan
        if found is None and not bypass.transformed():
            found = checks.has_nan(*result.outputs)
        if found:
            checks.refuse_nan(self.name, dict(zip(self.labels, leaves_of(inputs))))

    # Registration with torch

    def _register(self) -> tuple[Any, Any]:
        options = [
            f'{_SCHEMA_TYPES[kind]} {name}' for name, kind in self.option_types.items()
        ]
        optional = optional_of(self._inputs)
        tensors = [
            f'Tensor{"?" if may else ""} {name}'
            for name, may in zip(self.names, optional)
        ]
        kept = [f'Tensor? {name}' for name in self.names]
        forward = torch.library.custom_op(
            f'mmvssm::{self.name}',
            self._forward,
            mutates_args=(),
            schema=_schema(
                *(*tensors, *options, 'bool keep', 'str backend'),
                returns=len(self.returns) + self._saves,
            ),
        )
        forward.register_fake(self._forward_fake)
        forward.register_autograd(self._gradient, setup_context=self._remember)
        backward = torch.library.custom_op(
            f'mmvssm::{self.name}_backward',
            self.backward,
            mutates_args=(),
            schema=_schema(
                *(f'Tensor? grad_{name}' for name in self.returns),
                *(*kept, *(f'Tensor saved_{i}' for i in range(self._saves))),
                *('bool[] wanted', *options, 'str backend'),
            ),
        )
        backward.register_fake(self._backward_fake)
        backward.register_autograd(
            self._second_gradient, setup_context=self._remember_all
        )
        namespace = torch.ops.mmvssm
        ops = [
            getattr(namespace, self.name),
            getattr(namespace, f'{self.name}_backward'),
        ]
        register_flop_formula(ops[0])(self._forward_flops)
        register_flop_formula(ops[1])(self._backward_flops)
        return tuple(op.default for op in ops)

    def pack(self, tensors: Sequence[Any], options: Sequence[Any]) -> tuple[I, O]:
        """Inputs and options from the arguments of torch's op, in order."""
        return pack(self._inputs, iter(tensors)), self._options(*options)

    def _unpack(self, arguments: Sequence[Any]) -> tuple[I, O, bool, str]:
        """Inputs, options, keep and the backend's name: the arguments of torch's op."""
        width = len(self.names)
        *options, keep, name = arguments[width:]
        return (*self.pack(arguments[:width], options), keep, name)

    def _forward(self, *arguments: Any) -> Tensor | Outputs:
        inputs, options, keep, name = self._unpack(arguments)
        with autocast.disabled(inputs[0]):
            result = self.backend(name, inputs, options).forward(inputs, options, keep)
        self.refuse_nan(inputs, result)
        found = self.returned(result.outputs, result.saved)
        return found if len(found) > 1 else found[0]

    def returned(self, outputs: Outputs, saved: Outputs) -> Outputs:
        """Everything that torch's op returns, always the same number of tensors."""
        missing = self._saves - len(saved)
        if missing < 0:
            raise ValueError(
                f'{self.name}: a backend may save {self._saves} tensors, '
                f'not {len(saved)}'
            )
        x = outputs[0]
        return (*outputs, *saved, *(x.new_empty(0) for _ in range(missing)))

    def _forward_fake(self, *arguments: Any) -> Tensor | Outputs:
        inputs, options, keep, name = self._unpack(arguments)
        backend = self.backend(name, inputs, options)
        outputs = self.outputs_like(inputs, options)
        saved = backend.saved_like(inputs, options) if keep else ()
        found = self.returned(outputs, saved)
        return found if len(found) > 1 else found[0]

    def _remember(
        self, ctx: Any, inputs: Sequence[Any], output: Tensor | Outputs
    ) -> None:
        taken, options, keep, name = self._unpack(inputs)
        ctx.keep = keep
        if not keep:
            return
        output = (output,) if isinstance(output, Tensor) else output
        count = len(self.returns)
        self.remember(ctx, taken, options, name, output[:count], output[count:])

    def remember(
        self,
        ctx: Any,
        inputs: I,
        options: O,
        backend: str,
        outputs: Outputs,
        saved: Outputs,
    ) -> None:
        """Save in ``ctx`` what :meth:`gradients` needs."""
        if self._keep is not None:
            inputs = self._keep(inputs, outputs, options)
        ctx.options, ctx.backend = options, backend
        ctx.save_for_backward(*leaves_of(inputs), *saved)
        ctx.set_materialize_grads(False)

    def _gradient(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not ctx.keep:
            raise RuntimeError(
                f'{self.name}: this call has no backward pass, because it was traced, '
                'compiled or exported without gradients: do that without '
                'torch.no_grad(), and with a weight or an input that requires '
                'gradients; or run it under torch.no_grad()'
            )
        width = len(self.names)
        needed = ctx.needs_input_grad[:width]
        found = self.gradients(
            self.torch_backward_op, ctx, grads[: len(self.returns)], needed
        )
        return (*found, *(None,) * (len(ctx.options) + 2))

    def gradients(
        self,
        backward: Callable[..., list[Tensor]],
        ctx: Any,
        grads: tuple[Tensor | None, ...],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of the inputs, by the backward op or its function."""
        width = len(self.names)
        if all(grad is None for grad in grads):
            return [None] * width
        tensors = ctx.saved_tensors
        # A gradient that is spread over several inputs is needed for each of them.
        wanted = [self._spread is not None or bool(need) for need in needed]
        found = backward(*grads, *tensors, wanted, *ctx.options, ctx.backend)
        kept = pack(self._inputs, iter(tensors[:width]))
        like = leaves_of(self._like(kept, ctx.options))
        rest = iter(found)
        by_kept = pack(
            self._inputs,
            (next(rest) if w and x is not None else None for x, w in zip(like, wanted)),
        )
        if self._spread is not None:
            by_kept = self._spread(by_kept, ctx.options)
        return leaves_of(by_kept)

    def _like(self, kept: I, options: O) -> I:
        if self._gradients_like is None:
            return kept
        return self._gradients_like(kept, options)

    def _unpack_backward(
        self, arguments: Sequence[Any]
    ) -> tuple[list[Tensor | None], I, list[Tensor], list[bool], O, str]:
        count, width = len(self.returns), len(self.names)
        kept = pack(self._inputs, iter(arguments[count : count + width]))
        behind = count + width + self._saves
        saved = list(arguments[count + width : behind])
        wanted, *options, name = arguments[behind:]
        grads = list(arguments[:count])
        return grads, kept, saved, wanted, self._options(*options), name

    def backward(self, *arguments: Any) -> list[Tensor]:
        """The function of torch's backward op: gradients of the kept tensors."""
        grads, kept, saved, wanted, options, name = self._unpack_backward(arguments)
        with autocast.disabled(kept[0]):
            found = self.backend(name, kept, options).backward(
                *(kept, options, tuple(saved), tuple(grads)),
                pack(self._inputs, iter(wanted)),
            )
        like = leaves_of(self._like(kept, options))
        return [
            _as(gradient, x)
            for gradient, x, w in zip(leaves_of(found), like, wanted)
            if w and x is not None
        ]

    def _backward_fake(self, *arguments: Any) -> list[Tensor]:
        _, kept, _, wanted, options, _ = self._unpack_backward(arguments)
        like = leaves_of(self._like(kept, options))
        return [
            torch.empty_like(x) for x, w in zip(like, wanted) if w and x is not None
        ]

    # Gradients of gradients, by the reference

    def _remember_all(
        self, ctx: Any, inputs: Sequence[Any], output: list[Tensor]
    ) -> None:
        grads, kept, _, wanted, options, _ = self._unpack_backward(inputs)
        ctx.options, ctx.wanted = options, wanted
        ctx.save_for_backward(*grads, *leaves_of(kept))

    def _second_gradient(
        self, ctx: Any, second: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        count = len(self.returns)
        with torch.enable_grad():
            leaves = [
                None if x is None else x.detach().requires_grad_()
                for x in ctx.saved_tensors
            ]
            grads, kept = leaves[:count], leaves[count:]
            inputs = pack(self._inputs, iter(kept))
            with autocast.disabled(inputs[0]):
                reference = self.backends['reference']
                outputs = reference.forward(inputs, ctx.options, False).outputs
            pairs = [(y, g) for y, g in zip(outputs, grads) if g is not None]
            like = leaves_of(self._like(inputs, ctx.options))
            # An input with a gradient that is not kept is a term of the sum that is
            # kept as the first input. Both have the same gradient.
            asked = [
                inputs[0] if x is None else x
                for x, y, w in zip(kept, like, ctx.wanted)
                if w and y is not None
            ]
            first = torch.autograd.grad(
                [y for y, _ in pairs],
                asked,
                [g.to(y.dtype) for y, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
            pairs = [
                (a, b) for a, b in zip(first, second) if a is not None and b is not None
            ]
            there = [x for x in leaves if x is not None]
            every: Iterator[Tensor | None] = iter([None] * len(there))
            if pairs:
                values = [b.to(a.dtype) for a, b in pairs]
                heads = [a for a, _ in pairs]
                every = iter(
                    torch.autograd.grad(heads, there, values, allow_unused=True)
                )
        found = [None if x is None else next(every) for x in leaves]
        return (*found, *(None,) * (self._saves + len(ctx.options) + 2))

    # FLOPs, for torch.utils.flop_counter: a multiply-add is two

    def _forward_flops(self, *shapes: Any, **kwargs: Any) -> int:
        inputs, options, _, _ = self._unpack(shapes)
        return _twice(self.flops(inputs, options))

    def _backward_flops(self, *shapes: Any, **kwargs: Any) -> int:
        # torch counts two products of the size of the forward pass.
        _, kept, _, _, options, _ = self._unpack_backward(shapes)
        return 2 * _twice(self.flops(kept, options))


class _Bypass(torch.autograd.Function):
    """An op with gradients that bypasses the op of torch.library."""

    @staticmethod
    def forward(
        ctx: Any, op: Op[Any, Any], options: Any, name: str, *tensors: Tensor | None
    ) -> Tensor | Outputs:
        inputs, options = op.pack(tensors, options)
        result = op.backend(name, inputs, options).forward(inputs, options, True)
        op.refuse_nan(inputs, result)
        ctx.op, outputs = op, result.outputs
        saved = op.returned(outputs, result.saved)[len(outputs) :]
        op.remember(ctx, inputs, options, name, outputs, saved)
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op = ctx.op
        # Gradients of gradients need torch's op, which has them.
        graph = torch.is_grad_enabled()
        backward = op.torch_backward_op if graph else op.backward
        found = op.gradients(backward, ctx, grads, ctx.needs_input_grad[3:])
        return (None, None, None, *found)


# Every op by its name, and by the function that users call.
all_ops: dict[str, Op[Any, Any]] = {}
public_ops: dict[Callable[..., Any], Op[Any, Any]] = {}

_SCHEMA_TYPES = {
    bool: 'bool',
    int: 'SymInt',
    float: 'float',
    str: 'str',
    torch.dtype: 'ScalarType',
}


def _twice(parts: Sequence[Flops]) -> int:
    return sum(2 * part.products + part.others for part in parts)


def _schema(*arguments: str, returns: int | None = None) -> str:
    """Schema of an op that returns that many tensors; None for a list of tensors."""
    found = 'Tensor[]' if returns is None else ', '.join(['Tensor'] * returns)
    return f'({", ".join(arguments)}) -> ({found})'


def _as(gradient: Tensor | None, x: Tensor) -> Tensor:
    """A gradient with the dtype of a tensor and the strides of a new tensor like it."""
    if gradient is None:
        return torch.zeros_like(x)
    if gradient.dtype == x.dtype:
        # The tensor may be a part of a larger one, with other strides than a new one.
        strides = x.stride(), torch.empty_like(x, device='meta').stride()
        if gradient.stride() in strides:
            return gradient
    return torch.empty_like(x).copy_(gradient)
