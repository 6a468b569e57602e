"""Times of several functions that take turns, so that noise hits them all."""

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

# Calls of a function that are timed however slow it is.
_FEWEST_CALLS = 3


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Turns of each function.
        turn: Seconds a turn lasts at least; one call if it takes longer.
        limit: Seconds of timed calls after which a function that had three
            of them gets no further turn.
    """

    rounds: int = 15
    turn: float = 0.02
    limit: float = 1.5


def interleaved(
    functions: dict[Hashable, Callable[[], object]], effort: Effort
) -> dict[Hashable, dict]:
    """Time functions in turn.

    A turn starts with a call that is not counted, which finds the caches full
    of the others' data, unless a call takes longer than a turn.

    Args:
        functions: One that returns a float has measured itself, and what it
            returns is the sample.
        effort: How long to measure.

    Returns:
        For each function ``median``, ``fastest`` and the number of ``calls``.
    """
    return {
        name: dict(
            median=statistics.median(taken), fastest=min(taken), calls=len(taken)
        )
        for name, taken in samples(functions, effort).items()
    }


def samples(
    functions: dict[Hashable, Callable[[], object]], effort: Effort
) -> dict[Hashable, list[float]]:
    """Every sample of functions that take turns, see :func:`interleaved`."""
    taken = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    last = {name: _timed(function)[0] for name, function in functions.items()}
    for _ in range(effort.rounds):
        for name, function in functions.items():
            if spent[name] > effort.limit and len(taken[name]) >= _FEWEST_CALLS:
                continue
            if last[name] < effort.turn:
                function()
            calls, turn = 0, 0.0
            while not calls or turn < effort.turn:
                last[name], sample = _timed(function)
                taken[name].append(sample)
                calls, turn = calls + 1, turn + last[name]
            spent[name] += turn
    return taken


def _timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and the sample it gives."""
    start = time.perf_counter()
    found = function()
    seconds = time.perf_counter() - start
    return seconds, found if isinstance(found, float) else seconds


def reason(error: Exception) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:160]}'
