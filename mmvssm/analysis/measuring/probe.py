"""Peak memory of a step, and whether it fits, found out in a process of its own.

What is too large or too slow ends that process and not the benchmark.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from mmvssm.analysis.measuring import process_memory
from mmvssm.analysis.measuring.steps import (
    Case,
    Contender,
    make_step,
    weight_bytes,
)
from mmvssm.analysis.measuring.timing import reason

# Part of the memory of the machine that a contender may take: while they take turns,
# pieces that they leave between one another are lost.
_PART = 0.7
# Seconds in which a model is built and, where it is to be, compiled.
_BUILD = 300
_COMPILE = 1800
# How a process ends that finds no memory: the system kills it, or a library that does
# not check what it was given crashes. oneDNN is one.
_SHORT_OF_MEMORY = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT)
# Seconds of a first step, after which a second one would tell nothing new.
_SLOW = 3


class Unfit(Exception):
    """Why a contender is left out."""


def start(models: list[str]) -> None:
    """Let probes of these models find their modules imported (not on Windows)."""
    swin = any('swin' in model for model in models)
    modules = ['mmvssm.engine', *['mmseg.models.backbones'] * swin]
    if hasattr(_context(), 'set_forkserver_preload'):
        _context().set_forkserver_preload(modules)


def probe(
    contender: Contender, case: Case, longest: float, work: Callable | None = None
) -> dict:
    """Take a step or two in a new process.

    Args:
        longest: Seconds that a step may take.
        work: What that process does, see :func:`step`.

    Returns:
        ``parameters``, and ``peak_bytes`` where the system counts them.

    Raises:
        Unfit: It takes too long, or more memory than there is, or fails.
    """
    parent, child = _context().Pipe()
    limit = None
    if process_memory.possible():
        limit = int(_PART * process_memory.available())
    process = _context().Process(
        target=_run, args=(child, work or step, contender, case, limit), daemon=True
    )
    process.start()
    child.close()
    built = _BUILD + _COMPILE * contender.compiled
    try:
        _next(parent, process, built, 'cannot be built')
        # With the margin of a first step and of a process that is new.
        seconds = _next(parent, process, 2 * longest + 1, f'over {longest:g} s a step')
        if seconds > longest:
            raise Unfit(f'over {longest:g} s a step')
        return _next(parent, process, 2 * longest + 1, f'over {longest:g} s a step')
    finally:
        process.kill()
        process.join()
        parent.close()


def _next(
    connection: Connection,
    process: multiprocessing.process.BaseProcess,
    seconds: float,
    otherwise: str,
) -> object:
    """What the process says next; Unfit with ``otherwise`` if it says nothing."""
    if not connection.poll(seconds):
        raise Unfit(otherwise)
    try:
        failed, found = connection.recv()
    except EOFError:
        process.join()
        ended = f'its process ended with code {process.exitcode}'
        if process.exitcode in _SHORT_OF_MEMORY:
            ended += ', most likely for want of memory'
        raise Unfit(ended) from None
    if failed:
        raise Unfit(found)
    return found


def _run(
    connection: Connection,
    work: Callable,
    contender: Contender,
    case: Case,
    limit: int | None,
) -> None:
    try:
        work(contender, case, limit, lambda found: connection.send((False, found)))
    except MemoryError:
        connection.send((True, f'needs more than {limit / 1e9:.1f} GB of memory'))
    except Exception as error:
        text = reason(error)
        # The last is oneDNN's, which found no room for the code of a product.
        signs = ('memory', 'bad_alloc', 'could not create a primitive')
        if limit and any(sign in text for sign in signs):
            text = f'needs more than {limit / 1e9:.1f} GB of memory'
        connection.send((True, text))


def step(
    contender: Contender,
    case: Case,
    limit: int | None,
    say: Callable[[object], None],
) -> None:
    """Say when the model is built, how long a step takes, and what it needs."""
    torch.set_num_threads(case.threads)
    if limit:
        process_memory.hold_only_what_lives()
        _limit(process_memory.data() + limit)
    model = contender.build(case.size)
    run = make_step(model, case, contender)
    if contender.compiled:
        run()
    say('built')
    rise, seconds = _measured(run, limit is not None)
    say(seconds)
    if seconds < _SLOW:
        # The first one also made what the libraries keep for later steps.
        rise, _ = _measured(run, limit is not None)
    found = dict(parameters=sum(p.numel() for p in model.parameters()))
    if limit:
        found['peak_bytes'] = weight_bytes(model) + rise
    say(found)


def _measured(run: Callable[[], None], counted: bool) -> tuple[int, float]:
    """Bytes that a step takes beyond what is held before it, and its seconds."""
    before = 0
    if counted:
        process_memory.reset_peak()
        before = process_memory.held()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return (process_memory.peak() - before if counted else 0), seconds


def _limit(size: int) -> None:
    """Let this process ask for no more than ``size`` bytes (Linux)."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size, most))


def _context() -> multiprocessing.context.BaseContext:
    known = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context('forkserver' if 'forkserver' in known else None)
