"""NaN in the ops: it is found in the outputs, and the error names the input."""

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
