"""Autocast, also for devices that do not have it."""

import contextlib

import torch
from torch import Tensor


def is_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def disabled(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which nothing on the device of ``x`` is cast."""
    if not is_enabled(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
