"""The process of a command-line tool."""

import os
import sys
from collections.abc import Callable

from torch import distributed

from mmvssm.checkpoints import CheckpointError
from mmvssm.engine.checkpoints.loaders import install_safe_loaders
from mmvssm.engine.errors import UsageError

from .memory import keep_freed_memory


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command-line tool and exit.

    The process keeps the memory it frees, see :func:`keep_freed_memory`, and all
    checkpoints are read safely, see :func:`install_safe_loaders`.
    A :class:`UsageError` or a checkpoint that cannot be used ends in its
    message and exit code 2, said once however many processes run the tool.
    Anything else keeps its traceback: it is a bug.

    Args:
        main: The tool; returns the exit code, None for 0.
    """
    keep_freed_memory()
    install_safe_loaders()
    try:
        code = main()
    except (UsageError, CheckpointError) as error:
        rank = os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))
        if rank == '0':
            print(f'error: {error}', file=sys.stderr)
        code = 2
    if distributed.is_available() and distributed.is_initialized():
        # Left to the end of the interpreter, the threads of a process group may
        # abort the process there, after all is done.
        distributed.destroy_process_group()
    sys.exit(code)
