"""CPU kernels that take the place of the GPU kernels, right or broken on purpose.

They show what the check does about kernels that are wrong, return NaN, never return,
crash the process or are slow. Only ``check_gpu --device cpu`` and tests install them.
"""

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import Backend, KernelBackend, Outputs, Result
from mmvssm.ops.leaves import leaves_of, pack
from mmvssm.ops.operator import all_ops


def _wrong(x: Tensor) -> None:
    x.view(-1)[-1] += 1


def _nan(x: Tensor) -> None:
    x.view(-1)[-1] = float('nan')


def _hang(x: Tensor) -> None:
    while True:
        time.sleep(1)


def _crash(x: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _slow(x: Tensor) -> None:
    time.sleep(0.2)


FAULTS: dict[str, Callable[[Tensor], None]] = dict(
    wrong=_wrong, nan=_nan, hang=_hang, crash=_crash, slow=_slow
)


class StandIn(KernelBackend):
    """A backend for the CPU under another name.

    Args:
        inner: The backend that computes.
        supplier: The supplier whose name it gets.
        fault: One of ``FAULTS``, in the backward pass, or None.
    """

    def __init__(
        self, inner: Backend[Any, Any], supplier: backends.Supplier, fault: str | None
    ):
        self._inner, self.supplier, self._fault = inner, supplier, fault

    def refuses(self, inputs: Any, options: Any) -> str | None:
        """It refuses what the inner backend refuses."""
        return self._inner.refuses(inputs, options)

    def saved_like(self, inputs: Any, options: Any) -> Outputs:
        """As the inner one."""
        return self._inner.saved_like(inputs, options)

    def forward(self, inputs: Any, options: Any, keep: bool) -> Result:
        """As the inner one."""
        return self._inner.forward(inputs, options, keep)

    def backward(
        self,
        inputs: Any,
        options: Any,
        saved: Outputs,
        grads: tuple[Tensor | None, ...],
        wanted: Any,
    ) -> Any:
        """The gradients of the inner backend, with the fault."""
        found = self._inner.backward(inputs, options, saved, grads, wanted)
        if self._fault is None:
            return found
        first, *rest = leaves_of(found)
        # The original may share memory with other tensors, so it must not change.
        first = first.contiguous().clone()
        FAULTS[self._fault](first)
        return pack(type(found), iter([first, *rest]))


def install(fault: str | None = None) -> None:
    """Make ``cuda`` take CPU tensors, and compute them with the CPU kernels.

    Args:
        fault: One of ``FAULTS``, or None.
    """
    supplier = dataclasses.replace(
        backends.suppliers['cuda'],
        devices=('cpu',),
        dtypes=(torch.float32, torch.bfloat16),
        unavailable=lambda: None,
        checked=('cpu',),
    )
    backends.suppliers['cuda'] = supplier
    backends.suppliers['cpu'] = dataclasses.replace(backends.CPU, automatic=False)
    for op in all_ops.values():
        if 'cuda' in op.backends and 'cpu' in op.backends:
            op.supply(StandIn(op.backends['cpu'], supplier, fault))
