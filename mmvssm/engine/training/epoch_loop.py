"""Epochs that go on where a training was stopped."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader, SequentialSampler

from mmvssm.engine.errors import UsageError
from mmvssm.registry import LOOPS

_INFO = 'position_in_epoch'


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's ``EpochBasedTrainLoop`` that also resumes within an epoch.

    Takes the same arguments. A checkpoint that was saved within an epoch, by
    :class:`PreemptionHook` or every so many iterations, says how far the epoch
    was. Training goes on with the batch after it; those before are passed over
    as numbers, without loading an image. If the epoch has another number of
    batches than it had (another data set, batch size or number of processes)
    it is repeated from its start, with a warning.

    The sampler must give the same order for the same epoch, as mmengine's
    ``DefaultSampler`` does, also within a batch sampler.

    Attributes:
        position: How many batches of the present epoch are done.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.position = 0

    def run(self) -> Any:
        """Train; returns the model.

        Raises:
            UsageError: The loader has no batches.
        """
        _refuse_no_batch(self.dataloader)
        self.position = self._saved_position()
        return super().run()

    def _saved_position(self) -> int:
        hub = self.runner.message_hub
        if self.iter == 0:
            return 0
        if _INFO not in hub.runtime_info:
            if self.iter != self.epoch * len(self.dataloader):
                self.runner.logger.warning(
                    f'the checkpoint of iteration {self.iter} does not say how far '
                    f'epoch {self.epoch + 1} was: it begins at its start'
                )
            return 0
        position, batches = hub.get_info(_INFO)
        if position and batches != len(self.dataloader):
            self.runner.logger.warning(
                f'the epoch was stopped after {position} of {batches} batches and has '
                f'{len(self.dataloader)} now: it is repeated from its start'
            )
            return 0
        return position

    def run_epoch(self) -> None:
        """Train on the batches of an epoch that are left."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if self.position:
            pass_over(self.dataloader, self.position)
        for index, batch in enumerate(self.dataloader, self.position):
            self._move_to(index + 1)
            self.run_iter(index, batch)
        self._move_to(0)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _move_to(self, position: int) -> None:
        """Note a position, before hooks may save it."""
        self.position = position
        info = [position, len(self.dataloader)]
        self.runner.message_hub.update_info(_INFO, info)


def resume_within_epochs(cfg: Config) -> bool:
    """Put :class:`ResumableEpochLoop` in the place of ``EpochBasedTrainLoop``.

    Args:
        cfg: Changed in place.

    Returns:
        Whether it had that loop.
    """
    loop = cfg.get('train_cfg') or {}
    if loop.get('type') is None and not loop.get('by_epoch'):
        return False
    names = ('EpochBasedTrainLoop', 'mmengine.EpochBasedTrainLoop')
    if loop.get('type') not in (None, *names, EpochBasedTrainLoop):
        return False
    loop.pop('by_epoch', None)
    loop['type'] = 'mmvssm.ResumableEpochLoop'
    return True


def _refuse_no_batch(loader: DataLoader) -> None:
    if not len(loader):
        raise UsageError(
            'train_dataloader has no batch: the data set is empty, or has fewer '
            'images than batch_size while drop_last is on.'
        )


class BatchesBehind:
    """The batches behind those seen for ``IterBasedTrainLoop``, without end.

    The same as mmengine's iterator gives, which starts an epoch anew when one has
    ended. But it does not begin with the first batch of the first, and does not wait
    for two seconds between epochs.

    Args:
        loader: One whose sampler :func:`has_epochs` or :func:`is_endless`. No iterator
            of it has been made.
        seen: How many batches were trained on.
        begin: Called as ``begin(position, epoch)`` before each epoch's first batch,
            which has the number ``position``.

    Raises:
        UsageError: The loader has no batches.
    """

    def __init__(
        self, loader: DataLoader, seen: int, begin: Callable[[int, int], None]
    ):
        self.loader, self.begin = loader, begin
        self.epoch, self.position = 0, seen
        self.iterator: Iterator | None = None
        if is_endless(loader):
            return
        _refuse_no_batch(loader)
        self.epoch, self.position = divmod(seen, len(loader))

    def __iter__(self) -> 'BatchesBehind':
        return self

    def __next__(self) -> Any:
        # Not before: hooks may yet set another epoch.
        if self.iterator is None:
            self._start()
        try:
            return next(self.iterator)
        except StopIteration:
            self.epoch, self.position = self.epoch + 1, 0
            self._start()
            return next(self.iterator)

    def _start(self) -> None:
        sampler = sampler_of(self.loader)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(self.epoch)
        self.begin(self.position, self.epoch)
        if self.position:
            pass_over(self.loader, self.position)
        self.iterator = iter(self.loader)

    def skip_iter(self, batches: int) -> None:
        """What the loop of mmengine calls to pass over batches: it has been done."""


def has_epochs(loader: DataLoader) -> bool:
    """Whether the number of an epoch alone decides what a loader gives in it."""
    sampler = sampler_of(loader)
    if isinstance(sampler, SequentialSampler):
        return True
    return hasattr(sampler, 'set_epoch') and hasattr(sampler, 'epoch')


def is_endless(loader: DataLoader) -> bool:
    """Whether a loader never comes to the end of its only epoch.

    Samplers without end have a ``set_epoch`` that does nothing, as mmengine's have.
    """
    sampler = sampler_of(loader)
    return hasattr(sampler, 'set_epoch') and not hasattr(sampler, 'epoch')


def sampler_of(loader: DataLoader) -> Any:
    """What gives single numbers of images."""
    return getattr(loader.batch_sampler, 'sampler', None)


def pass_over(loader: DataLoader, batches: int) -> None:
    """Let a loader's next iterator, and no other, begin with a later batch.

    Args:
        loader: Changed in place; no iterator of it has been made.
        batches: How many to pass over.
    """
    # DataLoader forbids this in general, as it does not look again at what
    # follows from the batch sampler. Nothing does here but the first batch.
    behind = _Behind(loader.batch_sampler, batches)
    object.__setattr__(loader, 'batch_sampler', behind)


class _Behind:
    """A batch sampler whose first iteration begins with a later batch."""

    def __init__(self, batches: Any, first: int):
        self.batches, self.first = batches, first

    def __iter__(self) -> Iterator[list[int]]:
        # Not before it is asked for a batch: a loader with workers makes one
        # iterator more, which it drops.
        first, self.first = self.first, 0
        yield from islice(self.batches, first, None)

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)
