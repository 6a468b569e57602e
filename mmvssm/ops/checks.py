"""What the ops refuse, named by the input that has it: NaN and shards."""

import sys

from torch import Tensor


class NaNInputError(ValueError):
    """An input of an op has NaN."""


def has_nan(*tensors: Tensor) -> bool:
    """Whether there is NaN; elsewhere than on the CPU it does not look.

    There it would have to wait for the device.
    """
    return any(x.device.type == 'cpu' and bool(x.isnan().any()) for x in tensors)


def refuse_nan(op: str, inputs: dict[str, Tensor | None]) -> None:
    """Name the input of an op that NaN came from.

    Raises:
        NaNInputError: An input has NaN. Where none has (infinities make NaN, too)
            nothing happens.
    """
    for name, x in inputs.items():
        bad = 0 if x is None else int(x.isnan().sum())
        if x is not None and bad:
            raise NaNInputError(
                f'{op}: {bad} of {x.numel()} values of {name} are NaN; '
                f'look for their source before the scan '
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
