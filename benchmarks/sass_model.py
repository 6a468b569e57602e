"""What compiled GPU code will cost, read off its machine code without a GPU.

    python benchmarks/sass_model.py --cu FILE.cu --entry NAME -D STATES=1 -D RANK=12 ...
    python benchmarks/sass_model.py --cubin FILE.cubin [--entry NAME]

It prints registers, stack and shared memory, and for every loop over positions the
instructions of one pass by kind, bytes, and the cycles that one warp needs for a pass
when it runs alone, with loads answered from DRAM, L2 or L1. Loads that are waited for
one after the other take many times longer with DRAM than with L1; loads that are asked
for a pass ahead do not. It is a model: good for comparing, not for predicting times.

A pass is the longest way through the loop that avoids what `if (rarely(...))` guards,
its body on lines of its own, and what lanes that have parted do before a shuffle.
Loops inside count once, or as often as their line says: `for (...) {  // 4 trips`. The
loop over positions needs `#pragma unroll 1`: that the compiler unrolled it cannot be
seen here. A thread has CHANNELS * POSITIONS / THREADS elements in a pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cubin
from sass import (
    NO_COUNTER,
    Block,
    Instruction,
    Loop,
    Place,
    Ways,
    loops,
    parse,
    rare_places,
    trip_places,
)

from mmvssm.ops.cuda import kernels, nvrtc

# Cycles from a load to its data, by where that is found. H100, as its users measured.
LEVELS = {'DRAM': 700, 'L2': 270, 'L1': 38}
# Cycles until a result is there, of instructions that announce it by a counter. All
# others take what the compiler says; tensor cores, too.
LATENCY = {'LDS': 30, 'LDSM': 33, 'ATOMS': 60, 'SHFL': 24, 'LDC': 40, 'LDL': 40}
OTHER_LATENCY = 20
READING = 16  # until the registers of a store are read
BARRIER = 20
# Cycles for which an instruction of a warp keeps a unit of its quarter of the
# multiprocessor. Memory: for every 4 bytes of a lane.
SPECIAL = ('MUFU', 'I2F', 'F2I', 'F2F', 'POPC', 'FLO')
SPECIAL_INTERVAL = 8
MEMORY = ('LDG', 'STG', 'LDGSTS', 'LDS', 'STS', 'LDSM', 'STSM', 'SHFL', 'LDL', 'STL')
MEMORY_INTERVAL = 2
TENSOR = ('HMMA', 'IMMA', 'QMMA', 'DMMA')
TENSOR_INTERVAL = {'1684': 4, '1688': 4, '16816': 8, '16832': 8}
BULK = ('UTMALDG', 'UBLKCP')  # copies by TMA
LONG_WAIT = 30
PASSES = 8


class Warp:
    """A warp that issues in order, alone.

    Args:
        latency: Of loads from global memory.
        under_way: Copies by TMA that were begun before, and have arrived.
    """

    def __init__(self, latency: int, under_way: int = 0) -> None:
        self.latency, self.time, self.long_waits = latency, 0, 0
        self.busy: dict[str, int] = {}  # until when a unit takes nothing
        self.counters: list[list[int]] = [[] for _ in range(NO_COUNTER)]
        self.copied = 0  # when all asynchronous copies so far have arrived
        self.arrivals = [0] * under_way  # at barriers in shared memory, in order
        self.tried = ''

    def issue(self, i: Instruction) -> None:
        """Wait for what an instruction needs, and issue it."""
        needed = [t for x in i.waits for t in self.counters[x]]
        for x in i.waits:
            self.counters[x] = []
        if i.kind == 'DEPBAR':
            needed += self._all_but_latest(i.operands)
        if i.kind == 'SYNCS' and 'TRYWAIT' in i.modifiers:
            # What tries again waits for the same copies.
            if self.arrivals and self.tried != i.operands:
                needed.append(self.arrivals.pop(0))
            self.tried = i.operands
        start = max([self.time, *needed])
        self.long_waits += start - self.time > LONG_WAIT
        unit, interval = occupied(i)
        self.time = max(start, self.busy.get(unit, 0))
        self.busy[unit] = self.time + interval
        self._announce(i)
        self.time += max(1, i.stall) + BARRIER * (i.kind == 'BAR')

    def _all_but_latest(self, operands: str) -> list[int]:
        """What `DEPBAR.LE SB0, 0x1, {3, 2}` waits for: all but 1 of 0; 3 and 2."""
        first, *rest = (x.strip(' {}') for x in operands.split(','))
        counter = self.counters[int(first.removeprefix('SB'))]
        left = int(rest.pop(0), 16) if rest and rest[0].startswith('0x') else 0
        done = counter[: max(0, len(counter) - left)]
        del counter[: len(done)]
        for x in filter(None, rest):
            done += self.counters[int(x)]
            self.counters[int(x)] = []
        return done

    def _announce(self, i: Instruction) -> None:
        """Note when the results of an instruction will be there."""
        latency = LATENCY.get(i.kind, OTHER_LATENCY)
        if i.never:
            latency = 1
        elif i.kind == 'LDG':
            # What other CTAs wrote is not looked for in L1.
            latency = LEVELS['L2'] if 'STRONG' in i.modifiers else self.latency
        elif i.kind in ('ATOM', 'ATOMG'):
            latency = LEVELS['L2']
        elif i.kind == 'LDGSTS':
            self.copied = max(self.copied, self.time + self.latency)
        elif i.kind == 'LDGDEPBAR':
            latency = max(0, self.copied - self.time)
        elif i.kind in (*BULK, 'ARRIVES'):
            bulk = i.kind in BULK
            self.arrivals.append(self.time + self.latency if bulk else self.copied)
            self.tried = ''
        if i.result != NO_COUNTER:
            self.counters[i.result].append(self.time + latency)
        if i.read != NO_COUNTER:
            self.counters[i.read].append(self.time + READING)


def occupied(i: Instruction) -> tuple[str, int]:
    """Which unit besides the scheduler an instruction keeps, and for how long."""
    if i.never:
        return 'none', 0
    if i.kind in SPECIAL:
        return 'special', SPECIAL_INTERVAL
    if i.kind in MEMORY:
        return 'memory', MEMORY_INTERVAL * max(1, i.width // 4)
    if i.kind in TENSOR:
        shape = next((x for x in i.modifiers if x in TENSOR_INTERVAL), '16816')
        return 'tensor', TENSOR_INTERVAL[shape]
    return 'none', 0


@dataclass(frozen=True)
class Marks:
    """What the sources say of ways through the code.

    Attributes:
        rare: Lines whose blocks are avoided, see :func:`sass.rare_places`.
        trips: How often loops inside others are passed, by their lines.
    """

    rare: frozenset[Place] = frozenset()
    trips: Mapping[Place, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Marks:
        """Those of a source and of the headers that it may include."""
        rare: set[Place] = set()
        trips: dict[Place, int] = {}
        for source in (path, *nvrtc.FOLDER.glob('*.h')):
            text = source.read_text()
            rare |= rare_places(source.name, text)
            trips |= trip_places(source.name, text)
        return cls(frozenset(rare), trips)


@dataclass(frozen=True)
class Pass:
    """One pass of a loop over positions.

    Attributes:
        label: Of the loop in the listing.
        instructions: That are issued.
        most: How many they are if what is rare is needed.
        untold: Loops inside that are counted once, as nothing says how often they run.
        under_way: Copies by TMA that were begun before the loop.
    """

    label: str
    instructions: list[Instruction]
    most: int
    untold: int = 0
    under_way: int = 0

    @property
    def kinds(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)

    def bytes_by(self, *kinds: str) -> int:
        """Bytes that a warp moves, all of its lanes, whatever guards they have."""
        return sum(
            32 * i.width for i in self.instructions if i.kind in kinds and not i.never
        )

    @property
    def loaded(self) -> int:
        """Bytes from global memory, without those by TMA."""
        return self.bytes_by('LDG', 'LDGSTS')

    @property
    def stored(self) -> int:
        """Bytes to global memory."""
        return self.bytes_by('STG')

    def cycles(self, level: str) -> tuple[float, float]:
        """Cycles of a pass in the long run, and its waits of more than 30 cycles."""
        warp = Warp(LEVELS[level], self.under_way)
        for _ in range(PASSES):
            for i in self.instructions:
                warp.issue(i)
        time, waits = warp.time, warp.long_waits
        for _ in range(PASSES):
            for i in self.instructions:
                warp.issue(i)
        return (warp.time - time) / PASSES, (warp.long_waits - waits) / PASSES

    def busy(self) -> dict[str, int]:
        """Cycles of a quarter of a multiprocessor that a pass takes at least."""
        found = {'issue': len(self.instructions), 'special': 0, 'memory': 0}
        for i in self.instructions:
            unit, interval = occupied(i)
            if interval:
                found[unit] = found.get(unit, 0) + interval
        return found


def passes(
    blocks: list[Block], marks: Marks = Marks(), whole: bool = False
) -> list[Pass]:
    """The loops over positions of a kernel.

    These are the outermost loops with at least a quarter of the instructions of the
    largest; smaller ones prepare something, or wait for other CTAs. A kernel without
    a loop, and with `whole` any, is one pass.
    """
    rare = [block.number for block in blocks if block.stems_from(marks.rare)]
    ways, any_ways = (Ways(blocks, avoided, marks.trips) for avoided in (rare, ()))

    def one(
        label: str, start: int, way: list[Instruction], most: int, inner: list[Loop]
    ) -> Pass:
        before = [i.kind for block in blocks[:start] for i in block.instructions]
        under_way = sum(kind in (*BULK, 'ARRIVES') for kind in before)
        return Pass(label, way, most, ways.untold(way, inner), under_way)

    outermost = loops(blocks)
    if whole or not outermost:
        most = len(any_ways.whole())
        return [one('whole kernel', 0, ways.whole(), most, outermost)]
    found = [
        one(
            blocks[loop.header].label,
            loop.header,
            ways.through(loop),
            len(any_ways.through(loop)),
            loop.inner,
        )
        for loop in outermost
    ]
    largest = max(len(x.instructions) for x in found)
    return [x for x in found if 4 * len(x.instructions) >= largest]


@dataclass(frozen=True)
class Model:
    """A compiled kernel.

    Attributes:
        resources: Registers and more.
        passes: Of its loops over positions, or of all.
        calls: Calls of functions, whose instructions are not counted.
    """

    resources: cubin.Resources
    passes: list[Pass]
    calls: int

    @property
    def instructions(self) -> int:
        """Of a pass of all loops."""
        return sum(len(one.instructions) for one in self.passes)

    @property
    def most(self) -> int:
        """The same if what is rare is needed."""
        return sum(one.most for one in self.passes)

    def cycles(self, level: str) -> float:
        """Of a warp alone, for a pass of all loops."""
        return sum(one.cycles(level)[0] for one in self.passes)


def read(
    path: Path,
    marks: Marks = Marks(),
    whole: bool = False,
    keep: Path | None = None,
) -> dict[str, Model]:
    """Read a cubin.

    Args:
        path: The file.
        marks: Of its source.
        whole: Whether the kernel as a whole is one pass.
        keep: Where to put the listing.

    Returns:
        Its kernels, by name.
    """
    listing = cubin.disassemble(path)
    if keep is not None:
        keep.write_text(listing)
    used = cubin.resources(path)
    return {
        name: Model(
            used[name],
            passes(blocks, marks, whole),
            sum(
                i.kind == 'CALL' and not i.jumps
                for block in blocks
                for i in block.instructions
            ),
        )
        for name, blocks in parse(listing).items()
    }


def elements(constants: Mapping[str, int]) -> float | None:
    """Elements of a thread in a pass, where the constants of the kernel say so."""
    if not {'CHANNELS', 'POSITIONS', 'THREADS'} <= constants.keys():
        return None
    return constants['CHANNELS'] * constants['POSITIONS'] / constants['THREADS']


def describe(model: Model, constants: Mapping[str, int]) -> str:
    """What the command prints of a kernel."""
    used = model.resources
    lines = [f'{used.registers} registers, {used.stack} bytes of stack']
    if model.calls:
        lines.append(f'warning: {model.calls} calls, whose code is not counted')
    share, states = elements(constants), constants.get('STATES', 1)
    for one in model.passes:
        count = len(one.instructions)
        kinds = ' '.join(f'{kind}:{n}' for kind, n in one.kinds.most_common(24))
        cycles = {level: one.cycles(level) for level in LEVELS}
        ratio = cycles['DRAM'][0] / cycles['L1'][0]
        shown = ', '.join(
            f'{level} {time:.0f} ({waits:.1f} long waits)'
            for level, (time, waits) in cycles.items()
        )
        busy = ', '.join(f'{unit} {time}' for unit, time in one.busy().items())
        lines += [
            f'loop {one.label}: {count} instructions (at most {one.most}): {kinds}',
            f'    global memory: {one.loaded} bytes a warp loaded, {one.stored} stored',
            f'    cycles of a warp alone: {shown}; DRAM / L1 {ratio:.2f}',
            f'    cycles that units are kept: {busy}',
        ]
        if one.untold:
            lines.append(f'    warning: {one.untold} loops inside are counted once')
        if share:
            lines.append(
                f'    an element: {count / share:.1f} instructions, cycles '
                f'DRAM {cycles["DRAM"][0] / share:.1f}, '
                f'L1 {cycles["L1"][0] / share:.1f}, '
                f'bytes {(one.loaded + one.stored) / share / 32:.2f}'
            )
    if share:
        total = model.instructions / share
        lines.append(
            f'an element: {total:.1f} instructions, and state: {total / states:.1f}'
        )
    return '\n    '.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--cu', type=Path, help='CUDA source, compiled by NVRTC')
    source.add_argument('--cubin', type=Path)
    parser.add_argument('--entry', help='one kernel of several')
    parser.add_argument('-D', dest='constants', action='append', default=[])
    parser.add_argument('--arch', default='sm_90')
    parser.add_argument('--whole', action='store_true', help='count all, not loops')
    parser.add_argument('--sass', type=Path, help='keep the listing here')
    args = parser.parse_args()
    constants = {
        name: int(value or 1)
        for name, _, value in (x.partition('=') for x in args.constants)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = args.cubin or Path(folder, 'kernel.cubin')
        if args.cu:
            try:
                code = kernels.compiler().compile(args.cu, constants, args.arch)
            except nvrtc.CompileError as error:
                sys.exit(str(error))
            path.write_bytes(code)
        marks = Marks.of(args.cu) if args.cu else Marks()
        found = read(path, marks, args.whole, args.sass)
    for name, model in found.items():
        if args.entry in (None, name):
            print(f'{name}: {describe(model, constants)}')


if __name__ == '__main__':
    main()
