"""The runner of a config: mmengine's, or one whose model is in shards."""

import time
from typing import Any

import mmengine
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import join_path
from mmengine.runner import FlexibleRunner, Runner, save_checkpoint

from .configs.config import check_training
from .errors import UsageError
from .training.epoch_loop import resume_within_epochs
from .training.sharding import WholeWeightsHook


def build_runner(cfg: Config) -> 'Runner | ShardedRunner':
    """mmengine's runner, or the one that shards if the config has a ``strategy``.

    In both, :class:`ResumableEpochLoop` takes the place of ``EpochBasedTrainLoop``.

    Args:
        cfg: After :func:`prepare_launch`. Its ``train_cfg`` is changed in place.

    Raises:
        UsageError: The strategy is another than :class:`FSDPStrategy`, there is no
            launcher, or the config has what cannot be sharded, or what does not work
            on this machine or with this batch.
    """
    check_training(cfg)
    resume_within_epochs(cfg)
    strategy = cfg.get('strategy')
    if strategy is None:
        return Runner.from_cfg(cfg)
    if strategy.get('type') != 'mmvssm.FSDPStrategy':
        raise UsageError(
            f'strategy {strategy.get("type")} is not supported; take '
            "strategy=dict(type='mmvssm.FSDPStrategy'), or none for DDP."
        )
    if cfg.get('launcher', 'none') == 'none':
        raise UsageError(
            'mmvssm.FSDPStrategy spreads the model over processes: start them with '
            'tools/dist_train.sh CONFIG NUM_PROCESSES or tools/slurm_train.sh. For one '
            'process alone: --cfg-options strategy=None.'
        )
    hooks = [*(cfg.get('custom_hooks') or []), *cfg.get('default_hooks', {}).values()]
    if any(str(hook and hook.get('type')).endswith('EMAHook') for hook in hooks):
        raise UsageError(
            'EMAHook copies the whole model and does not know of shards: leave it or '
            "the config's strategy out."
        )
    return ShardedRunner.from_cfg(cfg)


class ShardedRunner(FlexibleRunner):
    """mmengine's ``FlexibleRunner``, in the order of things of its ``Runner``.

    The model is built at once, and hooks run ``before_run`` before a checkpoint is
    loaded: :class:`SafeCheckpointHook` decides there which. Checkpoints have the
    same content, the numbers of epoch and iteration that hooks give among it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model = self.strategy.build_model(self.model)
        self.register_hook(WholeWeightsHook())

    def load_or_resume(self) -> None:
        """Load what the hooks have decided on."""
        super().call_hook('before_run')
        super().load_or_resume()

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call all hooks, but ``before_run`` only in :meth:`load_or_resume`."""
        if fn_name != 'before_run':
            super().call_hook(fn_name, **kwargs)

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """Gather all shards on rank 0 and save, as ``Runner`` does.

        All ranks must call it.
        """
        state = dict(
            meta={
                'epoch': self.epoch + bool(by_epoch),
                'iter': self.iter + (not by_epoch),
                **(meta or {}),
                'cfg': self.cfg.pretty_text,
                'seed': self.seed,
                'experiment_name': self.experiment_name,
                'time': time.strftime('%Y%m%d_%H%M%S'),
                'mmengine_version': mmengine.__version__,
                'dataset_meta': getattr(
                    self.train_dataloader.dataset, 'metainfo', None
                ),
            },
            message_hub=self.message_hub.state_dict(),
            **self.strategy.whole_state(save_optimizer, save_param_scheduler),
        )
        self.call_hook('before_save_checkpoint', checkpoint=state)
        if is_main_process():
            path = join_path(out_dir, filename, backend_args=backend_args)
            save_checkpoint(state, path, file_client_args, backend_args)
