"""Several processes of this machine that train together through gloo."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def run_ranks(size: int, work: Callable[..., Any], *args: Any) -> list:
    """What ``work(rank, *args)`` returns in each of ``size`` new processes.

    Each has one thread and a process group on gloo.
    """
    os.environ['OMP_NUM_THREADS'] = '1'
    with tempfile.TemporaryDirectory() as folder:
        context = get_context('forkserver')
        # Imported once, not by every process.
        context.set_forkserver_preload(['torch', 'mmseg.apis', 'mmvssm.engine'])
        results = context.SimpleQueue()
        ranks = [
            context.Process(
                target=_run, args=(rank, size, folder, results, work, args), daemon=True
            )
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        found = dict(results.get() for _ in ranks)
        for rank in ranks:
            rank.join()
    failures = [value for value in found.values() if isinstance(value, Exception)]
    if failures:
        raise failures[0]
    return [found[rank] for rank in range(size)]


def _run(
    rank: int, size: int, folder: str, results: Any, work: Callable, args: tuple
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    meeting = Path(folder, 'meeting').as_uri()
    dist.init_process_group('gloo', init_method=meeting, rank=rank, world_size=size)
    try:
        value = work(rank, *args)
    except Exception as error:
        # The others may wait for this one for ever: the parent ends them.
        value = RuntimeError(f'rank {rank}: {type(error).__name__}: {error}')
    results.put((rank, value))
    dist.destroy_process_group()
