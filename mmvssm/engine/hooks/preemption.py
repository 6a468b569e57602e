"""Stop a training that a cluster wants the machine of, and lose nothing."""

import os
import signal
import time

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from mmvssm.engine.errors import UsageError
from mmvssm.engine.launching.ranks import Ranks
from mmvssm.engine.training.epoch_loop import ResumableEpochLoop
from mmvssm.registry import HOOKS

from .checkpoint import SafeCheckpointHook

# EX_TEMPFAIL of sysexits.h: try again later. tools/sbatch_train.sh requeues on it,
# and tools/train.py ends with it while it starts.
PREEMPTED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Save and end on SIGTERM, on SIGUSR1, or before a Slurm job's time is up.

    The iteration in progress is finished; where gradients of several
    iterations are added, their last one. All ranks end after the same
    iteration, whichever of them got the signal: they ask each other once an
    iteration, over the CPU. A full checkpoint is written (by
    :class:`SafeCheckpointHook`, which the config must have as
    ``default_hooks.checkpoint``), and the process exits with code 75. ``tools/
    train.py --resume auto`` goes on from there, with the same bits.

    During validation a signal takes effect at once if the iteration before it
    has been saved, else after the next iteration. With ``EpochBasedTrainLoop``
    nothing is saved within an epoch: the process ends after the iteration, and
    resuming repeats the epoch. :class:`ResumableEpochLoop` has no such loss.

    Args:
        minutes_before_end: Also stop so many minutes before the time in the
            environment variable ``SLURM_JOB_END_TIME`` (Slurm sets it; seconds
            since 1970). None: do not.
    """

    # After the checkpoint of the same iteration.
    priority = 'LOWEST'

    def __init__(self, minutes_before_end: float | None = None):
        self.reason = ''
        self.deadline = float('inf')
        end = os.environ.get('SLURM_JOB_END_TIME')
        if minutes_before_end is not None and end is not None:
            self.deadline = float(end) - 60 * minutes_before_end
        self._replaced = {}

    def before_run(self, runner: Runner) -> None:
        """Listen for signals from here on."""
        for number in _SIGNALS:
            self._replaced[number] = signal.signal(number, self._note)

    def after_run(self, runner: Runner) -> None:
        """Give signals back their former meaning."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def before_train(self, runner: Runner) -> None:
        """Look for the hook that saves.

        Raises:
            UsageError: There is none.
        """
        self.ranks = Ranks()
        savers = [h for h in runner.hooks if isinstance(h, SafeCheckpointHook)]
        if not savers:
            raise UsageError(
                'mmvssm.PreemptionHook saves through mmvssm.SafeCheckpointHook: set '
                "default_hooks=dict(checkpoint=dict(type='mmvssm.SafeCheckpointHook', "
                '...)) in the config.'
            )
        self.saver = savers[0]

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Stop here if any rank is to stop."""
        if not self._asked_to_stop():
            return
        # Within a sum of gradients its first part would be lost.
        if not runner.optim_wrapper.should_update():
            return
        if isinstance(runner.train_loop, (IterBasedTrainLoop, ResumableEpochLoop)):
            self.saver.save_now(runner)
        self._stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Stop here if any rank is to, and nothing would be lost."""
        in_training = hasattr(self, 'saver')
        if in_training and self.saver.has_saved(runner.iter) and self._asked_to_stop():
            self._stop(runner, runner.iter)

    def _note(self, number: int, frame: object) -> None:
        self.reason = signal.Signals(number).name

    def _asked_to_stop(self) -> bool:
        if not self.reason and time.time() >= self.deadline:
            self.reason = "the job's time is nearly up"
        return self.ranks.any(bool(self.reason))

    def _stop(self, runner: Runner, iteration: int) -> None:
        # Launchers end all processes when the first has ended: rank 0 first
        # finishes writing.
        self.ranks.wait()
        if is_main_process():
            reason = self.reason or 'another rank was told to'
            runner.logger.warning(
                f'stopped after iteration {iteration}: {reason}. The latest '
                f'checkpoint is {self.saver.last_ckpt}; go on with --resume.'
            )
        raise SystemExit(PREEMPTED)
