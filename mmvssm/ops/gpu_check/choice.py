"""What the choice of a backend asks: may this one's kernels be taken unasked?

They may where the check of this machine found them right, and faster than what would
be taken in their place. Who asks first has the check run, once for a machine. It runs
in a process of its own, so any time will do but one: while a CUDA graph is captured.

The choice is made in ``backends.py``, on which all of the check is built. So this file
imports nothing of the rest: ``run.py`` hands it the function that checks an op.
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
# Verdicts that this process goes by, by device and op, and what follows from them.
_known: dict[tuple[torch.device, str], Verdict] = {}
_answers: dict[tuple[object, ...], str | None] = {}
_check: Callable[[str, torch.device, str], Sets] | None = None


def set_check(check: Callable[[str, torch.device, str], Sets]) -> None:
    """Say what checks an op (its name, the device, the backend) for the first time."""
    global _check
    _check = check


# torch.compile asks once and does not trace what follows: the answer is there before
# a graph is made of it.
@assume_constant_result
def objection(
    backend: str, op: str, device_type: str, index: int | None, other: str
) -> str | None:
    """Why the kernels of a backend are not to be taken unasked, or None.

    Args:
        backend: Whose kernels.
        op: Name of the op.
        device_type, index: Of the tensors.
        other: The backend that would be taken in its place.
    """
    # It is asked at every call.
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
    """Whether :func:`objection` has none, and why; without running the check."""
    verdict = _looked_up(op, _device(device_type, index))
    found = _objection(verdict, backend, other)
    if found is None and verdict is not None and _switch() is None:
        return True, verdict.praise(backend, other)
    return found is None, found or f'unchecked, as {VARIABLE}=trust asks for'


def settle(device: torch.device, verdicts: dict[str, Verdict]) -> None:
    """Go by these verdicts from now on, by op."""
    _known.update({(device, op): verdict for op, verdict in verdicts.items()})
    _answers.clear()


def forget() -> None:
    """Go by no verdict any longer, and warn anew."""
    _known.clear()
    _answers.clear()
    _warn.cache_clear()


@assume_constant_result
def warn_unavailable(backend: str, reason: str) -> None:
    """Say once that a GPU has no kernels, and why."""
    if torch.cuda.is_available():
        _warn(f'the kernels of the scan backend {backend!r} cannot run: {reason}')


def _switch() -> bool | None:
    """Whether unchecked kernels are to be taken; None if the check decides."""
    return {'0': False, 'trust': True}.get(os.environ.get(VARIABLE, ''))


def _objection(verdict: Verdict | None, backend: str, other: str) -> str | None:
    if _switch() is not None:
        return None if _switch() else f'{VARIABLE}=0 leaves its check out'
    if verdict is None:
        return f'not checked on this machine yet; {HOW} does it'
    return verdict.objection(backend, other)


def _settled(backend: str, op: str, device: torch.device) -> Verdict | None:
    """The verdict on an op, by its own check if there is none yet."""
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
    # Whose line of code it was that came first says nothing.
    warnings.warn(f'mmvssm: {text}', stacklevel=2)
