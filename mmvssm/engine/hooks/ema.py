"""Averages of the weights, exactly as in trainings with timm."""

from typing import Any

import torch
from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import EMAHook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmvssm.engine.errors import UsageError
from mmvssm.registry import HOOKS

# Where a checkpoint has the averages if its 'state_dict' has the raw weights. MLLA's
# files call them so.
_BESIDE = 'state_dict_ema'


@HOOKS.register_module()
class TimmEMAHook(EMAHook):
    r"""mmengine's ``EMAHook`` with the averages of timm's ``ModelEma``.

    The average begins as the weights that training begins with. After each step of the
    optimizer, so not after each of several batches whose gradients are added up, it is
    :math:`d \cdot average + (1 - d) \cdot weights`. That includes the running
    statistics of norms; of several processes, those of the first.

    A classifier with a method ``teach``, as :class:`mmvssm.classification.
    MESAClassifier` has, gets the averaged model before each epoch.

    Args:
        decay: d.
        base_batch_size: The batch that ``decay`` belongs to. With it, d is
            ``decay ** (batch / base_batch_size)``, where the batch is that of one step
            on all processes, with all that is added up. By default d is ``decay``.
        evaluate: Which weights are validated and are a checkpoint's ``state_dict``:
            ``'average'`` or ``'raw'``. The others are in the checkpoint, too.
        **kwargs: Of ``EMAHook``.

    Raises:
        UsageError: An option is out of range, or a training is resumed that had another
            ``evaluate``.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        decay: float = 0.9999,
        base_batch_size: int | None = None,
        evaluate: str = 'average',
        **kwargs: Any,
    ):
        if not 0 < decay < 1 or evaluate not in ('average', 'raw'):
            raise UsageError(
                "TimmEMAHook takes a decay between 0 and 1 and evaluate='average' or "
                f"'raw', not decay={decay}, evaluate={evaluate!r}."
            )
        super().__init__(momentum=1 - decay, **{'update_buffers': True, **kwargs})
        self.decay, self.base_batch_size = decay, base_batch_size
        self.evaluate = evaluate

    def decay_with(self, batch: int) -> float:
        """The decay d if so many images make a step of the optimizer."""
        return self.decay ** (batch / (self.base_batch_size or batch))

    def before_run(self, runner: Runner) -> None:
        """Copy the model, but not again where a test follows the training."""
        if not hasattr(self, 'ema_model'):
            super().before_run(runner)
            self.ema_model.eval()

    def before_train(self, runner: Runner) -> None:
        """Begin with the weights as they were initialised or loaded."""
        super().before_train(runner)
        self.ema_model.momentum = 1 - self.decay_with(images_of_a_step(runner))
        if self.ema_model.steps == 0:
            self.ema_model.update_parameters(self.src_model)
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if hasattr(self.src_model, 'teach') and not by_epoch:
            raise UsageError(
                f'{type(self.src_model).__name__} begins to learn from its average '
                f'after some epochs, and {type(runner.train_loop).__name__} has none: '
                'set train_cfg=dict(by_epoch=True, max_epochs=...).'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Hand the averaged model to a model that learns from it."""
        if hasattr(self.src_model, 'teach'):
            self.src_model.teach(self.ema_model.module, runner.epoch)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Average, if the weights have changed."""
        if runner.optim_wrapper.should_update():
            super().after_train_iter(runner, *args, **kwargs)
            if get_world_size() > 1:
                self._share_statistics()

    def _share_statistics(self) -> None:
        # A checkpoint has those of the first process. All must go on with them, or a
        # resumed training would learn from other averages than one that ran through.
        model = self.ema_model.module
        weights = dict(model.named_parameters())
        own = [
            value
            for name, value in model.state_dict().items()
            if name not in weights and value.is_floating_point()
        ]
        if own:
            flat = torch.cat([value.flatten() for value in own])
            broadcast(flat)
            for value, new in zip(own, flat.split([v.numel() for v in own])):
                value.copy_(new.view_as(value))

    def _swap_ema_parameters(self) -> None:
        if self.evaluate == 'average':
            super()._swap_ema_parameters()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the weights that are not evaluated."""
        if self.evaluate == 'average':
            super().before_save_checkpoint(runner, checkpoint)
        else:
            checkpoint[_BESIDE] = self.ema_model.module.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on with the average of a resumed training."""
        if not runner._resume:
            return  # It begins as the weights that were loaded.
        key, other = 'ema_state_dict', _BESIDE
        if self.evaluate == 'raw':
            key, other = other, key
        if key not in checkpoint:
            had = 'another evaluate=' if other in checkpoint else 'no TimmEMAHook'
            raise UsageError(
                f'TimmEMAHook(evaluate={self.evaluate!r}) cannot go on with this '
                f'checkpoint, whose training had {had}: resume with the settings that '
                'the training was begun with, or start anew from its weights '
                '(--pretrained).'
            )
        if self.evaluate == 'average':
            super().after_load_checkpoint(runner, checkpoint)
        else:
            self.ema_model.module.load_state_dict(checkpoint[key])
            self.ema_model.steps.fill_(1)


def images_of_a_step(runner: Runner) -> int:
    """Images of all processes and added batches that make a step of the optimizer."""
    loader = runner.train_dataloader
    batch = loader.batch_size or loader.batch_sampler.batch_size
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    return batch * runner.world_size * counts
