"""What the GPU kernels will cost, counted from their machine code without a GPU.

    python benchmarks/gpu_counts.py [--json FILE] [--keep DIR] [--only TEXT]

Models run with tensors that have no values. What their ops launch, forward and
backward, is written down, compiled for sm_90 by NVRTC and read by `sass_model.py`.
A line of the table is a kernel in one pass of one call of an op:

    launches        how often it is launched
    registers       of a thread; stack: bytes a thread, 0 if all fits into registers
    shared          bytes a CTA
    resident        warps that a multiprocessor holds at once; warps: in the grid
    instructions    an element and state, all launches together; with_rare: if what is
                    marked as rare ran each time
    untold          loops inside that are counted once for want of knowing better
    dram, l1        cycles of a warp alone for an element and state, by where loads find
                    their data; ratio: the first over the second, of the worst launch
    maps            bytes moved, in maps (batch, channels, positions) of the first input

An element is a channel at a position, of one scan where there are several. Bytes are
what all lanes move: a load that only some lanes need counts in full, and what caches
save is not taken off.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cubin
import sass_model
import torch

import mmvssm
from mmvssm import ops
from mmvssm.ops.cuda import kernels
from mmvssm.ops.gpu_check.calls import OpCall, Recorder
from mmvssm.ops.gpu_check.values import empty, graded, packed, wanted
from mmvssm.ops.operator import all_ops
from mmvssm.ops.scan_orders.registry import real_tensors

BACKEND = 'cuda'
CAPABILITY = 90
# Models with the sizes of their images and batches: those that they are trained and
# tested at, and single images, which have to fill a GPU.
VMAMBA = [
    (name, *size)
    for name in ('vmamba_t_s1l8', 'vmamba_t_s2l5')
    for size in (
        *((224, 224, 128), (512, 512, 4), (800, 1280, 2)),
        *((224, 224, 1), (512, 512, 1), (800, 1280, 1)),
    )
]
VIM = [('vim_s', 224, 224, 128), ('vim_s', 1248, 1248, 1)]
MLLA = [('mlla_t', 224, 224, 128), ('mlla_t', 512, 512, 4), ('mlla_t', 800, 1280, 2)]
# Scans by themselves: batch, channels, positions.
SCANS = [(128, 768, 197), (1, 768, 6085)]
SCAN_STATES = (1, 8, 16)


def model_calls(name: str, height: int, width: int, batch: int) -> list[OpCall]:
    """What the ops of a classifier are asked for images, in bfloat16."""
    with torch.device('meta'):
        model = mmvssm.build_classifier(name).to(torch.bfloat16).eval()
        images = torch.empty(batch, 3, height, width, dtype=torch.bfloat16)
    with torch.no_grad(), Recorder() as recorder:
        model(images)
    return recorder.calls


def scan_call(batch: int, channels: int, length: int, states: int) -> OpCall:
    """A selective scan with all it may have, as Mamba's block asks for it."""

    def rows(*sizes: int) -> torch.Tensor:
        shape = (batch, length, *sizes)
        return torch.empty(shape, dtype=torch.bfloat16, device='meta').movedim(1, -1)

    def parameter(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device='meta')

    with Recorder() as recorder:
        ops.selective_scan(
            *(rows(channels), rows(channels), parameter(channels, states)),
            *(rows(states), rows(states), parameter(channels), rows(channels)),
            *(parameter(channels), True),
        )
    return recorder.calls[0]


def cases() -> Iterator[tuple[str, OpCall]]:
    """All calls, each with what it comes from."""
    for name, height, width, batch in (*VMAMBA, *VIM, *MLLA):
        for call in model_calls(name, height, width, batch):
            yield f'{name} {height}x{width} batch {batch}', call
    for batch, channels, length in SCANS:
        for states in SCAN_STATES:
            call = scan_call(batch, channels, length, states)
            yield f'{states} states, batch {batch}', call


def calls(only: str = '') -> dict[OpCall, str]:
    """Calls of ops with kernels, and what they come from."""
    found: dict[OpCall, str] = {}
    for case, call in cases():
        if BACKEND in all_ops[call.op].backends and only in f'{case} {call.op}':
            found.setdefault(call, case)
    return found


def all_launches(of: Iterable[OpCall]) -> list[kernels.Launch]:
    """What calls launch."""
    return [x for call in of for own in launches_of(call).values() for x in own]


