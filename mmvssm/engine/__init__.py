"""What the tools are made of, for scripts of one's own too."""

from mmvssm import zoo
from mmvssm.compat import find_own_models

from .checkpoints.loaders import install_safe_loaders
from .checkpoints.start import (
    CheckedPretrainedInit,
    announce_start,
    check_inputs,
    choose_start,
    published_weights,
)
from .checkpoints.weights import check_load_from, load_weights, trust_checkpoints
from .configs.config import (
    add_class_report,
    enable_amp,
    enable_painting,
    enable_resume,
    enable_tta,
    is_classifier,
    is_detector,
    keep_predictions,
    load_config,
    scope_of,
)
from .configs.data import check_datasets
from .configs.recipe import format_recipe, read_recipe
from .errors import UsageError, require_file
from .hooks.checkpoint import SafeCheckpointHook
from .hooks.ema import TimmEMAHook
from .hooks.float32_regions import Float32RegionsHook
from .hooks.labels_only import LabelsOnlyHook
from .hooks.non_finite import NonFiniteLossError, NonFiniteLossHook
from .hooks.painting import PaintingHook
from .hooks.preemption import PreemptionHook
from .inference.labels_only import labels_only
from .labels.check import check_labels
from .labels.class_report import ClassReport
from .launching.gpu_check import check_gpu
from .launching.launch import prepare_launch
from .launching.tool import run_tool
from .launching.work_dir import lock_work_dir
from .model_check.check import probe_model
from .runner import build_runner
from .training.epoch_loop import ResumableEpochLoop
from .training.layer_decay import LayerDecayOptimWrapperConstructor
from .training.optim import Bf16OptimWrapper
from .training.optimizer_groups import GroupedOptimWrapperConstructor
from .training.schedule import measure_iteration, set_iterations
from .training.sharding import FSDPStrategy
from .training.timm_schedule import TimmCosineLR

__all__ = [
    'Bf16OptimWrapper',
    'CheckedPretrainedInit',
    'ClassReport',
    'FSDPStrategy',
    'Float32RegionsHook',
    'GroupedOptimWrapperConstructor',
    'LabelsOnlyHook',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossError',
    'NonFiniteLossHook',
    'PaintingHook',
    'PreemptionHook',
    'ResumableEpochLoop',
    'SafeCheckpointHook',
    'TimmCosineLR',
    'TimmEMAHook',
    'UsageError',
    'add_class_report',
    'announce_start',
    'build_runner',
    'check_datasets',
    'check_gpu',
    'check_inputs',
    'check_labels',
    'check_load_from',
    'choose_start',
    'enable_amp',
    'enable_painting',
    'enable_resume',
    'enable_tta',
    'format_recipe',
    'install_safe_loaders',
    'is_classifier',
    'is_detector',
    'keep_predictions',
    'labels_only',
    'load_config',
    'load_weights',
    'lock_work_dir',
    'measure_iteration',
    'prepare_launch',
    'probe_model',
    'published_weights',
    'read_recipe',
    'require_file',
    'run_tool',
    'scope_of',
    'set_iterations',
    'trust_checkpoints',
]


def _weights_of(config: str) -> str | None:
    row = zoo.of_config(config)
    return f'{zoo.SCHEME}{row.name}' if row is not None and row.url else None


find_own_models(_weights_of)
