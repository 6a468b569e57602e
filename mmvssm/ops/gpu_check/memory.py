"""Guarded memory, which shows whether kernels access memory that is not theirs.

All of it starts as NaN. So a value that was not written, or that was read from outside
a tensor, makes NaN in the results. Before and after every tensor there is a band of
memory that must not change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops.gpu_check.calls import Layout

# A multiple of the alignment that kernels may need.
_BAND_BYTES = 4096
_aten = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)


class Guarded(TorchDispatchMode):
    """In a ``with`` block, ``torch.empty`` returns tensors in guarded memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bands: list[tuple[Layout, tuple[Tensor, Tensor]]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _EMPTY and found.is_floating_point() and not found.is_meta:
            return self.tensor(Layout.of(found), found.device)
        return found

    def tensor(self, layout: Layout, device: torch.device) -> Tensor:
        """A tensor of a layout, filled with NaN."""
        dtype = getattr(torch, layout.dtype)
        band, size = _BAND_BYTES // dtype.itemsize, layout.places()
        memory = torch.full(
            (size + 2 * band,), float('nan'), dtype=dtype, device=device
        )
        self._bands.append((layout, (memory[:band], memory[band + size :])))
        return memory.as_strided(layout.shape, layout.stride, band)

    def damaged(self) -> str | None:
        """The tensor with a band that was changed, or None."""
        for layout, bands in self._bands:
            if not all(bool(band.isnan().all()) for band in bands):
                return f'a {layout.dtype} tensor {layout.shape}'
        return None
