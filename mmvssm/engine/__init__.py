"""What the tools are made of, for scripts of one's own too."""

from mmvssm.compat import find_own_models

from .checkpoint_hook import SafeCheckpointHook
from .config import (
    enable_amp,
    enable_painting,
    enable_tta,
    is_detector,
    keep_predictions,
    load_config,
)
from .data import check_datasets
from .epoch_loop import ResumableEpochLoop
from .errors import UsageError, require_file, run_tool
from .gpu_check import check_gpu
from .launch import prepare_launch
from .layer_decay import LayerDecayOptimWrapperConstructor
from .loaders import install_safe_loaders
from .non_finite import NonFiniteLossError, NonFiniteLossHook
from .optim import Bf16OptimWrapper, Float32RegionsHook
from .preemption import PreemptionHook
from .sharding import FSDPStrategy, build_runner
from .weights import check_load_from, load_weights, trust_checkpoints

__all__ = [
    'Bf16OptimWrapper',
    'FSDPStrategy',
    'Float32RegionsHook',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossError',
    'NonFiniteLossHook',
    'PreemptionHook',
    'ResumableEpochLoop',
    'SafeCheckpointHook',
    'UsageError',
    'build_runner',
    'check_datasets',
    'check_gpu',
    'check_load_from',
    'enable_amp',
    'enable_painting',
    'enable_tta',
    'install_safe_loaders',
    'is_detector',
    'keep_predictions',
    'load_config',
    'load_weights',
    'prepare_launch',
    'require_file',
    'run_tool',
    'trust_checkpoints',
]

find_own_models()