class _Saved:
    """What a forward pass leaves for the backward pass, in autograd's place."""

    saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Gradients stay as they are given."""


def launches_of(call: OpCall) -> dict[str, list[kernels.Launch]]:
    """What a call launches, by pass."""
    op, context = call.declaration, _Saved()
    with real_tensors(), kernels.recording() as launches:
        inputs, options = packed(call, [empty(layout) for layout in call.tensors])
        backend = op.backend(BACKEND, inputs, options)
        result = backend.forward(inputs, options, True)
        outputs, forward = result.outputs, len(launches)
        saved = op.returned(outputs, result.saved)[len(outputs) :]
        op.remember(context, inputs, options, BACKEND, outputs, saved)
        grads = tuple(
            torch.empty_like(y) if has_gradient else None
            for y, has_gradient in zip(outputs, graded(call))
        )
        op.gradients(op.backward, context, grads, wanted(call))
    return dict(forward=launches[:forward], backward=launches[forward:])


# Numbers


@dataclass
class Row:
    """A kernel in a pass of a call: see the table above."""

    case: str
    op: str
    inputs: int  # tensors that are given
    shape: list[int]  # of the first one
    rank: int
    states: int
    direction: str
    kernel: str
    scans: int  # of the call, 0 for a kernel that does none
    launches: int
    registers: int
    stack: int
    shared: int
    resident: int
    warps: int
    instructions: float
    with_rare: float
    untold: int
    dram: float
    l1: float
    ratio: float | None
    maps: float

    @property
    def key(self) -> tuple[object, ...]:
        """What tells rows apart."""
        return (
            self.case,
            self.op,
            self.inputs,
            *self.shape,
            self.direction,
            self.kernel,
        )

    @property
    def name(self) -> str:
        """The same in words."""
        shape = 'x'.join(map(str, self.shape))
        return f'{self.kernel} {self.direction}, {self.op} {shape} of {self.case}'


def numbers_in(args: ctypes.Structure) -> dict[str, int]:
    """All integers of kernel args by their names.

    Of several with a name, that of the outermost structure, then of the first one.
    """
    own: dict[str, int] = {}
    inside: dict[str, int] = {}
    for name, *_ in args._fields_:
        value = getattr(args, name)
        if isinstance(value, ctypes.Structure):
            inside = numbers_in(value) | inside
        elif isinstance(value, int):
            own[name] = value
    return inside | own


class Counter:
    """Compiles launches and counts them.

    Args:
        keep: Where to put compiled kernels.
    """

    def __init__(self, keep: Path) -> None:
        self._keep = keep
        keep.mkdir(parents=True, exist_ok=True)
        self.compilers: set[str] = set()
        self.model = functools.cache(self._model)

    def _model(self, binary) -> sass_model.Model:
        """What a compiled kernel is like; see `kernels.Launch.binary`."""
        kernel, constants = binary
        code = kernels.compiled(kernel, dict(constants), CAPABILITY)
        said = re.search(rb'Cuda compilation tools, release [\d.]+, V([\d.]+)', code)
        self.compilers.add(said[1].decode() if said else 'unknown')
        names = '-'.join(f'{name}{value}' for name, value in constants)
        digest = hashlib.sha256(code).hexdigest()[:8]
        # Names of files have an end.
        path = self._keep / f'{kernel.entry}-{names[:180]}-{digest}.cubin'
        path.write_bytes(code)
        marks = sass_model.Marks.of(kernel.path)
        whole = not has_loop(dict(constants))
        return sass_model.read(path, marks, whole)[kernel.entry]

    def rows(self, case: str, call: OpCall) -> Iterator[Row]:
        """Of a call."""
        for direction, launches in launches_of(call).items():
            for kernel in dict.fromkeys(x.kernel for x in launches):
                own = [x for x in launches if x.kernel == kernel]
                yield self._row(case, call, direction, own)

    def _row(
        self, case: str, call: OpCall, direction: str, launches: list[kernels.Launch]
    ) -> Row:
        models = [self.model(x.binary) for x in launches]
        first = call.tensors[0]
        assert first is not None, 'the first input of an op is always there'

        scans = scans_of(call) if is_scan(launches[0]) else 0
        parts = max(scans, 1) * (call.states or 1 if scans else 1)

        def total(number: Callable[[sass_model.Model], float]) -> float:
            size = math.prod(first.shape)
            return sum(number(m) * passes(x, size) for m, x in zip(models, launches))

        def part(number: Callable[[sass_model.Model], float]) -> float:
            return round(total(number) / parts, 2)

        ratios = [
            model.cycles('DRAM') / model.cycles('L1')
            for model, launch in zip(models, launches)
            if has_loop(launch.constants)
        ]
        # Of a lane, in values of two bytes.
        moved = total(lambda m: sum(x.loaded + x.stored for x in m.passes) / 64)
        return Row(
            **dict(case=case, op=call.op, inputs=len(call.named())),
            shape=list(first.shape),
            rank=max(x.constants.get('RANK', 0) for x in launches),
            states=call.states or 0,
            **dict(direction=direction, kernel=launches[0].kernel.entry),
            **dict(scans=scans, launches=len(launches)),
            registers=max(x.resources.registers for x in models),
            stack=max(x.resources.stack for x in models),
            shared=max(x.shared for x in launches),
            resident=min(
                model.resources.resident_warps(x.threads, x.shared)
                for model, x in zip(models, launches)
            ),
            warps=min(x.grid * -(-x.threads // 32) for x in launches),
            instructions=part(lambda model: model.instructions),
            with_rare=part(lambda model: model.most),
            untold=max(one.untold for model in models for one in model.passes),
            dram=part(lambda model: model.cycles('DRAM')),
            l1=part(lambda model: model.cycles('L1')),
            # What has no loop waits for its loads, and other warps do their work.
            ratio=round(max(ratios), 3) if ratios else None,
            maps=round(moved, 2),
        )


def scans_of(call: OpCall) -> int:
    """How many scans a call of an op has."""
    layouts = call.named()
    if 'dt_projs_weight' in layouts:
        return layouts['dt_projs_weight'].shape[0]
    return 2 if 'backward.A' in layouts else 1


def is_scan(launch: kernels.Launch) -> bool:
    """Whether a kernel walks along sequences."""
    return {'chains', 'batch', 'groups', 'blocks'} <= numbers_in(launch.args).keys()


def has_loop(constants: Mapping[str, int]) -> bool:
    """Whether a kernel loops over positions: it has constants that say how."""
    return sass_model.elements(constants) is not None


def passes(launch: kernels.Launch, size: int) -> float:
    """How many passes of a thread a launch takes for an element of the input.

    Args:
        launch: The launch.
        size: Elements of the input.
    """
    elements = sass_model.elements(launch.constants)
    if elements is None:
        return launch.grid * launch.threads / size
    if not is_scan(launch):
        return 1 / elements
    args = numbers_in(launch.args)
    chains = args['batch'] * args['groups'] * args['blocks']
    # A chain of the kernel that merges on chip walks several scans, one by one.
    return args['chains'] * args.get('count', 1) / chains / elements


def count(keep: Path, only: str = '') -> tuple[dict[str, str], list[Row]]:
    """All rows, with the versions of what made them.

    Args:
        keep: Where to put compiled kernels.
        only: A part of the name of the op or of where it comes from.
    """
    chosen = calls(only)
    kernels.prepare(all_launches(chosen), CAPABILITY)
    counter = Counter(keep)
    rows = [row for call, case in chosen.items() for row in counter.rows(case, call)]
    versions = {
        'NVRTC': ', '.join(sorted(counter.compilers)),
        'nvdisasm': cubin.version('nvdisasm'),
        'cuobjdump': cubin.version('cuobjdump'),
    }
    return versions, rows


# Comparison

# A number that gets worse by more than this is a step back.
TOLERANCE = 0.05
SMALLER_IS_BETTER = (
    *('launches', 'registers', 'stack', 'shared', 'instructions', 'with_rare'),
    *('untold', 'dram', 'l1', 'ratio', 'maps'),
)
LARGER_IS_BETTER = ('resident', 'warps')


def worse(old: Row, new: Row) -> list[str]:
    """What of a row got worse than it was, in words."""
    found = []
    for name in (*SMALLER_IS_BETTER, *LARGER_IS_BETTER):
        before, now = getattr(old, name), getattr(new, name)
        if before is None and now is None:
            continue
        better, other = (before, now) if name in LARGER_IS_BETTER else (now, before)
        # What is no number is worse, too.
        if None in (better, other) or not better <= other * (1 + TOLERANCE):
            found.append(f'{name} {before} -> {now}')
    return found


def stored(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Versions and rows of a file that `--json` wrote."""
    found = json.loads(path.read_text())
    return found['versions'], [Row(**row) for row in found['rows']]


