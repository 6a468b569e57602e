"""Which scan backends there are, which can run here, and which one a call gets.

The choice follows the tensors of the call, never what the machine has. It can
be overridden, in this order, by the ``backend=`` argument of an op, by
:func:`use_backend` and by the environment variable ``MMVSSM_SCAN_BACKEND``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mmvssm.ops.cpu import library
from mmvssm.ops.triton import runtime

ENV_VARIABLE = 'MMVSSM_SCAN_BACKEND'
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here, or not these tensors."""


@dataclass(frozen=True)
class Backend:
    """A supplier of the scan ops.

    Attributes:
        name: What ``backend=`` and ``MMVSSM_SCAN_BACKEND`` call it.
        summary: One line for ``python -m mmvssm.collect_env``.
        unavailable: Returns why this machine cannot run it, or None.
        devices: Device types it takes, None for all.
        dtypes: Activation dtypes it takes.
        automatic: Whether it may be chosen without being asked for.
    """

    name: str
    summary: str
    unavailable: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    automatic: bool = True

    def refuses(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot be served, or None."""
        if self.devices is not None and device_type not in self.devices:
            return f'it takes {"/".join(self.devices)} tensors, not {device_type}'
        if dtype not in self.dtypes:
            known = ', '.join(str(d).removeprefix('torch.') for d in self.dtypes)
            return f'it takes {known}, not {str(dtype).removeprefix("torch.")}'
        return self.unavailable()


# In order of preference.
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            'cpu',
            'compiled for the CPU',
            unavailable=library.unavailable,
            devices=('cpu',),
            dtypes=(torch.float32, torch.bfloat16),
        ),
        Backend(
            'triton',
            'compiled for the GPU by Triton'
            + (', here run by its interpreter' if runtime.INTERPRETED else ''),
            unavailable=runtime.unavailable,
            devices=('cuda', 'cpu') if runtime.INTERPRETED else ('cuda',),
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            # Checked in the interpreter, but not yet run on a GPU.
            automatic=False,
        ),
        Backend('torch', 'plain tensor code, any device, nothing compiled'),
        Backend(
            'reference', 'the definition, one position at a time; slow', automatic=False
        ),
    )
}
_forced: list[str] = []


def list_backends() -> list[str]:
    """Names of all scan backends, in order of preference."""
    return list(_BACKENDS)


def backend_status() -> dict[str, str | None]:
    """For every backend None if this machine can run it, else the reason."""
    return {name: backend.unavailable() for name, backend in _BACKENDS.items()}


def backend_summary(name: str) -> str:
    """One line on what the backend is."""
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
    device_type: str, dtype: torch.dtype, requested: str | None = None
) -> str:
    """Name of the backend that serves tensors of this device and dtype.

    Args:
        device_type: ``'cpu'``, ``'cuda'`` ...
        dtype: Dtype of the activations.
        requested: The caller's ``backend=`` argument.

    Returns:
        The requested backend, else the one of the innermost
        :func:`use_backend`, else the one named by ``MMVSSM_SCAN_BACKEND``,
        else the first that takes the tensors.

    Raises:
        ValueError: The name is unknown.
        BackendUnavailableError: The named backend cannot serve the tensors.
    """
    name = requested or (_forced[-1] if _forced else _from_environment())
    if name:
        reason = _get(name).refuses(device_type, dtype)
        if reason:
            raise BackendUnavailableError(
                f"the scan backend '{name}' cannot run: {reason}. "
                f'Leave the choice to mmvssm, or take one of '
                f'{_servers(device_type, dtype)}'
            )
        return name
    for backend in _BACKENDS.values():
        if backend.automatic and not backend.refuses(device_type, dtype):
            return backend.name
    raise BackendUnavailableError(
        f'no scan backend takes {dtype} tensors on {device_type}; '
        f'python -m mmvssm.collect_env says what each one takes'
    )


def _from_environment() -> str:
    return os.environ.get(ENV_VARIABLE, '')


def _get(name: str) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(f"unknown scan backend '{name}'; known are {list_backends()}")
    return _BACKENDS[name]


def _servers(device_type: str, dtype: torch.dtype) -> list[str]:
    return [
        name
        for name, backend in _BACKENDS.items()
        if not backend.refuses(device_type, dtype)
    ]
