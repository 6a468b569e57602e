"""The projection of a map to the step sizes, B and C of all scans."""

from torch import Tensor

from mmvssm.ops.linear.op import deterministic_linear


def project_map(x: Tensor, x_proj_weight: Tensor) -> Tensor:
    """Project every place for every scan.

    A place's projections do not depend on the scan order that leads to it, so one
    matrix product in the order of the image makes them all.

    Args:
        x: Map (B, H, W, C).
        x_proj_weight: (K, M, C).

    Returns:
        (B, H, W, K M).
    """
    return deterministic_linear(x, x_proj_weight.flatten(0, 1))
