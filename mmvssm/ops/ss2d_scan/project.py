"""The projection of a map to the step sizes, B and C of all routes."""

import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops.linear import linear


def project_map(x: Tensor, x_proj_weight: Tensor, backend: str) -> Tensor:
    """Project every position for every route.

    A position's projections do not depend on the route that leads to it, so one
    matrix product in the order of the image makes them all.

    Args:
        x: Map (B, H, W, C).
        x_proj_weight: (4, M, C).
        backend: Of the scan, see :func:`mmvssm.ops.linear`.

    Returns:
        (B, H, W, 4 M), perhaps a view with some more columns in memory.
    """
    weight = x_proj_weight.flatten(0, 1)
    if backend == 'cpu':
        return linear(x, weight, backend=backend)
    columns = weight.shape[0]
    # The product may give each thread some of the columns. Whole vectors of 16
    # keep the bits the same at any number of threads.
    return F.linear(x, F.pad(weight, (0, 0, 0, -columns % 16)))[..., :columns]
