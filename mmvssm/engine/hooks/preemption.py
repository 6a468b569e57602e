"""Stop a training that a cluster wants the machine of, and lose nothing."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from mmvssm.engine.errors import UsageError
from mmvssm.engine.launching.ranks import Ranks
from mmvssm.engine.launching.work_dir import release_work_dirs
from mmvssm.engine.training.epoch_loop import ResumableEpochLoop
from mmvssm.engine.training.sharding import WholeWeightsHook
from mmvssm.registry import HOOKS

from .checkpoint import SafeCheckpointHook

# EX_TEMPFAIL of sysexits.h: try again later. tools/sbatch_train.sh requeues on it,
# and tools/train.py ends with it while it starts.
PREEMPTED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# How long one of several ranks waits for the next iteration, if it has nothing to lose.
_PATIENCE = 10.0
# How long a process that has something to lose waits for the data of the next.
_PATIENCE_WITH_DATA = 120.0


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

    Where no iteration was done since the last checkpoint, or since the start, there
    is nothing to save or to finish: while a process waits for data, starts workers,
    passes over what was seen, or validates, it ends at once, and one of several ranks
    after 10 seconds in which they could not agree. Where data does not come, it ends
    after two minutes in any case. A validation that follows
    iterations which are not saved is left after the image in progress, and done again
    on resuming.

    With ``EpochBasedTrainLoop`` nothing is saved within an epoch: the process ends
    after the iteration, and resuming repeats the epoch. :class:`ResumableEpochLoop` has
    no such loss.

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
        self._busy = False
        self._timers: list[threading.Timer] = []

    def before_train(self, runner: Runner) -> None:
        """Look for the hook that saves; listen for signals from here on.

        Before, and in a test, they mean what they meant: there is nothing to save.

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
        self.saver, self.runner, self._pid = savers[0], runner, os.getpid()
        self._done = runner.iter
        for number in _SIGNALS:
            self._replaced[number] = signal.signal(number, self._note)

    def after_run(self, runner: Runner) -> None:
        """Give signals back their former meaning."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()
        for timer in self._timers:
            timer.cancel()

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """There is something to finish."""
        self._busy = True

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Stop here if any rank is to stop."""
        # Within a sum of gradients its first part would be lost.
        if self._asked_to_stop() and runner.optim_wrapper.should_update():
            if self._can_save(runner):
                self.saver.save_now(runner, runner.iter + 1)
            self._stop(runner, runner.iter + 1)
        self._done, self._busy = runner.iter + 1, False

    def before_val(self, runner: Runner) -> None:
        """Several ranks agree after an image."""
        self._busy = bool(self._replaced) and self.ranks.group is not None

    def after_val(self, runner: Runner) -> None:
        """Nothing is left to finish."""
        self._busy = False

    def after_val_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Stop here if any rank is to, and nothing would be lost."""
        in_training = bool(self._replaced)
        if not in_training or not self._asked_to_stop():
            return
        if not self.saver.has_saved(runner.iter):
            averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
            # MMPretrain's may validate both copies in turn, and nobody can tell which
            # of them the model has: this ends first.
            twice = any(getattr(x, 'evaluate_on_origin', False) for x in averages)
            if twice or not self._can_save(runner):
                return
            for hook in runner.hooks:
                # They put back the weights that are trained.
                if isinstance(hook, (EMAHook, WholeWeightsHook)):
                    hook.after_val_epoch(runner)
            self.saver.save_now(runner, runner.iter)
        self._stop(runner, runner.iter)

    def _can_save(self, runner: Runner) -> bool:
        """Whether resuming goes on from where a checkpoint is made."""
        return isinstance(runner.train_loop, (IterBasedTrainLoop, ResumableEpochLoop))

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            return  # A worker that has just been forked.
        self.reason = signal.Signals(number).name
        if self.ranks.group is None:
            self._end_if_idle()
        else:
            self._later(_PATIENCE, self._end_if_idle)
        self._later(_PATIENCE_WITH_DATA, self._end_if_stuck, self._done)

    def _later(self, seconds: float, work: Callable, *arguments: int) -> None:
        timer = threading.Timer(seconds, work, arguments)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _end_if_idle(self) -> None:
        """End at once if nothing is to be finished or saved."""
        if not self._busy and self.saver.has_saved(self._done):
            self._end()

    def _end_if_stuck(self, done: int) -> None:
        """End if no data came since so many iterations were done, whatever is lost."""
        idle = not self._busy and not self.saver.writing
        if idle and self._done == done:
            self.reason += f', and no data in {_PATIENCE_WITH_DATA:.0f} seconds'
            self._end()

    def _end(self) -> None:
        # Not by an exception, which whatever is at work could catch.
        self._announce_end(self.runner, self._done)
        logging.shutdown()
        sys.stdout.flush()
        release_work_dirs()
        os._exit(PREEMPTED)

    def _asked_to_stop(self) -> bool:
        if not self.reason and time.time() >= self.deadline:
            self.reason = "the job's time is nearly up"
        return self.ranks.any(bool(self.reason))

    def _stop(self, runner: Runner, iteration: int) -> None:
        # Launchers end all processes when the first has ended: rank 0 first
        # finishes writing.
        self.ranks.wait()
        self._announce_end(runner, iteration)
        raise SystemExit(PREEMPTED)

    def _announce_end(self, runner: Runner, iteration: int) -> None:
        if is_main_process():
            reason = self.reason or 'another rank was told to'
            runner.logger.warning(
                f'stopped after iteration {iteration}: {reason}. The latest '
                f'checkpoint is {self.saver.last_ckpt}; go on with --resume.'
            )
