"""The definition of SS2D's core: one scan order after the other."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import Composed, Result
from mmvssm.ops.scan_orders import Orders
from mmvssm.ops.scan_orders.tables import device_table, orders_of
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.reference import ReferenceScan
from mmvssm.ops.ss2d_scan.declaration import Ss2dInputs, Ss2dOptions


class ReferenceSs2d(Composed):
    """Section 4.3 of VMamba (arXiv 2401.10166), along any scan orders.

    In float32, or float64 for float64 input.
    """

    supplier = backends.REFERENCE

    def forward(self, inputs: Ss2dInputs, options: Ss2dOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.ss2d_scan`."""
        height, width = inputs.x.shape[2:]
        orders = orders_of(options.orders)
        positions = device_table('positions', orders, height, width, inputs.x.device)
        y: Tensor | None = None
        for scan, back in zip(scans(inputs, orders), positions):
            same = ScanOptions(delta_softplus=True, out_dtype=scan.u.dtype)
            along = ReferenceScan().forward(scan, same, False).outputs[0][:, :, back]
            y = along if y is None else y + along
        assert y is not None, 'a scan order has at least one row'
        return Result((y.to(options.out_dtype).unflatten(2, (height, width)),))


def scans(inputs: Ss2dInputs, orders: Orders) -> Iterator[ScanInputs]:
    """The selective scan, with softplus, along each row of the scan order.

    Args:
        inputs: Inputs of SS2D's core.
        orders: See :func:`mmvssm.ops.scan_order`.

    Yields:
        Inputs of C channels and L positions, in the order of the scan, in float32
        (float64 for float64 input). At padded places the sequence is zero.
    """
    height, width = inputs.x.shape[2:]
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    x, x_proj, dt_projs, bias, A, Ds = (t.to(dtype) for t in inputs)
    count = len(x_proj)
    places = device_table('places', orders, height, width, x.device)
    # The place of a padded position is one after the last: it has zeros.
    sequence = F.pad(x.flatten(2), (0, 1))
    parameters = (x_proj, dt_projs, bias, A.chunk(count), Ds.chunk(count))
    for there, *own in zip(places, *parameters):
        yield _scan(sequence[:, :, there], *own)


def _scan(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, bias: Tensor, A: Tensor, D: Tensor
) -> ScanInputs:
    """The selective scan of a sequence (B, C, L) with weights that depend on it."""
    rank, states = dt_proj.shape[1], A.shape[1]
    dt, B, C = (x_proj @ u).split((rank, states, states), dim=1)
    return ScanInputs(
        u=u,
        delta=dt_proj @ dt,
        A=A,
        B=B.unsqueeze(1),
        C=C.unsqueeze(1),
        D=D,
        delta_bias=bias,
    )
