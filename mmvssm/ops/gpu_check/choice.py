"""Answers ``backends.py``: may the kernels of a backend be used by default?

They may if the check on this machine found them right, and faster than the backend that
would be used instead. The first question runs the check, once on a machine. The check
has its own process, so it can run at any time, except while a CUDA graph is captured.

The rest of the check imports ``backends.py``, which imports this file. So this file
must not import the rest; ``run.py`` passes in the function that checks an op.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch

from mmvssm.ops.gpu_check.verdicts import (
    ALL,
    HOW,
    VARIABLE,
    Sets,
    Store,
    Verdict,
    standing,
)
from mmvssm.ops.typed import assume_constant_result

_REPORT = (
    f'Please report it with the output of `{HOW} --all --json` and of '
    f'`python -m mmvssm.collect_env`.'
)
# The verdicts of this process by device and op, and the answers made from them.
_known: dict[tuple[torch.device, str], Verdict] = {}
_answers: dict[tuple[object, ...], str | None] = {}
_check: Callable[[str, torch.device, str], Sets] | None = None


def set_check(check: Callable[[str, torch.device, str], Sets]) -> None:
    """Set the function that checks an op; it gets its name, the device, the backend."""
    global _check
    _check = check


# torch.compile calls this once and does not trace it: a graph needs the answer first.
@assume_constant_result
def objection(
    backend: str, op: str, device_type: str, index: int | None, other: str
) -> str | None:
    """The reason why the kernels of a backend are not used by default, or None.

    Args:
        backend: Name of the backend with the kernels.
        op: Name of the op.
        device_type, index: Device of the tensors.
        other: The backend that would be used instead.
    """
    # This runs in every call of an op.
    asked = backend, op, device_type, index, other, os.environ.get(VARIABLE)
    if asked in _answers:
        return _answers[asked]
    device = _device(device_type, index)
    verdict = None if _switch() is not None else _settled(backend, op, device)
    found = _objection(verdict, backend, other)
    if found and _switch() is None:
        text = f'the kernels of {op} are not used, {other} is: {found}'
        _warn(f'{text}. {_REPORT}' if verdict else text)
    if verdict is not None:
        _answers[asked] = found
    return found


def explanation(
    backend: str, op: str, device_type: str, index: int | None, other: str
) -> tuple[bool, str]:
    """Whether the kernels are used, and the reason. This never runs the check."""
    verdict = _looked_up(op, _device(device_type, index))
    found = _objection(verdict, backend, other)
    if found is None and verdict is not None and _switch() is None:
        return True, verdict.praise(backend, other)
    return found is None, found or f'not checked, because {VARIABLE}=trust is set'


def settle(device: torch.device, verdicts: dict[str, Verdict]) -> None:
    """Use these verdicts (by op) from now on."""
    _known.update({(device, op): verdict for op, verdict in verdicts.items()})
    _answers.clear()


def forget() -> None:
    """Forget all verdicts and warnings."""
    _known.clear()
    _answers.clear()
    _warn.cache_clear()


@assume_constant_result
def warn_unavailable(backend: str, reason: str) -> None:
    """Warn once that the kernels cannot run on this GPU, and why."""
    if torch.cuda.is_available():
        _warn(f'the kernels of the scan backend {backend!r} cannot run: {reason}')


def _switch() -> bool | None:
    """Whether kernels are used without a check; None if the check decides."""
    return {'0': False, 'trust': True}.get(os.environ.get(VARIABLE, ''))


def _objection(verdict: Verdict | None, backend: str, other: str) -> str | None:
    if _switch() is not None:
        return None if _switch() else f'{VARIABLE}=0 turns its check off'
    if verdict is None:
        return f'not checked on this machine yet; run {HOW}'
    return verdict.objection(backend, other)


def _settled(backend: str, op: str, device: torch.device) -> Verdict | None:
    """The verdict on an op. If there is none yet, the op is checked."""
    found = _looked_up(op, device)
    if found is None and _check is not None and not _capturing(device):
        found = standing(_check(op, device, backend), op, (op, ALL))
    if found is not None:
        _known[device, op] = found
    return found


def _looked_up(op: str, device: torch.device) -> Verdict | None:
    """The verdict on an op that this process or the disk has."""
    found = _known.get((device, op))
    return found or standing(Store(device).read(), op, (op, ALL))


def _capturing(device: torch.device) -> bool:
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


def _device(device_type: str, index: int | None) -> torch.device:
    if device_type == 'cuda' and index is None:
        index = torch.cuda.current_device()
    return torch.device(device_type if index is None else f'{device_type}:{index}')


@cache
def _warn(text: str) -> None:
    # The line of code that came first is of no interest.
    warnings.warn(f'mmvssm: {text}', stacklevel=2)
