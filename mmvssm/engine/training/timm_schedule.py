"""The learning rates of recipes that were trained with timm's scheduler."""

import math
from typing import Any

from mmengine.optim import _ParamScheduler

from mmvssm.engine.errors import UsageError
from mmvssm.registry import PARAM_SCHEDULERS

_NO_END = int(1e9)


@PARAM_SCHEDULERS.register_module()
class TimmCosineLR(_ParamScheduler):
    r"""Linear warm-up, then a cosine, exactly as timm's ``CosineLRScheduler``.

    With T steps in all, W of them warm-up, a peak :math:`\eta` (the optimizer's lr) and
    ends :math:`\eta_0` (``warmup_lr``) and :math:`\eta_1` (``eta_min``), the rate of
    step t is

    .. math::
        \eta_0 + (\eta - \eta_0) t / W \quad (t < W), \qquad
        \eta_1 + (\eta - \eta_1) (1 + \cos(\pi (t - p) / (T - p))) / 2.

    With ``warmup_prefix`` p is W. Without it p is 0: the cosine spans the whole
    training, the warm-up hides its begin, and the first rate after the warm-up is
    below the peak. mmengine's ``LinearLR`` and ``CosineAnnealingLR`` together have the
    first form only.

    Trainings with timm set the rate of step t after that step, so step t + 1 learns
    with it, and steps 0 and 1 learn alike. This is ``lag=1``.

    Args:
        optimizer: The optimizer or its wrapper.
        warmup: Steps of the warm-up, W.
        warmup_lr: Rate at its begin, of all groups of parameters.
        eta_min: Rate at the end, of all groups.
        warmup_prefix: Whether the cosine begins after the warm-up.
        lag: How many steps the rates come late, 0 or more.
        begin: First step.
        end: Step after the last one, T = ``end - begin``; by default the length of the
            training.
        last_step: Of a resumed training, see mmengine.
        by_epoch: Whether a step is an epoch; otherwise it is an iteration. With
            ``convert_to_iter_based=True`` in the config, numbers are epochs and
            steps are iterations.
        verbose: Print each rate.

    Raises:
        UsageError: There is no end, or the warm-up does not fit.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup: int = 0,
        warmup_lr: float = 0.0,
        eta_min: float = 0.0,
        warmup_prefix: bool = False,
        lag: int = 1,
        begin: int = 0,
        end: int = _NO_END,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ):
        length = end - begin
        if end >= _NO_END:
            raise UsageError('TimmCosineLR needs an end, or a loop that has one.')
        if not 0 <= warmup < length or lag < 0:
            raise UsageError(
                f'TimmCosineLR: warmup={warmup}, lag={lag} do not fit into {length} '
                'steps: warmup must be shorter, and both 0 or more. Train longer, or '
                'set param_scheduler.warmup.'
            )
        self.warmup, self.warmup_lr, self.eta_min = warmup, warmup_lr, eta_min
        self.length, self.lag = length, lag
        self.prefix = warmup if warmup_prefix else 0
        super().__init__(optimizer, 'lr', begin, end, last_step, by_epoch, verbose)

    @classmethod
    def build_iter_from_epoch(
        cls,
        *args: Any,
        warmup: float = 0,
        begin: int = 0,
        end: int = _NO_END,
        by_epoch: bool = True,
        epoch_length: int | None = None,
        **kwargs: Any,
    ) -> 'TimmCosineLR':
        """Build the scheduler by iteration from numbers of epochs."""
        if not by_epoch or not epoch_length:
            raise UsageError(
                'convert_to_iter_based=True of TimmCosineLR needs by_epoch=True and an '
                'epoch with batches.'
            )
        return cls(
            *args,
            warmup=int(warmup * epoch_length),
            begin=begin * epoch_length,
            end=min(end * epoch_length, _NO_END),
            by_epoch=False,
            **kwargs,
        )

    def _get_value(self) -> list[float]:
        step = max(self.last_step - self.lag, 0)
        return [self._rate(step, peak) for peak in self.base_values]

    def _rate(self, step: int, peak: float) -> float:
        if step < self.warmup:
            return self.warmup_lr + (peak - self.warmup_lr) * step / self.warmup
        turn = math.pi * (step - self.prefix) / (self.length - self.prefix)
        return self.eta_min + (peak - self.eta_min) * (1 + math.cos(turn)) / 2
