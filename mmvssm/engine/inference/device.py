"""The device that a model runs on."""

import torch
from mmengine.device import get_device

from mmvssm.engine.errors import UsageError


def checked_device(device: str | None) -> str:
    """The device to use; by default the accelerator, if the machine has one.

    Raises:
        UsageError: There is no such device.
    """
    device = device or get_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f'cannot use the device {device!r}: {str(error).splitlines()[0]}'
        ) from error
    return device
