"""The linear layer on the CPU, with the same bits at any number of threads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmvssm.ops.backends import Supplier
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.deterministic_math import (
    linear_product,
    product_of_columns,
    sum_rows,
)
from mmvssm.ops.linear.declaration import LinearInputs, LinearOptions
from mmvssm.ops.typed import sole


@dataclass(frozen=True)
class ProductBackend(KernelBackend):
    """Products by oneDNN if it has them, in pieces of fixed length."""

    supplier: Supplier

    def refuses(self, inputs: LinearInputs, options: LinearOptions) -> str | None:
        """It refuses calls that torch's own linear layer does as well."""
        if inputs.x.device.type != 'cpu' or inputs.x.ndim < 2:
            return 'it takes matrices on the CPU'
        dtypes = {x.dtype for x in inputs if x is not None}
        if dtypes != {torch.float32} and not options.deterministic:
            return 'it takes float32'
        return None

    def forward(
        self, inputs: LinearInputs, options: LinearOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.linear`."""
        return Result((linear_product(*inputs).contiguous(),), has_nan=False)

    def backward(
        self,
        inputs: LinearInputs,
        options: LinearOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: LinearInputs,
    ) -> LinearInputs:
        """Gradients of the inputs whose gradients are wanted."""
        grad = sole(grads)
        x, weight, _ = inputs
        rows = grad.flatten(0, -2)
        # An input is None if no gradient needs it; even x and weight may be.
        return LinearInputs._make(
            (
                linear_product(grad, weight.t()) if wanted.x else None,
                product_of_columns(rows, x.flatten(0, -2)) if wanted.weight else None,
                sum_rows(rows.unsqueeze(0)) if wanted.bias else None,
            )
        )
