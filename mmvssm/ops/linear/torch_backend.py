"""torch's own linear layer."""

from dataclasses import dataclass

import torch.nn.functional as F

from mmvssm.ops.backends import Supplier
from mmvssm.ops.contract import Composed, Result
from mmvssm.ops.linear.declaration import LinearInputs, LinearOptions


@dataclass(frozen=True)
class TorchLinear(Composed):
    """``torch.nn.functional.linear``, which is also the definition."""

    supplier: Supplier

    def forward(
        self, inputs: LinearInputs, options: LinearOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.linear`."""
        return Result((F.linear(*inputs),), has_nan=False)
