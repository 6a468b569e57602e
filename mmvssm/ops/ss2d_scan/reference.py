"""The definition of SS2D's core: one scan order after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import Composed, Result
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
        dtype = torch.promote_types(inputs.x.dtype, torch.float32)
        x, x_proj, dt_projs, bias, A, Ds = (t.to(dtype) for t in inputs)
        count = len(x_proj)
        orders = orders_of(options.orders)
        places, positions = (
            device_table(kind, orders, height, width, inputs.x.device)
            for kind in ('places', 'positions')
        )
        # The place of a padded position is one after the last: it has zeros.
        sequence = F.pad(x.flatten(2), (0, 1))
        y = torch.zeros_like(x.flatten(2))
        parameters = (x_proj, dt_projs, bias, A.chunk(count), Ds.chunk(count))
        for there, back, *own in zip(places, positions, *parameters):
            y = y + _scan(sequence[:, :, there], *own)[:, :, back]
        return Result((y.to(options.out_dtype).unflatten(2, (height, width)),))


def _scan(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, bias: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """The selective scan of a sequence (B, C, L) with weights that depend on it."""
    rank, states = dt_proj.shape[1], A.shape[1]
    dt, B, C = (x_proj @ u).split((rank, states, states), dim=1)
    inputs = ScanInputs(
        u=u,
        delta=dt_proj @ dt,
        A=A,
        B=B.unsqueeze(1),
        C=C.unsqueeze(1),
        D=D,
        delta_bias=bias,
    )
    options = ScanOptions(delta_softplus=True, out_dtype=u.dtype)
    return ReferenceScan().forward(inputs, options, False).outputs[0]
