"""Training in mixed precision, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager

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
class Float32PyramidHook(Hook):
    """Give a detector's heads the maps of its neck in float32.

    Under autocast these are in half precision, and mmdet brings the coordinates
    of regions into their dtype: a step is a pixel or more beyond 1024 in float16
    and beyond 128 in bfloat16, which mmcv's RoIAlign does not take at all. The
    layers of the heads still run in half precision.
    """

    def before_train(self, runner: Runner) -> None:
        """Convert whatever the neck returns from here on."""
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        if getattr(model, 'neck', None) is not None:
            model.neck.register_forward_hook(_to_float32)


def _to_float32(
    neck: nn.Module, args: tuple, maps: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() for x in maps)
