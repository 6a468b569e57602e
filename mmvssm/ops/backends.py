"""The scan backends: which ones can run here, and which one a call gets.

The choice depends on the tensors of the call, on torch's deterministic mode and, on a
GPU, on the machine. The fused GPU kernels are used if a check on this machine found
them right, and faster than the next backend (``gpu_check/``). Otherwise ``mamba_ssm``
is used if it is installed. Otherwise plain tensor code is used, with a warning that
says why. A user can override the choice, in this order, by the ``backend=`` argument of
an op, by :func:`use_backend`, and by the environment variable ``MMVSSM_SCAN_BACKEND``.
:func:`explain_backend` gives the reasons.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass

import torch

from mmvssm.ops import mamba_ssm
from mmvssm.ops.cpu import library
from mmvssm.ops.cuda import kernels as cuda_kernels
from mmvssm.ops.gpu_check import choice

ENV_VARIABLE = 'MMVSSM_SCAN_BACKEND'
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BackendUnavailableError(RuntimeError):
    """The named backend cannot run here, or cannot take these tensors."""


@dataclass(frozen=True)
class Supplier:
    """What the backends of one name share; each op has a backend of its own.

    Attributes:
        name: The name for ``backend=`` and ``MMVSSM_SCAN_BACKEND``.
        summary: One line for ``python -m mmvssm.collect_env``.
        unavailable: Returns the reason why this machine cannot run it, or None.
        devices: Device types that it takes, or a function that returns them; None for
            all.
        dtypes: Dtypes of the activations that it takes.
        states: Numbers of states that it takes, None for any.
        deterministic: Whether the same inputs give the same bits.
        automatic: Whether it may be used by default, without being named.
        checked: Device types that need a check. It is then used by default on these
            only, if the check passed there. Empty if it needs no check.
        last_state_gradient: Whether it has a gradient of a scan's last state.
    """

    name: str
    summary: str
    unavailable: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    states: Collection[int] | None = None
    deterministic: bool = True
    automatic: bool = True
    checked: tuple[str, ...] = ()
    last_state_gradient: bool = True

    def refuses(
        self, device_type: str, dtype: torch.dtype, states: int | None = None
    ) -> str | None:
        """The reason why it cannot take such a call now, or None.

        Args:
            device_type: Device type of the tensors.
            dtype: Dtype of the activations.
            states: Number of states of a channel; None for an op without states.
        """
        devices = self.devices() if callable(self.devices) else self.devices
        if devices is not None and device_type not in devices:
            return f'it takes {"/".join(devices)} tensors, not {device_type}'
        if dtype not in self.dtypes:
            known = ', '.join(str(d).removeprefix('torch.') for d in self.dtypes)
            return f'it takes {known}, not {str(dtype).removeprefix("torch.")}'
        if not (self.states is None or states is None or states in self.states):
            return f'it takes {_numbers(self.states)} states, not {states}'
        if not self.deterministic and _only_deterministic():
            return (
                'its gradients differ from run to run, and '
                'torch.use_deterministic_algorithms(True) is set'
            )
        return self.unavailable()


CPU = Supplier(
    'cpu',
    'compiled for the CPU',
    unavailable=library.unavailable,
    devices=('cpu',),
    dtypes=(torch.float32, torch.bfloat16),
)
CUDA = Supplier(
    'cuda',
    'own CUDA kernels',
    unavailable=cuda_kernels.unavailable,
    devices=cuda_kernels.devices,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    states=range(1, 257),
    checked=('cuda',),
)
MAMBA_SSM = Supplier(
    'mamba_ssm',
    "the package's own kernels; not the same bits run after run",
    unavailable=mamba_ssm.unavailable,
    devices=('cuda',),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    states=range(1, 257),
    deterministic=False,
    last_state_gradient=False,
)
TORCH = Supplier('torch', 'plain tensor code, any device, nothing compiled')
REFERENCE = Supplier(
    'reference', 'the definition, one position at a time; slow', automatic=False
)

# By name, in order of preference.
suppliers: dict[str, Supplier] = {
    supplier.name: supplier for supplier in (CPU, CUDA, MAMBA_SSM, TORCH, REFERENCE)
}
# Those of this package.
OURS = frozenset(suppliers)
_forced: list[str] = []


def add_supplier(supplier: Supplier) -> None:
    """Put a supplier before the others; does nothing if its name is there already."""
    if supplier.name not in suppliers:
        others = dict(suppliers)
        suppliers.clear()
        suppliers.update({supplier.name: supplier}, **others)


def remove_supplier(name: str) -> None:
    """Remove a supplier that :func:`add_supplier` added."""
    if name not in OURS:
        del suppliers[name]


def list_backends() -> list[str]:
    """Names of all scan backends, in order of preference."""
    return list(suppliers)


def backend_status() -> dict[str, str | None]:
    """For every backend the reason why it cannot run here, or None if it can."""
    return {name: backend.unavailable() for name, backend in suppliers.items()}


def backend_summary(name: str) -> str:
    """One line that describes the backend."""
    return _get(name).summary


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every scan inside the ``with`` block use one backend.

    Args:
        name: One of :func:`list_backends`.

    Raises:
        ValueError: The name is unknown.
    """
    _get(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    requested: str | None = None,
    *,
    states: int | None = None,
    last_state: bool = False,
    op: str = 'selective_scan',
    among: Container[str] = OURS,
) -> str:
    """Name of the backend that a call gets.

    On a GPU whose kernels are not checked yet, it runs the check first.

    Args:
        device: Device of the tensors: ``'cpu'``, ``'cuda'`` ...
        dtype: Dtype of the activations.
        requested: The caller's ``backend=`` argument.
        states: Number of states of a channel; None for an op without states.
        last_state: Whether the caller wants a scan's last state.
        op: Name of the op.
        among: Backends that may be used by default.

    Returns:
        The requested backend; if there is none, that of the innermost
        :func:`use_backend`; if there is none, that of ``MMVSSM_SCAN_BACKEND``; if that
        is not set, the first backend that takes the tensors and, if it needs a check,
        has passed it.

    Raises:
        ValueError: The name is unknown.
        BackendUnavailableError: The named backend cannot take the tensors.
    """
    device_type, index = _kind(device)
    call = device_type, dtype, states
    name = requested or (_forced[-1] if _forced else _from_environment())
    if name:
        reason = _get(name).refuses(*call)
        if reason:
            raise BackendUnavailableError(
                f"the scan backend '{name}' cannot run: {reason}. "
                f'Name no backend, or one of {_servers(*call)}'
            )
        return name
    checked, other = _candidates(call, last_state, among)
    if checked is None:
        return other
    reason = checked.refuses(*call)
    if reason is None:
        reason = choice.objection(checked.name, op, device_type, index, other)
    elif reason == checked.unavailable():
        choice.warn_unavailable(checked.name, reason)
    return other if reason else checked.name


