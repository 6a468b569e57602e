"""When a call may bypass torch's dispatcher and go to its backend at once.

torch needs the dispatcher to differentiate, trace, count, transform and profile an
op. If none of this happens, the dispatcher only costs time: in a small network as much
as the scan itself.
"""

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.nn import Parameter

from mmvssm.ops.typed import is_tracing


def possible(*inputs: Tensor | None) -> bool:
    """Whether a call with these inputs needs nothing but the result."""
    return not wanted(*inputs) and unobserved(*inputs)


def wanted(*inputs: Tensor | None) -> bool:
    """Whether gradients of the inputs are wanted."""
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active.

    They work on torch's own operations, not on ops of torch.library.
    """
    level = torch._C._functorch.maybe_current_level()
    return level is not None or forward_ad._current_level >= 0


def unobserved(*inputs: Tensor | None) -> bool:
    """Whether a call needs nothing but the result and perhaps its gradient."""
    tensors = [x for x in inputs if x is not None]
    return not (
        torch.compiler.is_compiling()
        # Fake tensors and other subclasses, and modes that watch the dispatcher.
        or any(type(x) not in (Tensor, Parameter) or x.is_meta for x in tensors)
        or torch._C._len_torch_dispatch_stack()
        # torch.func, forward-mode differentiation, torch.jit.trace, the profiler.
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or is_tracing()
        or _profiler_enabled()
    )
