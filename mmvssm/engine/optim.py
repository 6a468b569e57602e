"""Training in mixed precision, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from torch import nn

from mmvssm.registry import HOOKS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Run forward and loss under bfloat16 autocast.

    bfloat16 has float32's range, so gradients need no scaling: this is
    mmengine's ``AmpOptimWrapper`` without the ``GradScaler`` that ties it to
    a GPU. Parameters, gradients, optimiser state, and with them checkpoints,
    stay float32. Takes the arguments of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass; see ``OptimWrapper``."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


@HOOKS.register_module()
class Float32RegionsHook(Hook):
    """Keep what a two-stage detector makes its regions of in float32.

    Under autocast these would be in half precision: mmdet brings the coordinates
    of regions into the dtype of the maps, whose steps are a pixel or more beyond
    1024 in float16 and beyond 128 in bfloat16, and mmcv's RoIAlign and suppression
    do not take bfloat16 at all. So the outputs of the neck and of the RPN are
    converted. All layers still run in half precision.
    """

    def before_train(self, runner: Runner) -> None:
        """Convert what these parts return from here on."""
        model = runner.model
        keep_regions_in_float32(model.module if is_model_wrapper(model) else model)


def keep_regions_in_float32(detector: nn.Module) -> None:
    """Do to a detector what :class:`Float32RegionsHook` does."""
    for part in ('neck', 'rpn_head'):
        module = getattr(detector, part, None)
        if module is not None:
            module.register_forward_hook(lambda module, args, out: _to_float32(out))


def _to_float32(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return out.float()
    return type(out)(_to_float32(x) for x in out)
