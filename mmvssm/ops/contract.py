"""What an op asks of a backend, and a caller of an op."""

from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from mmvssm.ops.backends import Supplier

I = TypeVar('I', bound=NamedTuple)  # noqa: E741
O_contra = TypeVar('O_contra', bound=tuple[Any, ...], contravariant=True)
Outputs = tuple[Tensor, ...]


class Result(NamedTuple):
    """What a backend's forward pass gives.

    Attributes:
        outputs: Of the op.
        saved: What its backward pass needs beside the inputs, if that was asked for.
        has_nan: Whether there is NaN in the outputs; None if nobody has looked.
    """

    outputs: Outputs
    saved: Outputs = ()
    has_nan: bool | None = None


class Backend(Protocol[I, O_contra]):
    """Computes an op.

    Attributes:
        supplier: Whose it is: name, devices, dtypes, and whether it can run here.
        differentiable: Whether torch may differentiate ``forward`` itself. The
            other two methods of the backward pass are then never called.
    """

    @property
    def supplier(self) -> Supplier: ...

    @property
    def differentiable(self) -> bool: ...

    def refuses(self, inputs: I, options: O_contra) -> str | None:
        """Why it cannot take this call that its supplier takes, or None."""

    def forward(self, inputs: I, options: O_contra, keep: bool) -> Result:
        """Compute the op; with ``keep`` also what :meth:`backward` needs."""

    def saved_like(self, inputs: I, options: O_contra) -> Outputs:
        """Empty tensors like those that ``forward`` saves."""

    def backward(
        self,
        inputs: I,
        options: O_contra,
        saved: Outputs,
        grads: tuple[Tensor | None, ...],
        wanted: I,
    ) -> I:
        """Gradients of the inputs.

        Args:
            inputs: Of the op, or what its declaration keeps in their place.
            options: Of the op.
            saved: By ``forward``.
            grads: Of the outputs, None for zero; any dtype and strides.
            wanted: Of every input whether its gradient is wanted.

        Returns:
            In any floating-point dtype and any strides; None where it is not wanted.
        """


class Flops(NamedTuple):
    """Cost of an op, or of a part of one.

    Attributes:
        products: Multiply-adds of matrix products and convolutions.
        others: All other operations that the published tables count.
        part: Name of the part, empty for the whole.
    """

    products: int
    others: int = 0
    part: str = ''


class Call(NamedTuple):
    """What the function that users call asks of its op.

    Attributes:
        inputs, options: Of the op.
        backend: The backend asked for, None for the op's choice.
        states: Of a channel, where the op has states.
        last_state: Whether the caller wants a scan's last state.
    """

    inputs: Any
    options: Any
    backend: str | None = None
    states: int | None = None
    last_state: bool = False


class Composed:
    """What a backend need not write that torch itself differentiates."""

    differentiable = True

    def refuses(self, inputs: Any, options: Any) -> str | None:
        """Nothing that its supplier takes."""
        return None

    def saved_like(self, inputs: Any, options: Any) -> Outputs:
        """Nothing is saved here."""
        return ()

    def backward(self, *arguments: Any) -> Any:
        """Never called."""
        raise AssertionError('torch differentiates the forward pass itself')


class KernelBackend:
    """What a backend with a backward pass of its own need not write.

    It refuses nothing that its supplier takes, and saves nothing but the inputs.
    """

    differentiable = False

    def refuses(self, inputs: Any, options: Any) -> str | None:
        """Why it cannot take a call: it can."""
        return None

    def saved_like(self, inputs: Any, options: Any) -> Outputs:
        """Empty tensors like those that are saved: none."""
        return ()
