"""The process of a command-line tool."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.runner import FlexibleRunner, Runner
from torch import distributed

from mmvssm.checkpoints import CheckpointError
from mmvssm.engine.checkpoints.loaders import install_safe_loaders
from mmvssm.engine.configs.explain import explain
from mmvssm.engine.errors import UsageError
from mmvssm.errors import MissingPackageError

from .memory import keep_freed_memory
from .quiet import silence_noise
from .ranks import rank_by_launcher
from .work_dir import release_work_dirs

# When rank 0 has ended, its launcher ends all others well within this time.
_SECONDS_TO_BE_ENDED = 10


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command-line tool and exit.

    The process keeps the memory it frees, see :func:`keep_freed_memory`, all
    checkpoints are read safely, see :func:`install_safe_loaders`, and messages that
    are no fault do not show, see :func:`silence_noise`.

    Every error ends in one sentence, said once however many processes run the tool; of
    an error that rank 0 does not have it names the rank. ``MMVSSM_DEBUG=1`` shows its
    traceback as well, and all messages. The exit code is

    - 2 after a mistake of the user's: a :class:`UsageError`, a checkpoint that cannot
      be used, or what :func:`~mmvssm.engine.configs.explain.explain` finds in a config;
    - 1 after anything else. If a runner was built, the traceback is in ``error.txt``
      beside its log, or in ``error_rankN.txt``;
    - 130 after Ctrl-C.

    Args:
        main: The tool; returns the exit code, None for 0.
    """
    keep_freed_memory()
    install_safe_loaders()
    if not _debugs():
        silence_noise()
    try:
        code = main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code, text = _describe(error)
        if _debugs():
            traceback.print_exception(error)
        _say(text)
    finally:
        release_work_dirs()
    if code != 1 and distributed.is_available() and distributed.is_initialized():
        # Left to the end of the interpreter, the threads of a process group may
        # abort the process there, after all is done. After a crash, others may
        # still wait for this process, and so would it for them.
        distributed.destroy_process_group()
    sys.exit(code)


def _debugs() -> bool:
    return os.environ.get('MMVSSM_DEBUG', '0') not in ('', '0')


def _describe(error: Exception) -> tuple[int, str]:
    """The exit code, and the sentence."""
    if isinstance(error, (UsageError, CheckpointError, MissingPackageError)):
        return 2, _message(error)
    # The error itself must not be lost to another one.
    with suppress(Exception):
        if said := explain(error):
            return 2, said
    said = _message(error) or traceback.extract_tb(error.__traceback__)[-1].line
    text = f'{type(error).__name__}: {said}'.rstrip('.: ')
    if isinstance(error, torch.OutOfMemoryError):
        text = f'{text}. Take fewer or smaller images at a time, --amp, or with_cp=True'
    file = _write_traceback(error)
    where = f'the traceback is in {file}' if file else 'MMVSSM_DEBUG=1 shows where'
    return 1, (
        f'{text} (unexpected: {where}; if neither your config nor your data explain '
        'it, please report it with that)'
    )


def _message(error: Exception) -> str:
    """What an error says, without a traceback that it may hold."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = str(said).strip()
    before, worker, trace = text.partition('Original Traceback')
    if worker:
        # torch has the error of another process in the text of this one.
        lines = [line for line in trace.splitlines()[1:] if not line.startswith(' ')]
        text = '\n'.join(lines).strip() or before
    if isinstance(error, (UsageError, CheckpointError)):
        return text
    return text.partition('\n')[0][:500]


def _write_traceback(error: Exception) -> Path | None:
    """Write it beside the log of the runner that was at work, if there was one."""
    folder = _log_dir(error)
    if folder is None:
        return None
    rank = rank_by_launcher()
    path = Path(folder, f'error_rank{rank}.txt' if rank else 'error.txt')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(traceback.format_exception(error)))
    except OSError:  # Such as a full disk, which may be the error itself.
        return None
    return path


def _log_dir(error: Exception) -> str | None:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            if isinstance(value, (Runner, FlexibleRunner)):
                return getattr(value, '_log_dir', None)
    return None


def _say(text: str) -> None:
    """Print an error, unless rank 0 has the same.

    When one process ends, its launcher ends all others. So rank 0 speaks at once, and
    another one only if nobody has ended it for a while.
    """
    rank = rank_by_launcher()
    if rank:
        for name in {'SIGTERM', 'SIGUSR1'} & set(dir(signal)):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        time.sleep(_SECONDS_TO_BE_ENDED)
    print(f'error (rank {rank}): {text}' if rank else f'error: {text}', file=sys.stderr)
