"""Backends that are added to an op from outside."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mmvssm.ops.backends import add_supplier, remove_supplier
from mmvssm.ops.contract import Backend
from mmvssm.ops.operator import Op, all_ops, public_ops


def register_backend(
    op: str | Callable[..., Any], backend: Backend[Any, Any]
) -> 'Registration':
    """Add a backend to an op.

    From now on :func:`mmvssm.ops.list_backends` lists its supplier, before the others.
    An op for which the supplier has no backend is composed of other ops, if it can be.

    Args:
        op: The op's public function, or its name.
        backend: See :class:`Backend`.

    Returns:
        An object whose ``remove()`` removes the backend again.

    Raises:
        ValueError: There is no such op, or the op has a backend of that name.
    """
    known = all_ops.get(op) if isinstance(op, str) else public_ops.get(op)
    if known is None:
        raise ValueError(f'{op!r} is no op of mmvssm; there are {sorted(all_ops)}')
    name = backend.supplier.name
    if name in known.backends:
        raise ValueError(f'{known.name} has a backend {name!r} already; rename yours')
    add_supplier(backend.supplier)
    known.supply(backend)
    return Registration(known, name)


class Registration(NamedTuple):
    """A backend that was added to an op."""

    op: Op[Any, Any]
    name: str

    def remove(self) -> None:
        """Remove the backend; with its last backend the supplier is removed, too."""
        del self.op.backends[self.name]
        if not any(self.name in op.backends for op in all_ops.values()):
            remove_supplier(self.name)
