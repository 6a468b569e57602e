"""Epochs that go on where a training was stopped."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

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
        """Train; returns the model."""
        self.position = self._saved_position()
        return super().run()

    def _saved_position(self) -> int:
        hub = self.runner.message_hub
        if self.iter == 0 or _INFO not in hub.runtime_info:
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
