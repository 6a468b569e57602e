"""Keep regions of detectors in float32 under autocast."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmvssm.registry import HOOKS


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
