"""The core of VMamba's Cascade-Scan: first the rows, then the columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import linear, selective_scan

_SETS = 4


def cascade_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scan the rows of a map, then the columns of the result.

    The Cascade-Scan of VMamba's ablation (`arXiv 2401.10166`_, table 10). With
    s_k the selective scan of :func:`mmvssm.ops.ss2d_scan` with the k-th set of
    weights, and LN a layer norm over the channels without weights,

    - every row of LN(x) is one sequence; s_0 scans it forwards, s_1 backwards, and the
      two results are added up;
    - every column of LN of that result is one sequence, for s_2 and s_3.

    No state passes from one row to the next. So this is not a scan order of
    :func:`mmvssm.ops.ss2d_scan`. The arguments are the same, with four sets of weights.

    Args:
        x: Map (B, C, H, W), any strides; channels-last memory is the fastest.
        x_proj_weight: (4, R + 2N, C).
        dt_projs_weight: (4, C, R).
        dt_projs_bias: (4, C), added before the softplus.
        A: Decay rates (4 * C, N), negative.
        Ds: Skip weights (4 * C,).
        backend: See :func:`mmvssm.ops.selective_scan`.

    Returns:
        The map (B, C, H, W) in x's dtype, under autocast in float32.

    Raises:
        ValueError: x is not a map or has an empty side, or there are not four sets.

    .. _arXiv 2401.10166: https://arxiv.org/abs/2401.10166
    """
    if x.ndim != 4 or x.numel() == 0 or len(x_proj_weight) != _SETS:
        raise ValueError(
            f'cascade_scan: x must be (batch, channels, height, width) with no empty '
            f'side, and x_proj_weight have {_SETS} sets, got {tuple(x.shape)}, '
            f'{tuple(x_proj_weight.shape)}'
        )
    A, Ds = A.unflatten(0, (_SETS, -1)), Ds.unflatten(0, (_SETS, -1))
    weights = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    rows = _scan_rows(_normalise(x), *(weight[:2] for weight in weights), backend)
    columns = _normalise(rows).mT
    return _scan_rows(columns, *(weight[2:] for weight in weights), backend).mT


def _normalise(x: Tensor) -> Tensor:
    """Layer norm over the channels of (B, C, H, W), without weights.

    The published code has it to prevent NaN: the output of one scan may be large, and
    the next scan computes its step sizes from it.
    """
    x = x.permute(0, 2, 3, 1)
    return F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)


def _scan_rows(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    backend: str | None,
) -> Tensor:
    """Scan each row forwards with one set, backwards with the other, and add.

    Args:
        x: (B, C, H, W).
        x_proj_weight: (2, R + 2N, C).
        dt_projs_weight: (2, C, R).
        dt_projs_bias: (2, C).
        A: (2, C, N).
        Ds: (2, C).
        backend: Backend of the scan.

    Returns:
        (B, C, H, W).
    """
    batch, _, height, _ = x.shape
    rank, states = dt_projs_weight.shape[2], A.shape[2]
    rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # (B H, W, C)
    ways = (rows, rows.flip(1))
    projected = torch.stack([*map(linear, ways, x_proj_weight)], dim=2)
    dt_low_rank, B, C = projected.split((rank, states, states), dim=-1)
    delta = map(linear, dt_low_rank.unbind(2), dt_projs_weight)
    y = selective_scan(
        torch.cat(ways, dim=-1).mT,  # (B H, 2 C, W), channels-last in memory
        torch.cat([*delta], dim=-1).mT,
        A.flatten(0, 1),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        Ds.flatten(),
        None,
        dt_projs_bias.flatten(),
        True,
        backend=backend,
    )
    forwards, backwards = y.mT.chunk(2, dim=-1)
    rows = forwards + backwards.flip(1)
    return rows.unflatten(0, (batch, height)).permute(0, 3, 1, 2)
