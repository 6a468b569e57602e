"""Run the process that checks, with time limits, and make verdicts of its results."""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmvssm.ops import backends
from mmvssm.ops.gpu_check.calls import OpCall
from mmvssm.ops.gpu_check.cases import Case, of_op, with_kernels
from mmvssm.ops.gpu_check.tasks import MARK, Job, Task
from mmvssm.ops.gpu_check.verdicts import VARIABLE, Sets, Store, Verdict
from mmvssm.ops.scan_orders.registry import real_tensors

WORKER = 'mmvssm.ops.gpu_check.worker'
logger = logging.getLogger('mmvssm')
# About the time to start a process with torch, and the time for one call.
_START_SECONDS, _CASE_SECONDS = 8.0, 0.3


@dataclass(frozen=True)
class Limits:
    """Time limits of the process in seconds.

    Attributes:
        start: Limit for its start and all compilation.
        case: Limit for one call; a kernel may hang.
        total: Limit for all calls.
    """

    start: float = 900.0
    case: float = 30.0
    total: float = 60.0


LIMITS = Limits()
# Calls with gradients, and calls without.
KernelsOf = tuple[list[OpCall], list[OpCall]]


def estimate(cases: Sequence[Case]) -> float:
    """About how many seconds the check takes, without compilation."""
    timed = sum(case.timed for case in cases)
    runs = sum(1 + case.repeats / 10 for case in cases)
    return _START_SECONDS + _CASE_SECONDS * (runs + 2 * timed)


def ensure(
    name: str,
    cases_of: Callable[[], list[Case]],
    device: torch.device,
    backend: str,
    *,
    kernels_of: Callable[[], KernelsOf] = lambda: ([], []),
    limits: Limits = LIMITS,
) -> Sets:
    """All verdicts of this machine. If a set of calls has none, it is checked first.

    Args:
        name: Name of the set.
        cases_of: Makes the set.
        device, backend, limits: See :func:`check`.
        kernels_of: Makes more calls, whose kernels are compiled at the same time.
    """
    store = Store(device)
    sets = store.read()
    if name in sets:
        return sets
    with store.lock():
        # Another process may have come first.
        sets = store.read()
        if name in sets:
            return sets
        cases = with_kernels(cases_of(), backend)
        logger.warning(
            'mmvssm checks its GPU kernels, once on this machine: %d calls of %s, '
            'about %.0f s plus the time to compile them (%s=0 turns the check off)',
            *(len(cases), ', '.join(sorted({case.call.op for case in cases}))),
            *(min(estimate(cases), limits.total), VARIABLE),
        )
        more = kernels_of()
        found = check(cases, backend, str(device), kernels_of=more, limits=limits)
        try:
            store.add(name, found)
        except OSError as error:
            logger.warning('the verdict cannot be kept: %s', error)
    return sets | {name: found}


def ensure_op(op: str, device: torch.device, backend: str) -> Sets:
    """All verdicts of this machine. If an op has none, it is checked first."""
    small = device.type == 'cpu'
    # The caller may be in any mode of torch.
    with real_tensors():
        return ensure(op, lambda: of_op(op, small), device, backend)


def check(
    cases: Sequence[Case],
    backend: str,
    device: str,
    *,
    kernels_of: KernelsOf = ([], []),
    fault: str | None = None,
    limits: Limits = LIMITS,
) -> dict[str, Verdict]:
    """Check a backend's kernels in a process of its own.

    Args:
        cases: What to check.
        backend: Name of the backend with the kernels.
        device: The device, such as ``'cuda:0'``.
        kernels_of: More calls whose kernels are compiled at the same time: calls with
            gradients, and calls without.
        fault: On the CPU: what to break on purpose, see ``stand_in.py``.
        limits: Time limits.

    Returns:
        The verdict on each op that has cases.
    """
    run = _Run(Job(backend, device, fault, _tasks(cases, backend), *kernels_of))
    while run.job.tasks:
        run.process(limits)
    return run.verdicts


def _tasks(cases: Sequence[Case], backend: str) -> list[Task]:
    """The steps, op by op: first all checks, then all timings."""
    rivals = [
        supplier.name
        for supplier in backends.suppliers.values()
        if supplier.automatic and not supplier.checked and supplier.name != 'cpu'
    ]
    found: list[Task] = []
    for op in dict.fromkeys(case.call.op for case in cases):
        own = [case for case in cases if case.call.op == op]
        found += [Task('check', backend, case.call, case.repeats) for case in own]
        found += [
            Task('time', name, case.call)
            for name in (backend, *rivals)
            for case in own
            if case.timed
        ]
    return found


