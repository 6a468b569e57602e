"""Kernel launches and memory of the ``torch`` backend's scan on a GPU, without one.

    python benchmarks/launches.py --batch 128 --channels 384 --length 3136 --states 1

prints one line, ``forward F backward B bytes N``: the calls of a selective scan with
all its options that launch a kernel, and the most memory that its work arrays have at
a time. Inputs, outputs, gradients and what is saved for the backward pass are not
among them.

The backend divides its work on torch's meta device, where tensors have no values, as
it does on a GPU.
"""

import argparse
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.op import SELECTIVE_SCAN

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
aten = torch.ops.aten
# Calls that give memory nobody has written to, or none, though torch calls them no
# views.
_LAUNCH_NOTHING = {
    *(aten.empty, aten.empty_like, aten.empty_strided),
    *(aten.new_empty, aten.new_empty_strided, aten._unsafe_view),
}
# Padding fills an array, then copies.
_LAUNCH_TWO = {aten.constant_pad_nd}


class Launches(TorchDispatchMode):
    """Counts calls that launch a kernel, and watches the memory that they make.

    Attributes:
        number: Launches so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        # Of every array made: its number, and its bytes, negative where it is freed.
        self._events: list[tuple[int, int]] = []
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a call and count it."""
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if function.is_view:
            return out
        if packet not in _LAUNCH_NOTHING:
            self.number += 2 if packet in _LAUNCH_TWO else 1
        for storage in _storages(pytree.tree_leaves(out)):
            if storage._cdata not in self._alive:
                self._watch(storage)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        number, size = len(self._events), storage.nbytes()
        self._alive[storage._cdata] = number
        self._events.append((number, size))
        weakref.finalize(storage, self._free, storage._cdata, number, size)

    def _free(self, address: int, number: int, size: int) -> None:
        del self._alive[address]
        self._events.append((number, -size))

    def peak(self, returned: Iterable[Any]) -> int:
        """Most bytes alive at a time, but for the tensors that are returned."""
        left_out = {self._alive.get(s._cdata) for s in _storages(returned)}
        most = alive = 0
        for number, size in self._events:
            if number not in left_out:
                alive += size
                most = max(most, alive)
        return most


def _storages(values: Iterable[Any]) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in values if isinstance(x, Tensor)]


class Counts(NamedTuple):
    """Cost of one scan.

    Attributes:
        forward, backward: Calls that launch a kernel.
        bytes: The most that work arrays have at a time, in either pass.
    """

    forward: int
    backward: int
    bytes: int


@torch.no_grad()
def count(
    batch: int,
    channels: int,
    length: int,
    states: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Counts:
    """Count a scan and its backward pass."""
    sequence = torch.empty(batch, channels, length, dtype=dtype, device='meta')
    weights = sequence.new_empty(batch, 1, states, length)
    of_channels = sequence.new_empty(channels, dtype=torch.float32)
    inputs = ScanInputs(
        u=sequence,
        delta=sequence,
        A=of_channels.new_empty(channels, states),
        B=weights,
        C=weights,
        D=of_channels,
        z=sequence,
        delta_bias=of_channels,
    )
    options = ScanOptions(True, dtype, True)
    with Launches() as forward:
        result = SELECTIVE_SCAN.backends['torch'].forward(inputs, options, True)
    grads = [torch.empty_like(x) for x in result.outputs]
    with Launches() as backward:
        found = SELECTIVE_SCAN.backward(
            *(*grads, *inputs, *result.saved),
            *([True] * len(inputs), *options, 'torch'),
        )
    work = forward.peak([*result.outputs, *result.saved]), backward.peak(found)
    return Counts(forward.number, backward.number, max(work))


def parse_args() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ('batch', 'channels', 'length', 'states'):
        parser.add_argument(f'--{name}', type=int, required=True)
    parser.add_argument(
        '--dtype', choices=DTYPES, default='float32', help='of the activations'
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Count one shape and print the line."""
    counts = count(
        *(args.batch, args.channels, args.length, args.states),
        dtype=DTYPES[args.dtype],
    )
    print(' '.join(f'{name} {value}' for name, value in counts._asdict().items()))


if __name__ == '__main__':
    main(parse_args())