def explain_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    requested: str | None = None,
    *,
    states: int | None = None,
    last_state: bool = False,
    op: str = 'selective_scan',
    among: Container[str] = OURS,
) -> dict[str, str]:
    """Explain which backend a call gets, and why.

    It does not run the check of the GPU kernels. If there is no verdict yet, it says
    so.

    Args:
        device, dtype, requested, states, last_state, op, among: See
            :func:`choose_backend`.

    Returns:
        For every backend, in order of preference, one line that begins with
        ``chosen``, ``not needed``, ``not used``, ``used only when named`` or ``cannot
        run``.

    Raises:
        ValueError: The name is unknown.
        BackendUnavailableError: The named backend cannot take such a call, or no
            backend can.
    """
    device_type, index = _kind(device)
    call = device_type, dtype, states
    asked = requested or (_forced[-1] if _forced else _from_environment())
    why, objection = 'the first usable backend in this list', ''
    if asked:
        chosen = choose_backend(device, dtype, asked, states=states)
        checked, why = None, _who_asks(requested)
    else:
        checked, chosen = _candidates(call, last_state, among)
        if checked is not None and not checked.refuses(*call):
            of_check = checked.name, op, device_type, index, chosen
            passed, text = choice.explanation(*of_check)
            if passed:
                chosen, why = checked.name, text
            else:
                objection = text
    found = {}
    for name, backend in suppliers.items():
        reason = backend.refuses(*call)
        if name == chosen:
            found[name] = f'chosen: {why}'
        elif reason:
            found[name] = f'cannot run: {reason}'
        elif checked is backend and objection:
            found[name] = f'not used: {objection}'
        elif not _by_default(backend, device_type, last_state):
            found[name] = 'used only when named'
        else:
            found[name] = f'not needed: {chosen} is used'
    return found


def _candidates(
    call: tuple[str, torch.dtype, int | None],
    last_state: bool,
    among: Container[str],
) -> tuple[Supplier | None, str]:
    """The backend to use if its check passes (or None), and the one to use if not.

    Raises:
        BackendUnavailableError: No backend takes the call.
    """
    device_type, dtype, _ = call
    checked = None
    for supplier in suppliers.values():
        if supplier.name not in among:
            continue
        if not _by_default(supplier, device_type, last_state):
            continue
        if supplier.checked:
            checked = checked or supplier
        elif not supplier.refuses(*call):
            return checked, supplier.name
    raise BackendUnavailableError(
        f'no scan backend takes {dtype} tensors on {device_type}; '
        f'python -m mmvssm.collect_env lists the backends'
    )


def _by_default(supplier: Supplier, device_type: str, last_state: bool) -> bool:
    """Whether it may be used for such a call without being named."""
    fits = not supplier.checked or device_type in supplier.checked
    gradient = supplier.last_state_gradient or not last_state
    return supplier.automatic and fits and gradient


def _kind(device: torch.device | str) -> tuple[str, int | None]:
    """Type and index of a device."""
    if isinstance(device, str):
        device = torch.device(device)
    return device.type, device.index


def _who_asks(requested: str | None) -> str:
    if requested:
        return 'named by backend='
    return 'named by use_backend' if _forced else f'named by {ENV_VARIABLE}'


def _from_environment() -> str:
    return os.environ.get(ENV_VARIABLE, '')


def _get(name: str) -> Supplier:
    if name not in suppliers:
        raise ValueError(f"unknown scan backend '{name}'; known are {list_backends()}")
    return suppliers[name]


def _servers(
    device_type: str, dtype: torch.dtype, states: int | None = None
) -> list[str]:
    return [
        name
        for name, backend in suppliers.items()
        if not backend.refuses(device_type, dtype, states)
    ]


def _only_deterministic() -> bool:
    """Whether torch must raise an error where bits may differ."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def _numbers(numbers: Collection[int]) -> str:
    if isinstance(numbers, range):
        return f'{numbers.start} to {numbers[-1]}'
    return '/'.join(map(str, numbers))
