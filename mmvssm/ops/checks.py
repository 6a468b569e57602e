"""NaN in the ops: found in what comes out, named by what went in."""

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
