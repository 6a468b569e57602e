"""Stop before a loss that is not finite reaches the weights."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _NormBase

from mmvssm.engine.checkpoints.weights import unwrap
from mmvssm.engine.errors import UsageError
from mmvssm.engine.launching.ranks import Ranks
from mmvssm.engine.training.rng import get_rng_state, set_rng_state
from mmvssm.engine.training.sharding import class_name, whole_weights
from mmvssm.ops.checks import NaNInputError
from mmvssm.registry import HOOKS


class NonFiniteLossError(UsageError):
    """The loss is infinite or not a number; the weights are as before it."""


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop, or skip the batch, when the loss of any rank is not finite.

    The loss is looked at before its gradients are: the weights stay those of
    the iteration before. The batch is run once more, with the same random
    numbers, to find the first module that gives something that is not finite.
    The error names the iteration, the images of the batch, the module and the
    checkpoint to go back to.

    With a ``GradScaler`` gradients that overflow are its own business; the
    loss is not.

    A skipped batch leaves the running statistics of norms as they were, too.

    On the CPU the scans refuse NaN before there is a loss; that counts as one.
    Where processes exchange something within the forward pass (SyncBN, FSDP) such
    a batch cannot be skipped: the others are waiting for the rest of it.

    Args:
        max_skipped: Skip so many such batches of a training, with a warning
            each, before stopping.
    """

    # Right before the forward pass, after hooks that change the batch.
    priority = 'VERY_LOW'

    def __init__(self, max_skipped: int = 0):
        self.max_skipped = max_skipped

    def before_train(self, runner: Runner) -> None:
        """Look at every loss on its way into the optimizer wrapper."""
        self.ranks = Ranks()
        update = runner.optim_wrapper.update_params

        def update_if_finite(loss: torch.Tensor, *args, **kwargs) -> None:
            if self.ranks.any(not bool(torch.isfinite(loss).all())):
                self._refuse(runner, loss)
            else:
                update(loss, *args, **kwargs)

        runner.optim_wrapper.update_params = update_if_finite
        step = runner.model.train_step

        def step_if_finite(*args, **kwargs) -> dict[str, torch.Tensor]:
            try:
                return step(*args, **kwargs)
            except NaNInputError as error:
                loss = torch.tensor(float('nan'))
                if self.ranks.group and _waits_in_forward(runner.model):
                    message = self._message(runner, f'{error}; {self._images()}')
                    # What ends a tool is printed by rank 0 alone.
                    runner.logger.error(message)
                    raise NonFiniteLossError(message) from None
                self.ranks.any(True)
                self._refuse(runner, loss)
                return dict(loss=loss)

        runner.model.train_step = step_if_finite

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Keep the batch and the random numbers of its forward pass."""
        self.batch, self.rng_state = data_batch, get_rng_state()
        # The forward pass of a skipped batch has spoilt these already.
        self.statistics = [
            (buffer, buffer.clone())
            for module in runner.model.modules()
            if self.max_skipped and isinstance(module, _NormBase)
            for buffer in module.buffers()
        ]

    def _refuse(self, runner: Runner, loss: torch.Tensor) -> None:
        mine, culprit = '', ''
        affected = not bool(torch.isfinite(loss).all())
        with whole_weights(runner.model):
            if affected or _waits_in_forward(runner.model):
                culprit = self._culprit(runner)
        if affected:
            mine = f'loss {float(loss.detach())} for {self._images()}; {culprit}'
        reports = '; '.join(
            f'rank {rank}: {text}' if self.ranks.group else text
            for rank, text in enumerate(self.ranks.gather(mine))
            if text
        )
        message = self._message(runner, reports)
        info = runner.message_hub.runtime_info
        skipped = info.get('skipped_batches', 0) + 1
        if skipped <= self.max_skipped:
            runner.message_hub.update_info('skipped_batches', skipped)
            for buffer, before in self.statistics:
                buffer.copy_(before)
            runner.logger.warning(
                f'{message}. Skipped ({skipped} of at most {self.max_skipped}).'
            )
            return
        raise NonFiniteLossError(
            f'{message}. The last checkpoint is {info.get("last_ckpt", "none")}. To '
            'skip such batches: NonFiniteLossHook(max_skipped=N). Often a lower '
            'learning rate, gradient clipping or --amp bfloat16 helps.'
        )

    def _message(self, runner: Runner, reports: str) -> str:
        return f'loss not finite in iteration {runner.iter + 1}: {reports}'

    def _images(self) -> str:
        return ', '.join(image_paths(self.batch)) or 'unknown images'

    def _culprit(self, runner: Runner) -> str:
        """Where the batch first leaves the finite numbers, in words."""
        model = unwrap(runner.model)
        for name, value in model.named_parameters():
            if not bool(torch.isfinite(value).all()):
                return f'before that the weight {name} is not finite'
        after = get_rng_state()
        set_rng_state(self.rng_state)
        try:
            with torch.no_grad(), runner.optim_wrapper.optim_context(model):
                found = first_non_finite(model, self.batch)
        finally:
            set_rng_state(after)
        if found is None:
            return 'every module is finite, the loss function is not'
        return f'first in {found}'


def _waits_in_forward(model: nn.Module) -> bool:
    """Whether processes wait for each other within the forward pass."""
    return any(
        isinstance(module, (nn.SyncBatchNorm, FSDPModule)) for module in model.modules()
    )


def first_non_finite(model: nn.Module, batch: Any) -> str | None:
    """The first module whose output is not finite.

    Args:
        model: With mmengine's ``data_preprocessor`` and ``mode='loss'``. Running
            statistics are left as they were.
        batch: As from the data loader.

    Returns:
        ``'name (class)'``, or ``'the input'``, or None.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not found and not all(_finite(output)):
            where = f'{name} ({class_name(module)})'
            found.append(where if name else 'the model')

    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: look(name, module, output)
        )
        for name, module in model.named_modules()
        if name.split('.')[0] != 'data_preprocessor'
    ]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        data = model.data_preprocessor(batch, True)
        if not all(_finite(data)):
            return 'the input'
        if isinstance(data, dict):
            model(**data, mode='loss')
        else:
            model(*data, mode='loss')
    except NaNInputError as error:
        if not found:
            found.append(f'what goes into an op ({error})')
    finally:
        for handle in handles:
            handle.remove()
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    # The model itself comes last, and says nothing new.
    return found[0] if found and found[0] != 'the model' else None


def _finite(value: Any) -> Iterator[bool]:
    """Whether each floating-point tensor in nested lists and dicts is finite."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield bool(torch.isfinite(value).all())
    elif isinstance(value, dict):
        for item in value.values():
            yield from _finite(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _finite(item)


def image_paths(batch: Any) -> list[str]:
    """Paths of the images of a batch of mmseg, mmdet or a like loader.

    Args:
        batch: Its ``data_samples`` have ``img_path``; or it has ``img_path`` itself.
    """
    if not isinstance(batch, dict):
        return []
    samples = batch.get('data_samples')
    if isinstance(samples, Iterable):
        return [str(getattr(sample, 'img_path', 'unknown')) for sample in samples]
    return [str(path) for path in batch.get('img_path', ())]
