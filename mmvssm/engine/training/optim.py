"""Training in mixed precision, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import nn

from mmvssm.registry import OPTIM_WRAPPERS


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
