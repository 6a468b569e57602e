"""Verdicts on a backend's kernels, kept on disk: one file for each kind of machine.

The name of the file is a digest of everything that can change a verdict: the GPU, its
driver, torch, the compiler and the sources of the ops.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmvssm.ops.cache import cache_folder
from mmvssm.ops.cuda import kernels

# '0': kernels are used only when named. 'trust': they are used without a check.
VARIABLE = 'MMVSSM_GPU_CHECK'
# How to check by hand.
HOW = 'python -m mmvssm.check_gpu'
# The name of the set with everything.
ALL = 'all'
# Seconds until a failure that may pass, such as a lack of memory, is checked again.
_UNCERTAIN_SECONDS = 600
_DRIVER = Path('/sys/module/nvidia/version')


@dataclass
class Verdict:
    """The result of the check of an op's kernels.

    Attributes:
        checked: Time of the check, in seconds since 1970.
        cases: Number of calls that were checked.
        failure: What was wrong (the call, the tensor, the error), or None.
        certain: Whether another check would find the same failure.
        milliseconds: For each backend, the time of the forward and backward passes of
            all calls that are timed.
    """

    checked: float = field(default_factory=time.time)
    cases: int = 0
    failure: str | None = None
    certain: bool = True
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether it still counts."""
        return self.certain or time.time() < self.checked + _UNCERTAIN_SECONDS

    def objection(self, backend: str, other: str) -> str | None:
        """The reason why a backend is not used instead of another one, or None."""
        if self.failure:
            return f'its check failed on this machine ({self.when}): {self.failure}'
        ours, theirs = (self.milliseconds.get(name) for name in (backend, other))
        if ours is not None and theirs is not None and not ours < theirs:
            return (
                f'its results are right, but {other} is faster on this machine '
                f'({self.when}): {theirs:.3g} against {ours:.3g} ms'
            )
        return None

    def praise(self, backend: str, other: str) -> str:
        """The reason why a backend is used, if there is no objection."""
        ours, theirs = (self.milliseconds.get(name) for name in (backend, other))
        text = f'checked on this machine ({self.when}): {self.cases} calls are right'
        if ours and theirs:
            text += f', {theirs / ours:.1f} times as fast as {other}'
        return text

    @property
    def when(self) -> str:
        """The time of the check, in words."""
        return time.strftime('%Y-%m-%d %H:%M', time.localtime(self.checked))


# Verdicts by the name of the set (an op, 'all', the calls of a model), then by op.
Sets = dict[str, dict[str, Verdict]]


def standing(sets: Sets, op: str, names: Sequence[str]) -> Verdict | None:
    """The verdict that counts for an op.

    Args:
        sets: All verdicts.
        op: Name of the op.
        names: Names of sets; to pass one of them is enough.

    Returns:
        The last failed verdict of any set, if there is one: kernels that are wrong in
        one place are not trusted in another. If not, the first passed verdict of the
        named sets. If not, a check that could not be made. None if none of the named
        sets was checked.
    """
    every = [found[op] for found in sets.values() if op in found]
    wrong = [verdict for verdict in every if verdict.failure and verdict.certain]
    if wrong:
        return max(wrong, key=lambda verdict: verdict.checked)
    of_names = [sets[name][op] for name in names if op in sets.get(name, {})]
    passed = (verdict for verdict in of_names if not verdict.failure)
    return next(passed, of_names[0] if of_names else None)


class Store:
    """The verdicts of this kind of machine.

    Attributes:
        machine: Everything that the verdicts depend on.
        path: The file.

    Args:
        device: The device that is checked.
    """

    def __init__(self, device: torch.device):
        self.machine = machine(device)
        about = json.dumps(self.machine, sort_keys=True)
        name = hashlib.sha256(about.encode()).hexdigest()[:16]
        self.path = cache_folder() / 'gpu_check' / f'{name}.json'

    def read(self) -> Sets:
        """All valid verdicts; none if the file is missing or damaged."""
        try:
            found = json.loads(self.path.read_text(encoding='utf-8'))['sets']
            sets = {
                name: {op: Verdict(**verdict) for op, verdict in verdicts.items()}
                for name, verdicts in found.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {
            name: verdicts
            for name, verdicts in sets.items()
            if all(verdict.holds for verdict in verdicts.values())
        }

    def forget(self) -> None:
        """Remove all of them."""
        self.path.unlink(missing_ok=True)

    def add(self, name: str, verdicts: dict[str, Verdict]) -> None:
        """Keep the verdicts on a set of calls. Call it under :meth:`lock`.

        Raises:
            OSError: The file cannot be written.
        """
        sets = self.read() | {name: verdicts}
        content: dict[str, Any] = dict(
            machine=self.machine,
            sets={
                name: {op: asdict(verdict) for op, verdict in found.items()}
                for name, found in sets.items()
            },
        )
        beside = self.path.with_suffix(f'.{os.getpid()}')
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=1), encoding='utf-8')
        # A reader must find either the old file or the new one.
        beside.replace(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process of the machine in at a time.

        If the lock file cannot be made, all processes go in. The processes of a
        training wait here for each other. They do not communicate, because some of them
        may never come here.
        """
        try:
            import fcntl

            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.with_name('lock').open('w')
        except (ImportError, OSError):
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def machine(device: torch.device) -> dict[str, str]:
    """Everything that a verdict on a device depends on."""
    found = dict(torch=torch.__version__, sources=_sources())
    if device.type != 'cuda':
        return found | dict(device=device.type)
    gpu = torch.cuda.get_device_properties(device)
    driver = _DRIVER.read_text().strip() if _DRIVER.exists() else 'unknown'
    compiler = kernels.compiler().version if kernels.unavailable() is None else 'none'
    return found | dict(
        device=gpu.name,
        capability=f'{gpu.major}.{gpu.minor}',
        driver=driver,
        cuda=str(torch.version.cuda),
        compiler=compiler,
    )


@cache
def _sources() -> str:
    """A digest of all sources of the ops."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.suffix in ('.py', '.cu', '.h', '.cpp'):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