class _Run:
    """A running check, which may need several processes."""

    def __init__(self, job: Job):
        self.job = job
        self.verdicts = {task.call.op: Verdict() for task in job.tasks}
        # Seconds of calls so far; starts and compilation do not count.
        self._spent = 0.0
        # Op and backend of times that could not be measured.
        self._untimed: set[tuple[str, str]] = set()

    def process(self, limits: Limits) -> None:
        """Start a process and follow it. Unfinished steps stay in the job."""
        tasks, done, running, trouble = self.job.tasks, 0, False, None
        ready: float | None = None
        process = _Process(self.job)
        try:
            while trouble is None:
                left = limits.total - self._spent
                if ready is not None:
                    left -= time.monotonic() - ready
                wait = limits.start if ready is None else min(limits.case, left)
                event = process.event(wait)
                if event is None and wait == left:
                    reason = f'not finished within {limits.total:g} s'
                    self._give_up(tasks[done:], reason)
                    return
                if event is None:
                    trouble = f'it did not end within {wait:g} s'
                elif 'exit' in event:
                    trouble = event['exit']
                elif 'compiled' in event:
                    ready = time.monotonic()
                elif 'begins' in event:
                    done, running = event['begins'], True
                elif 'ends' in event:
                    done, running = event['ends'] + 1, False
                    self._note(tasks[event['ends']], event)
        finally:
            process.end()
            self._spent += 0.0 if ready is None else time.monotonic() - ready
        if running:
            self._note(tasks[done], dict(failure=trouble))
            done += 1
        elif not done and tasks:
            self._give_up(tasks, f'the check did not start: {trouble}')
            return
        self.job.tasks = [task for task in tasks[done:] if self._goes_on(task)]

    def _note(self, task: Task, found: dict[str, Any]) -> None:
        """Put the result of a step into the verdicts."""
        verdict, failure = self.verdicts[task.call.op], found.get('failure')
        if failure and task.backend != self.job.backend:
            self._untimed.add((task.call.op, task.backend))
            verdict.milliseconds.pop(task.backend, None)
        elif failure:
            verdict.failure = f'{task.what}: {failure}'
            verdict.certain = found.get('certain', True)
        elif task.kind == 'check':
            verdict.cases += 1
        elif (task.call.op, task.backend) not in self._untimed:
            times = verdict.milliseconds
            times[task.backend] = times.get(task.backend, 0.0) + (
                found['milliseconds'] * task.call.count
            )

    def _goes_on(self, task: Task) -> bool:
        op = task.call.op
        return not self.verdicts[op].failure and (op, task.backend) not in self._untimed

    def _give_up(self, tasks: Sequence[Task], reason: str) -> None:
        """Mark the remaining steps as not checked."""
        for task in filter(self._goes_on, tasks):
            verdict = self.verdicts[task.call.op]
            verdict.failure, verdict.certain = reason, False
        self.job.tasks = []


class _Process:
    """The process that checks.

    Args:
        job: Its steps.
    """

    def __init__(self, job: Job):
        # The other process must find the same modules as this one.
        root = str(Path(__file__).resolve().parents[3])
        paths = [root, *(os.path.abspath(path) for path in sys.path)]
        self._errors = tempfile.TemporaryFile('w+', errors='replace')  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, '-m', WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=root,
            env=os.environ | {'PYTHONPATH': os.pathsep.join(paths), VARIABLE: '0'},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._write, args=(json.dumps(job.as_json()),)),
            threading.Thread(target=self._read),
        ]
        for thread in self._threads:
            thread.start()

    def event(self, seconds: float) -> dict[str, Any] | None:
        """Its next event; ``exit`` if it has ended; None if nothing comes in time."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            if line is None:
                return dict(exit=self._how_it_ended())
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found

    def end(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        self._errors.close()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            pipe.write(text)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                self._lines.put(line)
        self._lines.put(None)

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        text = f'the process ended with {code}'
        if code < 0:
            with contextlib.suppress(ValueError):
                text = f'the process died of {signal.Signals(-code).name}'
        return f'{text} ({lines[-1]})' if lines else text
