"""Inputs that the ops refuse: NaN and shards. The error names the input."""

import sys

from torch import Tensor


class NaNInputError(ValueError):
    """An input of an op has NaN."""


def has_nan(*tensors: Tensor) -> bool:
    """Whether a tensor on the CPU has NaN.

    Tensors on other devices are not looked at: that would wait for the device.
    """
    return any(x.device.type == 'cpu' and bool(x.isnan().any()) for x in tensors)


def refuse_nan(op: str, inputs: dict[str, Tensor | None]) -> None:
    """Raise an error that names the input with NaN.

    Raises:
        NaNInputError: An input has NaN. If none has, nothing happens: infinities make
            NaN, too.
    """
    for name, x in inputs.items():
        bad = 0 if x is None else int(x.isnan().sum())
        if x is not None and bad:
            raise NaNInputError(
                f'{op}: {bad} of {x.numel()} values of {name} are NaN; '
                f'look for the source of NaN before this op '
                f'(torch.autograd.set_detect_anomaly helps)'
            )


def refuse_shards(op: str, inputs: dict[str, Tensor | None]) -> None:
    """Name an input that is a DTensor of ``torch.distributed``.

    The axes that a scan goes along may be among those that are divided.

    Raises:
        TypeError: An input is one.
    """
    # Whoever has made one has imported it.
    module = sys.modules.get('torch.distributed.tensor')
    for name, x in inputs.items():
        if module is not None and isinstance(x, module.DTensor):
            raise TypeError(
                f'{op}: {name} is a DTensor ({x.placements}), and the op does not know '
                'of shards: give it x.full_tensor(), or x.to_local() if each process '
                'is to compute on its own part. (In a model under fully_shard (FSDP2) '
                'the weights are whole within forward() of the module that has them.)'
            )
