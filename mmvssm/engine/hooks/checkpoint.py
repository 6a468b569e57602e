"""Checkpoints that survive a crash, and from which training goes on exactly."""

from collections.abc import Callable
from pathlib import Path

from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.fileio import join_path
from mmengine.hooks import CheckpointHook
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
    find_latest_checkpoint,
)

from mmvssm import compat
from mmvssm.checkpoints import CheckpointError
from mmvssm.engine.checkpoints.files import (
    POINTER,
    WHOLE_FILE_BACKEND,
    WholeFileBackend,
    check_training_state,
    newest_training_state,
    remove_partial,
    write_whole,
)
from mmvssm.engine.checkpoints.loaders import safely
from mmvssm.engine.checkpoints.resumed import check_groups, kept_settings
from mmvssm.engine.checkpoints.weights import check_resumed, check_start, unwrap
from mmvssm.engine.training.epoch_loop import (
    BatchesBehind,
    ResumableEpochLoop,
    has_epochs,
    is_endless,
    sampler_of,
)
from mmvssm.engine.training.rng import (
    BatchSeeds,
    get_rng_state,
    isolate_loader,
    set_rng_state,
)
from mmvssm.registry import HOOKS


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` for machines that may stop at any time.

    Takes the same arguments and leaves the same files. On a local disk:

    - A checkpoint is written whole or not at all, then the pointer
      ``last_checkpoint``, and only then are older checkpoints removed. The
      disk must have room for one more than ``max_keep_ckpts``.
    - Where it cannot be written (the disk is full) training goes on and says
      so, and the older checkpoints stay. If that happens to the last
      checkpoint of all, training ends in :class:`CheckpointError`.
    - Resuming reads the file and its check sums first; resuming from the
      latest falls back to the newest that can be read.
    - What mmengine's ``Runner`` resumes or starts from (``load_from``) is read
      without running anything the file holds.
    - With ``IterBasedTrainLoop`` and ``InfiniteSampler`` or ``DefaultSampler``, or
      with :class:`ResumableEpochLoop`, a resumed training goes on with the same
      bits as one that never stopped: the states of the generators of random
      numbers of every rank are in the checkpoint (under ``rng``), and the
      sampler goes on behind the images seen.

    Args:
        args: Of ``CheckpointHook``.
        start_from: Weights to start from where the config says ``resume=True`` and
            there is no checkpoint yet. (``load_from`` beside ``resume=True`` is what
            to resume from.) Must have the whole backbone of the model.
        kwargs: Of ``CheckpointHook``.

    Attributes:
        writing: Whether a checkpoint is being written.
    """

    def __init__(self, *args, start_from: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.start_from = start_from
        self._failures = WholeFileBackend.failures
        self._unwritten = ''
        self._saved_iter = -1
        self.writing = False
        self._rng_states: list[dict] = []
        self._rng_to_restore: dict | None = None
        self._rng_before_val: dict | None = None
        self._batch_seeds: BatchSeeds | None = None

    def before_run(self, runner: Runner) -> None:
        """Decide what to resume from, and have the runner read it safely.

        All ranks take what rank 0 found.
        """
        # Private to mmengine: it reads them right after this hook, and once only.
        if runner._has_loaded:
            return
        if isinstance(runner._resume, str):
            runner._load_from, runner._resume = runner._resume, True
        if runner._resume:
            self._find_checkpoint(runner)
        if runner._load_from is not None:
            runner._load_from = safely(runner._load_from)

    def _find_checkpoint(self, runner: Runner) -> None:
        folder = self._folder(runner)
        if runner._load_from is not None:
            if '://' not in folder and '://' not in runner._load_from:
                _on_main(lambda: check_training_state(runner._load_from))
            return
        if '://' in folder:
            found = find_latest_checkpoint(runner.work_dir)
        else:
            found = _on_main(
                lambda: newest_training_state(
                    folder, lambda why: runner.logger.warning(f'skipped: {why}')
                )
            )
        if found is None:
            runner.logger.info(f'no checkpoint in {folder}: starting anew')
        runner._resume = found is not None
        runner._load_from = found
        if found is None and self.start_from:
            check_start(unwrap(runner.model).state_dict(), self.start_from)
            runner._load_from = self.start_from

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse another model's, and say which settings do not change.

        The generators' states are kept until training starts.

        Raises:
            UsageError: To resume from a checkpoint of another model, or whose optimizer
                has other groups of parameters.
        """
        if not runner._resume:
            return
        check_resumed(unwrap(runner.model).state_dict(), checkpoint['state_dict'])
        check_groups(runner, checkpoint)
        if kept := kept_settings(runner, checkpoint):
            runner.logger.warning(
                'resuming keeps settings of the checkpoint that the config has '
                f'changed: {"; ".join(kept)}. To train with those of the config, start '
                'from its weights: --cfg-options load_from=PATH, without --resume.'
            )
        states = checkpoint.get('rng')
        if states is None:
            return
        if len(states) == runner.world_size:
            self._rng_to_restore = states[runner.rank]
        else:
            runner.logger.warning(
                f'the checkpoint is of {len(states)} processes and these are '
                f'{runner.world_size}: random numbers start anew'
            )

    def before_train(self, runner: Runner) -> None:
        """Prepare the folder and the loaders."""
        if '://' not in self._folder(runner) and self.backend_args is None:
            self.backend_args = dict(backend=WHOLE_FILE_BACKEND)
            if is_main_process():
                remove_partial(self._folder(runner))
        super().before_train(runner)
        self._saved_iter = runner.iter
        self._prepare_loaders(runner)

    def _prepare_loaders(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        _give_seed(runner)
        isolate_loader(loader, runner.seed)
        if runner.val_loop is not None:
            isolate_loader(runner.val_dataloader, runner.seed)
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            _start_behind_seen(runner)
        elif isinstance(loop, ResumableEpochLoop):
            self._batch_seeds = BatchSeeds(
                loader, runner.seed, runner.rank, len(loader)
            )
        elif isinstance(loop, EpochBasedTrainLoop):
            runner.logger.warning(
                f'{type(loop).__name__} repeats an epoch from its start if the '
                'training is stopped within it and resumed: set '
                "train_cfg.type='mmvssm.ResumableEpochLoop' to go on behind the images "
                'seen.'
            )
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if not self.by_epoch and self.interval % counts:
            runner.logger.warning(
                f'checkpoints every {self.interval} iterations, gradients of '
                f'{counts} iterations are added: resuming loses the part of a '
                'sum. Make the interval a multiple.'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Go on with the random numbers of the checkpoint.

        A validation that was due after its iteration and is not known to have
        ended is done first.
        """
        self._go_on(runner)
        if self._batch_seeds is not None:
            self._batch_seeds.begin(runner.train_loop.position, runner.epoch)

    def _go_on(self, runner: Runner) -> None:
        if self._rng_to_restore is None:
            return
        set_rng_state(self._rng_to_restore)
        self._rng_to_restore = None
        if self._validation_is_due(runner):
            runner.val_loop.run()

    def _validation_is_due(self, runner: Runner) -> bool:
        loop = runner.train_loop
        step, last = runner.iter, loop.max_iters
        if not isinstance(loop, IterBasedTrainLoop):
            step, last = runner.epoch, loop.max_epochs
        return (
            runner.val_loop is not None
            and getattr(loop, 'position', 0) == 0
            and step >= loop.val_begin
            and (step % loop.val_interval == 0 or step == last)
            and runner.message_hub.runtime_info.get('iter_validated') != runner.iter
        )

    def before_val(self, runner: Runner) -> None:
        """Whatever validation draws, training does not notice."""
        self._rng_before_val = get_rng_state()

    def after_val(self, runner: Runner) -> None:
        """Go on with the random numbers from before validation."""
        set_rng_state(self._rng_before_val)
        self._rng_before_val = None

    def after_train(self, runner: Runner) -> None:
        """Publish as ``CheckpointHook`` does; see to the last checkpoint.

        Raises:
            CheckpointError: It could not be written.
        """
        # No epoch was left to train, but perhaps the validation of the last.
        self._go_on(runner)
        super().after_train(runner)
        if self._unwritten:
            raise CheckpointError(
                f'training is over, but its last checkpoint is lost: '
                f'{self._unwritten}. Make room and --resume: it goes on from '
                f'{self.last_ckpt or "the start"}.'
            )

    def save_now(self, runner: Runner, step: int) -> None:
        """Save after so many iterations, unless this has been done already.

        All ranks must call it: in ``after_train_iter`` with ``runner.iter + 1``, in
        validation with ``runner.iter``.
        """
        if self.has_saved(step):
            return
        meta = dict(epoch=runner.epoch, iter=step)
        if self.by_epoch:
            step = f'{runner.epoch}_iter_{step}'
        self._save_checkpoint_with_step(runner, step, meta)

    def has_saved(self, iteration: int) -> bool:
        """Whether a checkpoint was made after so many iterations."""
        return self._saved_iter == iteration

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the generators' states to a checkpoint one can resume from."""
        if 'optimizer' in checkpoint:
            checkpoint['rng'] = self._rng_states

    def _save_checkpoint_with_step(self, runner: Runner, step: int | str, meta: dict):
        # A signal may end the process where all is saved, and not before.
        self.writing = True
        self._write(runner, step, meta)
        self.writing = False
        self._saved_iter = meta['iter']

    def _write(self, runner: Runner, step: int | str, meta: dict) -> None:
        self._rng_states = all_gather_object(self._rng_before_val or get_rng_state())
        previous = self.last_ckpt
        name = self.filename_tmpl.format(step)
        self.last_ckpt = join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        ids, expired = self._ids_with(step)
        if self.max_keep_ckpts > 0:
            runner.message_hub.update_info('keep_ckpt_ids', ids)
        self._failures.clear()
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process() and not self._failures:
            self._move_pointer(runner)
        self._unwritten = '; '.join(self._failures)
        if self._failures:
            runner.logger.error(
                f'training goes on WITHOUT a new checkpoint: {self._unwritten}. '
                f'Kept: {previous or "none yet"}.'
            )
            self.last_ckpt = previous
            runner.message_hub.update_info('last_ckpt', previous)
            return
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(ids)
        if is_main_process():
            for old in expired:
                self._remove(join_path(self.out_dir, self.filename_tmpl.format(old)))

    def _ids_with(self, step: int | str) -> tuple[list, list]:
        """Steps of the checkpoints to keep and to remove once ``step`` is saved."""
        if self.max_keep_ckpts <= 0:
            return [], []
        ids = [*(i for i in self.keep_ckpt_ids if i != step), step]
        return ids[-self.max_keep_ckpts :], ids[: -self.max_keep_ckpts]

    def _move_pointer(self, runner: Runner) -> None:
        pointer = Path(runner.work_dir, POINTER)
        try:
            write_whole(pointer, self.last_ckpt.encode())
        except OSError as error:
            # The checkpoint itself is there, and found without the pointer.
            runner.logger.error(f'cannot write {pointer}: {error}')

    def _is_written(self, path: str) -> bool:
        """Whether this is the rank that writes, and it wrote the file."""
        return is_main_process() and self.file_backend.isfile(path)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """As in ``CheckpointHook``, but the old best goes after the new one came."""
        runner.message_hub.update_info('iter_validated', runner.iter)
        if not self.save_best:
            return
        several = len(self.key_indicators) > 1
        old = dict(self.best_ckpt_path_dict) if several else {'': self.best_ckpt_path}
        # mmengine removes what it finds here before it saves.
        if several:
            self.best_ckpt_path_dict = dict.fromkeys(old)
        else:
            self.best_ckpt_path = None
        super()._save_best_checkpoint(runner, metrics)
        new = self.best_ckpt_path_dict if several else {'': self.best_ckpt_path}
        for key, path in old.items():
            if new[key] is None:
                new[key] = path
            elif path and path != new[key] and self._is_written(new[key]):
                self._remove(path)
        if not several:
            self.best_ckpt_path = new['']

    def _folder(self, runner: Runner) -> str:
        """Where checkpoints are, before and after mmengine has worked it out."""
        if self.out_dir is None or str(self.out_dir) == runner.work_dir:
            return runner.work_dir
        name = Path(runner.work_dir).name
        if hasattr(self, 'file_backend'):
            return str(self.out_dir)
        return join_path(str(self.out_dir), name)


def _give_seed(runner: Runner) -> None:
    """Give the sampler the training's seed, unless the config has another for it.

    mmengine makes the sampler before it reads the checkpoint to resume from, and
    where the config has no seed with one that is drawn anew.
    """
    options = (runner.cfg.get('train_dataloader') or {}).get('sampler') or {}
    sampler = getattr(runner.train_dataloader.batch_sampler, 'sampler', None)
    if hasattr(sampler, 'seed') and 'seed' not in options:
        by_rank = (runner.cfg.get('randomness') or {}).get('diff_rank_seed', False)
        sampler.seed = runner.seed - (runner.rank if by_rank else 0)


def _start_behind_seen(runner: Runner) -> None:
    """Let iterations go on behind the batches seen, without making these again."""
    loop, loader = runner.train_loop, runner.train_dataloader
    endless = is_endless(loader)
    if has_epochs(loader) or (endless and compat.renew_sampler(loop)):
        length = None if endless else len(loader)
        seeds = BatchSeeds(loader, runner.seed, runner.rank, length)
        batches = BatchesBehind(loader, runner.iter, seeds.begin)
        compat.take_batches_from(loop, batches)
    else:
        runner.logger.warning(
            f'{type(sampler_of(loader)).__name__} cannot begin behind the images seen: '
            'a resumed training first makes all earlier batches again, as slowly as it '
            'loads them. Take train_dataloader.sampler.type=InfiniteSampler or '
            'DefaultSampler, or a sampler with the attribute epoch and set_epoch.'
        )


def _on_main(work: Callable):
    """What ``work`` returns on rank 0, or its CheckpointError, on every rank."""
    outcome = [None, None]
    if is_main_process():
        try:
            outcome[0] = work()
        except CheckpointError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1]:
        raise CheckpointError(outcome[1])
    return outcome[0]
