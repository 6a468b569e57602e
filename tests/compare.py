"""How far numbers are from what they should be."""

import torch


def relative_error(got, want):
    """Norm of the difference, relative to that of ``want``.

    It is infinite where the two cannot be compared: shapes differ, one has NaN, or
    infinities are not the same ones. So ``relative_error(...) < bound`` fails there,
    and so does the maximum of many.
    """
    if got is None or want is None or got.shape != want.shape:
        return float('inf')
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    infinite = want.isinf()
    if got.isnan().any() or want.isnan().any() or (got.isinf() != infinite).any():
        return float('inf')
    if infinite.any():
        if not torch.equal(got[infinite], want[infinite]):
            return float('inf')
        got, want = got[~infinite], want[~infinite]
    return float((got - want).norm() / want.norm().clamp(min=1e-300))
