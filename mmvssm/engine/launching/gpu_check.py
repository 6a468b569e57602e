"""Check the GPU kernels that a config's model asks for, before it is trained."""

import os
from collections.abc import Iterable

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvssm.backbones import set_img_shapes
from mmvssm.backbones.base import Backbone
from mmvssm.engine.checkpoints.weights import unwrap
from mmvssm.engine.configs.image_sizes import Batch, inference_batches, training_batches
from mmvssm.ops.backends import (
    ENV_VARIABLE,
    choose_backend,
    explain_backend,
    suppliers,
)
from mmvssm.ops.gpu_check import choice
from mmvssm.ops.gpu_check.calls import OpCall, Recorder, digest
from mmvssm.ops.gpu_check.cases import of_calls
from mmvssm.ops.gpu_check.launches import BACKEND
from mmvssm.ops.gpu_check.run import ensure
from mmvssm.ops.gpu_check.verdicts import ALL, VARIABLE, standing

# The dtype of optimizer wrappers that run the model under autocast, if they name none.
_AUTOCAST = {'AmpOptimWrapper': 'float16', 'mmvssm.Bf16OptimWrapper': 'bfloat16'}


def check_gpu(runner: Runner) -> None:
    """Have the kernels checked that the runner's training will launch, and compiled.

    It goes by what this machine knows already, or waits for the check, once for a
    machine and the sizes of a config. What came out is one line of the log; ops whose
    kernels did not pass are computed by another backend. Nothing happens without a GPU
    or where the choice is made already (``MMVSSM_GPU_CHECK``,
    ``MMVSSM_SCAN_BACKEND``).

    Args:
        runner: Before its training starts. Processes of a training may come here at
            different times: none talks to another.
    """
    if not torch.cuda.is_available() or suppliers[BACKEND].unavailable():
        return
    if os.environ.get(VARIABLE) in ('0', 'trust') or os.environ.get(ENV_VARIABLE):
        return
    device = torch.device('cuda', torch.cuda.current_device())
    runner.logger.info('GPU kernels: %s', check_model(runner.model, runner.cfg, device))


def check_model(model: nn.Module, cfg: Config, device: torch.device) -> str:
    """Check what a model asks in a config's training on a device.

    Returns:
        What is taken from now on and why, in one line.
    """
    model, dtype = unwrap(model), autocast_dtype(cfg)
    training, inference = training_batches(cfg), inference_batches(cfg)
    calls = calls_of(model, training[:1], device, dtype)
    name = digest(calls, training, inference)
    sets = ensure(
        name,
        lambda: of_calls(calls),
        device,
        BACKEND,
        kernels_of=lambda: (
            calls_of(model, training, device, dtype),
            calls_of(model, inference, device),
        ),
    )
    ops = list(sets[name])
    verdicts = {op: standing(sets, op, [name, op, ALL]) for op in ops}
    choice.settle(device, {op: v for op, v in verdicts.items() if v is not None})
    return '; '.join(_taken(op, device) for op in ops) or 'the model asks for none'


def _taken(op: str, device: torch.device) -> str:
    """What is taken for an op, and why."""
    name = choose_backend(device, torch.float32, op=op)
    why = explain_backend(device, torch.float32, op=op)[BACKEND]
    return f'{op} by {name} ({BACKEND}: {why})'


def autocast_dtype(cfg: Config) -> torch.dtype | None:
    """In which dtype a config's training runs the model, None without autocast."""
    wrapper = cfg.get('optim_wrapper') or {}
    default = _AUTOCAST.get(str(wrapper.get('type')))
    return default and getattr(torch, wrapper.get('dtype') or default)


def calls_of(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[OpCall]:
    """The calls of ops in the forward pass of a model's backbone, found without it.

    It runs on tensors without values; the model stays as it is.

    Args:
        model: A segmentor or detector; a model without ``backbone`` is one.
        batches: Of images.
        device: Where it would run.
        dtype: Of autocast, None without.
    """
    backbone = getattr(model, 'backbone', model)
    channels = backbone.in_channels if isinstance(backbone, Backbone) else 3
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with mode, Recorder() as recorder, torch.no_grad(), autocast:
        state = {
            name: mode.from_tensor(x.detach()).to(device)
            for name, x in [*backbone.named_parameters(), *backbone.named_buffers()]
        }
        for number, *size in batches:
            images = torch.empty(number, channels, *size, device=device)
            set_img_shapes(images, [size] * number)
            torch.func.functional_call(backbone, state, (images,))
    return recorder.calls
