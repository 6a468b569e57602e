"""The interface of a backend, and of a call of an op."""

from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from mmvssm.ops.backends import Supplier

I = TypeVar('I', bound=NamedTuple)  # noqa: E741
O_contra = TypeVar('O_contra', bound=tuple[Any, ...], contravariant=True)
Outputs = tuple[Tensor, ...]


class Result(NamedTuple):
    """The result of a backend's forward pass.

    Attributes:
        outputs: The outputs of the op.
        saved: Tensors that the backward pass needs besides the inputs; empty if there
            will be no backward pass.
        has_nan: Whether there is NaN in the outputs; None if that is not known.
    """

    outputs: Outputs
    saved: Outputs = ()
    has_nan: bool | None = None


class Backend(Protocol[I, O_contra]):
    """Computes an op.

    Attributes:
        supplier: Name, devices, dtypes, and whether it can run here.
        differentiable: Whether torch can differentiate ``forward`` itself. Then
            ``saved_like`` and ``backward`` are never called.
    """

    @property
    def supplier(self) -> Supplier: ...

    @property
    def differentiable(self) -> bool: ...

    def refuses(self, inputs: I, options: O_contra) -> str | None:
        """Why it cannot take a call that its supplier can take, or None."""

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
            inputs: The inputs of the op, or what its declaration keeps instead.
            options: The options of the op.
            saved: The tensors that ``forward`` saved.
            grads: Gradients of the outputs, None for zero; any dtype and strides.
            wanted: For every input, whether its gradient is wanted.

        Returns:
            Gradients in any floating-point dtype and any strides; None for an input
            whose gradient is not wanted.
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
    """What the public function passes to its op.

    Attributes:
        inputs, options: Inputs and options of the op.
        backend: The backend that the caller named, or None.
        states: Number of states of a channel, if the op has states.
        last_state: Whether the caller wants a scan's last state.
    """

    inputs: Any
    options: Any
    backend: str | None = None
    states: int | None = None
    last_state: bool = False


class Composed:
    """Base of a backend that torch itself can differentiate."""

    differentiable = True

    def refuses(self, inputs: Any, options: Any) -> str | None:
        """It takes every call that its supplier takes."""
        return None

    def saved_like(self, inputs: Any, options: Any) -> Outputs:
        """Nothing is saved here."""
        return ()

    def backward(self, *arguments: Any) -> Any:
        """Never called."""
        raise AssertionError('torch differentiates the forward pass itself')


class KernelBackend:
    """Base of a backend with its own backward pass.

    It takes every call that its supplier takes, and saves only the inputs.
    """

    differentiable = False

    def refuses(self, inputs: Any, options: Any) -> str | None:
        """It takes every call that its supplier takes."""
        return None

    def saved_like(self, inputs: Any, options: Any) -> Outputs:
        """Nothing is saved besides the inputs."""
        return ()