# Output


def table(rows: list[Row]) -> str:
    """Rows as text."""
    names = [x.name for x in dataclasses.fields(Row) if x.name not in ('case', 'op')]
    lines, case = [], None
    texts = [[_text(getattr(row, name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *texts)]
    for row, text in zip(rows, texts):
        if (row.case, row.op) != case:
            case = row.case, row.op
            lines += ['', f'{row.op} of {row.case}']
            lines.append('  '.join(x.rjust(n) for x, n in zip(names, widths)))
        lines.append('  '.join(x.rjust(n) for x, n in zip(text, widths)))
    return '\n'.join(lines)


def _text(value: object) -> str:
    if isinstance(value, list):
        return 'x'.join(map(str, value))
    if value is None:
        return '-'
    return f'{value:.2f}' if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--json', type=Path)
    parser.add_argument('--keep', type=Path, metavar='DIR', help='for the cubins')
    parser.add_argument('--only', default='', metavar='TEXT', help='such cases and ops')
    parser.add_argument(
        '--against', type=Path, metavar='FILE', help='name what is worse than there'
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        versions, rows = count(args.keep or Path(folder), args.only)
    if not rows:
        sys.exit(f'no kernel is launched by {args.only!r}')
    print(' '.join(f'{name} {version}' for name, version in versions.items()))
    print(table(rows))
    if args.against:
        old = {row.key: row for row in stored(args.against)[1]}
        steps = [(x, worse(old[x.key], x)) for x in rows if x.key in old]
        for row, numbers in steps:
            if numbers:
                print(f'worse: {row.name}: {", ".join(numbers)}')
    if args.json:
        found = dict(
            versions=versions,
            architecture=f'sm_{CAPABILITY}',
            rows=[dataclasses.asdict(row) for row in rows],
        )
        args.json.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
