"""When a layer may use the weights of child modules without calling them.

A fused op takes the weights of several layers at once. That gives what the layers
would give only as long as nobody has put anything else in their place or around
them.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.module_tracker import ModuleTracker


def are_plain(children: Iterable[tuple[nn.Module, tuple[type, ...]]]) -> bool:
    """Whether each module does nothing but what its class does with its weights.

    Adapters put another module in the place of one. Pruning and the older
    ``weight_norm`` and ``spectral_norm`` of ``torch.nn.utils`` compute the weight in
    a hook. Parametrisations of ``torch.nn.utils.parametrize`` do so where the weight
    is read, so a module with them may be plain.

    Args:
        children: Modules, each with the classes that count as plain for it. A
            subclass does not count.
    """
    for child, kinds in children:
        kind = type(child)
        if kind not in kinds and not (
            is_parametrized(child) and kind.__base__ in kinds
        ):
            return False
        # Some libraries replace ``forward`` of a single module.
        if (
            child._forward_hooks
            or child._forward_pre_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
            or 'forward' in child.__dict__
        ):
            return False
    return (
        not (
            torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        )
        or _only_watched()
    )


def _only_watched() -> bool:
    """Whether the hooks of all modules belong to torch's own ModuleTracker.

    ``FlopCounterMode`` has one. It has to count what runs without it.
    """
    tables = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return all(
        isinstance(getattr(hook, '__self__', None), ModuleTracker)
        for table in tables
        for hook in table.values()
    )
