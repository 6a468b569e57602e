"""Random numbers that go on where a training was stopped."""

import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


def get_rng_state() -> dict:
    """States of the generators of Python, NumPy, torch and the current GPU.

    Returns:
        Tensors, numbers and tuples of them alone, which
        ``torch.load(weights_only=True)`` reads.
    """
    name, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), *rest),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Set what :func:`get_rng_state` returned, in this process or another."""
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def isolate_loader(loader: DataLoader, seed: int) -> None:
    """Keep a loader from drawing of the process's generator, and signals from it.

    torch draws a number for every iterator it makes. A resumed training makes
    one more than a training that ran through, and all its later numbers
    would differ.

    Signals for the training reach its workers, too, where a cluster sends
    them to all processes of a job. The training stops by itself; until then
    it needs them.

    Args:
        loader: Changed in place, before an iterator of it is made.
        seed: Of the loader's own generator.
    """
    loader.generator = torch.Generator().manual_seed(seed)
    loader.worker_init_fn = _DeafWorker(loader.worker_init_fn)


class _DeafWorker:
    """Start a worker that stops for nobody but its parent."""

    def __init__(self, inner: Callable | None):
        self.inner = inner

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if hasattr(signal, 'sigwaitinfo'):  # macOS has none.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_for_parent, daemon=True).start()
        if self.inner is not None:
            self.inner(worker)


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class BatchSeeds:
    """Seed a loader's workers anew for every batch.

    The augmentation of a batch then depends on the seed, the rank and the
    number of the batch alone, and not on what the worker has made before: a
    resumed training makes the same batches without making the earlier ones.

    Without workers the loader draws from the process's generators, whose
    states are in the checkpoint, and nothing needs to be done.
    """

    def __init__(
        self, loader: DataLoader, seed: int, rank: int, length: int | None = None
    ):
        """Change ``loader`` in place.

        Args:
            loader: Its iterator must not have been made.
            seed: The training's.
            rank: Of this process.
            length: Batches an epoch; None: the loader's iterator is endless.
        """
        self.seed, self.rank, self.length = seed, rank, length
        self.epoch, self.next = 0, 0
        self.worker, self.stride = 0, loader.num_workers
        self.init, self.collate = loader.worker_init_fn, loader.collate_fn
        if self.stride:
            loader.worker_init_fn, loader.collate_fn = self._start, self._finish

    def begin(self, first: int, epoch: int = 0) -> None:
        """Say what the next iterator begins with.

        Args:
            first: The number of batches already trained on, in this epoch.
            epoch: Of an endless iterator always 0.
        """
        self.epoch, self.next = epoch, first

    def _start(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        # torch hands the batches to the workers in turn.
        self.worker = worker
        self._advance(worker)

    def _finish(self, samples: list) -> Any:
        batch = self.collate(samples)
        self._advance(self.stride)
        return batch

    def _advance(self, batches: int) -> None:
        self.next += batches
        if self.length is not None and self.next >= self.length:
            # For workers that live on, with the first one's turn again.
            self.epoch, self.next = self.epoch + 1, self.worker
        mixed = np.random.SeedSequence((self.seed, self.rank, self.next, self.epoch))
        words = [int(word) for word in mixed.generate_state(3)]
        random.seed(words[0])
        np.random.seed(words[1])
        torch.manual_seed(words[2])
