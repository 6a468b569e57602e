"""Messages between the process that checks and its parent, as JSON.

The parent writes one :class:`Job` to the standard input of the process, and reads a
line of its standard output for every step. So the parent knows which step was running
when the process died or hung.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mmvssm.ops.gpu_check.calls import OpCall

# Marks a line for the parent: libraries may print other lines.
MARK = 'mmvssm-gpu-check '


class Task(NamedTuple):
    """One step.

    Attributes:
        kind: ``'check'``: check the call. ``'time'``: measure its time.
        backend: Name of the backend.
        call: The call.
        repeats: For a check, how often the bits are compared.
    """

    kind: Literal['check', 'time']
    backend: str
    call: OpCall
    repeats: int = 0

    @property
    def what(self) -> str:
        """The step in words."""
        return self.call.text() + (
            ' while its time was measured' * (self.kind == 'time')
        )

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return self._asdict() | dict(call=self.call.as_json())

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> 'Task':
        """The step from what :meth:`as_json` returned."""
        return cls(**found | dict(call=OpCall.from_json(found['call'])))


@dataclass
class Job:
    """The work of one process.

    Attributes:
        backend: Name of the backend with the kernels.
        device: The device, such as ``'cuda:0'``.
        fault: On the CPU: what is broken on purpose, see ``stand_in.py``.
        tasks: The steps.
        training, inference: More calls, whose kernels are compiled.
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
        """The job from what :meth:`as_json` returned."""
        return cls(
            **found
            | dict(
                tasks=[Task.from_json(task) for task in found['tasks']],
                training=[OpCall.from_json(call) for call in found['training']],
                inference=[OpCall.from_json(call) for call in found['inference']],
            )
        )
