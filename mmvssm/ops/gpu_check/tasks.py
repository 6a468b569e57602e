"""What the process that checks is told, and what it tells, as JSON.

The parent writes one :class:`Job` to its standard input and reads a line of standard
output for every step. So it knows what was going on when the process died or hung.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mmvssm.ops.gpu_check.calls import OpCall

# Before every line that is meant for the parent: libraries print what they like.
MARK = 'mmvssm-gpu-check '


class Task(NamedTuple):
    """One step.

    Attributes:
        kind: ``'check'``: is the call right? ``'time'``: how long does it take?
        backend: By which backend.
        call: The call.
        repeats: Of a check: how often the bits are compared.
    """

    kind: Literal['check', 'time']
    backend: str
    call: OpCall
    repeats: int = 0

    @property
    def what(self) -> str:
        """The step in words."""
        return self.call.text() + (' while its time was taken' * (self.kind == 'time'))

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return self._asdict() | dict(call=self.call.as_json())

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> 'Task':
        """The step that :meth:`as_json` described."""
        return cls(**found | dict(call=OpCall.from_json(found['call'])))


@dataclass
class Job:
    """What a process is to do.

    Attributes:
        backend: Whose kernels are checked.
        device: On which device, such as ``'cuda:0'``.
        fault: On the CPU: what is broken on purpose, see ``stand_in.py``.
        tasks: The steps.
        training, inference: Further calls whose kernels are to be compiled.
    """

    backend: str
    device: str
    fault: str | None
    tasks: list[Task]
    training: list[OpCall]
    inference: list[OpCall]

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return vars(self) | dict(
            tasks=[task.as_json() for task in self.tasks],
            training=[call.as_json() for call in self.training],
            inference=[call.as_json() for call in self.inference],
        )

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> 'Job':
        """The job that :meth:`as_json` described."""
        return cls(
            **found
            | dict(
                tasks=[Task.from_json(task) for task in found['tasks']],
                training=[OpCall.from_json(call) for call in found['training']],
                inference=[OpCall.from_json(call) for call in found['inference']],
            )
        )
