"""What compiled GPU code will cost, read off its machine code without a GPU.

    python benchmarks/sass_model.py --cu FILE.cu --entry NAME -D STATES=1 -D RANK=12 ...
    python benchmarks/sass_model.py --cubin FILE.cubin [--entry NAME]

It prints registers, stack and shared memory, and for every loop over positions the
instructions of one pass by kind, bytes of global memory, and the cycles that one warp
needs for a pass when it runs alone, with loads answered from DRAM, L2 or L1.
Loads that are waited for one after the other show as many more cycles with DRAM than
with L1; loads that were asked for a pass ahead do not.

A pass is the longest way through the loop (see `sass.py`). Loops inside count once, or
`--trips` times. With `-D CHANNELS=... -D POSITIONS=... -D THREADS=...` instructions
are also given for an element: a pass of a thread does CHANNELS * POSITIONS / THREADS.
The loop over positions needs `#pragma unroll 1`: how often the compiler unrolled it
cannot be seen here.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sass import NO_COUNTER, Block, Instruction, Loop, loops, parse, way_through

# Cycles until the data of a load is there, by where it is found.
LEVELS = {'DRAM': 700, 'L2': 270, 'L1': 38}
# Cycles until a result is announced; only of what has no fixed latency.
LATENCY = {
    'LDS': 30, 'LDSM': 33, 'SHFL': 24, 'MUFU': 20, 'LDC': 40, 'LDL': 40, 'POPC': 20,
    'S2R': 20, 'S2UR': 20, 'R2UR': 12, 'I2F': 20, 'F2I': 20, 'LDCU': 40, 'ATOMS': 60,
    'BAR': 20, 'SYNCS': 20, 'UTMALDG': 20, 'UBLKCP': 20, 'VOTEU': 12, 'REDUX': 24,
}
OTHER_LATENCY = 20
READ_LATENCY = 16  # until a store has read its registers
BARRIER = 20
# Cycles that an instruction of a warp keeps its unit: special functions; memory, for
# every 4 bytes of a lane; tensor cores, by shape.
SPECIAL = ('MUFU', 'I2F', 'F2I', 'F2F', 'POPC', 'FLO')
SPECIAL_INTERVAL = 8
MEMORY = ('LDG', 'STG', 'LDS', 'STS', 'LDSM', 'STSM', 'SHFL', 'LDL', 'STL', 'LDGSTS')
MEMORY_INTERVAL = 2
TENSOR = ('HMMA', 'IMMA', 'DMMA', 'QMMA')
TENSOR_INTERVAL = {'16816': 8, '1688': 4, '16832': 8}
BULK = ('UTMALDG', 'UBLKCP')
LONG_WAIT = 30
PASSES = 8


def width(i: Instruction) -> int:
    """Bytes a lane of a memory instruction."""
    for modifier, size in (('128', 16), ('64', 8), ('U16', 2), ('S16', 2), ('U8', 1),
                           ('S8', 1), ('16', 2)):
        if modifier in i.modifiers:
            return size
    return 4


class Warp:
    """One warp that issues in order; `level` is the latency of global loads."""

    def __init__(self, level: int, ahead: int = 0):
        self.level, self.time, self.long_waits = level, 0, 0
        self.busy: dict[str, int] = {}  # unit: when it takes the next instruction
        self.counters: list[list[int]] = [[] for _ in range(8)]
        self.copies = 0  # when the last copy into shared memory has arrived
        # Copies that report to a barrier in shared memory, oldest first. `ahead` of
        # them were issued before the loop, long ago.
        self.bulk: list[int] = [0] * ahead
        self.group = 0

    def occupy(self, unit: str, cycles: int) -> None:
        self.time = max(self.time, self.busy.get(unit, 0))
        self.busy[unit] = self.time + cycles

    def wait(self, until: int) -> None:
        self.long_waits += until - self.time > LONG_WAIT
        self.time = max(self.time, until)

    def issue(self, i: Instruction) -> None:
        until = [t for counter in i.waits for t in self.counters[counter]]
        if i.kind == 'DEPBAR':
            until += self._all_but_latest(i)
        if i.kind == 'SYNCS' and 'TRYWAIT' in i.modifiers and self.bulk:
            until.append(self.bulk.pop(0))
        self.wait(max(until, default=0))
        for counter in i.waits:
            self.counters[counter] = []
        if i.kind in SPECIAL:
            self.occupy('special', SPECIAL_INTERVAL)
        elif i.kind in MEMORY and not i.never:
            self.occupy('memory', MEMORY_INTERVAL * max(1, width(i) // 4))
        elif i.kind in TENSOR:
            shape = next((x for x in i.modifiers if x in TENSOR_INTERVAL), '16816')
            self.occupy('tensor', TENSOR_INTERVAL[shape])
        self._announce(i)
        self.time += max(1, i.stall)
        if i.kind == 'BAR':
            self.time += BARRIER

    def _all_but_latest(self, i: Instruction) -> list[int]:
        """When all but the latest n of a counter's are done: DEPBAR.LE SB0, n."""
        first, *rest = (x.strip(' {}') for x in i.operands.split(','))
        left = int(rest[0], 16) if rest and rest[0].startswith('0x') else 0
        found = self.counters[int(first.removeprefix('SB'))]
        done = found[: len(found) - left]
        del found[: len(done)]
        others = [int(x) for x in rest[1:] if x.isdigit()]
        return done + [t for x in others for t in self.counters[x]]

    def _latency(self, i: Instruction) -> int:
        if i.never:
            return 1
        if i.kind == 'LDG':
            # What other programs wrote is never found in L1.
            return LEVELS['L2'] if 'STRONG' in i.modifiers else self.level
        if i.kind in ('ATOMG', 'ATOM'):
            return LEVELS['L2']
        return LATENCY.get(i.kind, OTHER_LATENCY)

    def _announce(self, i: Instruction) -> None:
        done = self.time + self._latency(i)
        if i.kind == 'LDGSTS':
            self.copies = max(self.copies, self.time + self.level)
        elif i.kind in BULK:
            self.group = self.time + self.level
            self.bulk.append(self.group)
        elif i.kind == 'ARRIVES':
            # Copies of this thread report to a barrier, at SYNCS.
            self.bulk.append(self.copies)
        elif i.kind == 'LDGDEPBAR':
            done = max(self.time, self.copies)
        if i.result != NO_COUNTER:
            self.counters[i.result].append(done)
        if i.read != NO_COUNTER:
            self.counters[i.read].append(self.time + READ_LATENCY)


def cycles(pass_: list[Instruction], level: int, ahead: int = 0) -> tuple[float, float]:
    """Cycles of one pass in the long run, and its waits of more than 30 cycles."""
    warp = Warp(level, ahead)
    for _ in range(PASSES):
        for i in pass_:
            warp.issue(i)
    time, waits = warp.time, warp.long_waits
    for _ in range(PASSES):
        for i in pass_:
            warp.issue(i)
    return (warp.time - time) / PASSES, (warp.long_waits - waits) / PASSES


@dataclass
class Pass:
    """One pass of a loop over positions."""

    label: str
    instructions: list[Instruction]
    all_instructions: int  # of all blocks of the loop
    ahead: int  # bulk copies before the loop

    @property
    def issued(self) -> int:
        return len(self.instructions)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)

    def bytes_of(self, *kinds: str) -> int:
        """Bytes that a warp moves by instructions of these kinds."""
        return sum(
            width(i) * 32
            for i in self.instructions
            if i.kind in kinds and not i.never
        )

    def cycles(self, level: str) -> tuple[float, float]:
        return cycles(self.instructions, LEVELS[level], self.ahead)


def passes(blocks: list[Block], trips: int = 1, least: float = 0.25) -> list[Pass]:
    """The loops over positions of a kernel, in the order of their addresses.

    These are the outermost loops with at least `least` of the instructions of the
    largest: smaller ones prepare something or wait for another program. A kernel
    without a loop is one pass.
    """
    def make(loop: Loop) -> Pass:
        before = [i for block in blocks[: loop.header] for i in block.instructions]
        return Pass(
            blocks[loop.header].label,
            way_through(blocks, loop, trips),
            sum(len(blocks[n].instructions) for n in loop.blocks),
            sum(i.kind in (*BULK, 'ARRIVES') for i in before),
        )

    found = sorted(map(make, loops(blocks)), key=lambda x: x.label)
    largest = max((x.issued for x in found), default=0)
    if found:
        return [x for x in found if x.issued >= least * largest]
    everything = [i for block in blocks for i in block.instructions if i.kind != 'NOP']
    return [Pass('whole kernel', everything, len(everything), 0)]


def tool(name: str) -> Path:
    """A program of NVIDIA's wheels nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump."""
    found = importlib.util.find_spec('nvidia')
    folders = list(found.submodule_search_locations or ()) if found else []
    for folder in folders:
        for path in sorted(Path(folder).glob(f'*/bin/{name}')):
            return path
    raise FileNotFoundError(f'{name} is missing: pip install nvidia-cuda-{name}')


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers (REG), stack (STACK), shared memory (SHARED) ... of each kernel."""
    command = [str(tool('cuobjdump')), '-res-usage', str(cubin)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, name = {}, ''
    for line in output.splitlines():
        if 'Function ' in line:
            name = line.split('Function ')[1].strip(' :')
        elif 'REG:' in line:
            pairs = [x.split(':') for x in line.split()]
            found[name] = {key: int(value) for key, value in pairs}
    return found


def disassemble(cubin: Path) -> str:
    command = [str(tool('nvdisasm')), '-c', '-hex', str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_cubin(source: Path, defines: list[str], architecture: str) -> bytes:
    """Compile by NVRTC (temporary: until mmvssm.ops.cuda.nvrtc is there)."""
    folder = tool('nvdisasm').parent.parent / 'lib'
    ctypes.CDLL(str(next(folder.glob('libnvrtc-builtins.so.*'))))
    lib = ctypes.CDLL(str(next(folder.glob('libnvrtc.so.*'))))
    program = ctypes.c_void_p()
    lib.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), str(source).encode(), 0, None, None
    )
    options = [f'-D{x}' for x in defines] + [
        f'--gpu-architecture={architecture}', '--std=c++17', f'-I{source.parent}',
    ]
    array = (ctypes.c_char_p * len(options))(*[x.encode() for x in options])
    failed = lib.nvrtcCompileProgram(program, len(options), array)

    def get(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(lib, f'nvrtcGet{what}Size')(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(lib, f'nvrtcGet{what}')(program, buffer)
        return buffer.raw

    log = get('ProgramLog').rstrip(b'\0\n').decode()
    if log:
        print(log)
    if failed:
        raise SystemExit(1)
    return get('CUBIN')


def report(name: str, used: dict[str, int], blocks: list[Block], args) -> None:
    print(f'{name}: {used["REG"]} registers, {used["STACK"]} bytes of stack, '
          f'{used["SHARED"]} of static shared memory')
    calls = sum(i.kind == 'CALL' for b in blocks for i in b.instructions)
    if calls:
        print(f'    warning: {calls} calls, whose instructions are not counted')
    constants = dict(x.split('=') for x in args.define if '=' in x)
    elements = None
    if {'CHANNELS', 'POSITIONS', 'THREADS'} <= set(constants):
        channels, positions, threads = (
            int(constants[x]) for x in ('CHANNELS', 'POSITIONS', 'THREADS')
        )
        elements = channels * positions / threads
    total = 0.0
    for loop in passes(blocks, args.trips):
        kinds = ' '.join(f'{k}:{n}' for k, n in loop.kinds.most_common(16))
        print(f'  loop {loop.label}: {loop.issued} instructions a pass '
              f'(all blocks {loop.all_instructions}); {kinds}')
        print(f'    bytes a warp: {loop.bytes_of("LDG", "LDGSTS")} loaded, '
              f'{loop.bytes_of("STG")} stored; shared memory: '
              f'{loop.bytes_of("LDS", "LDSM")} loaded, {loop.bytes_of("STS")} stored')
        results = {level: loop.cycles(level) for level in LEVELS}
        ratio = results['DRAM'][0] / results['L1'][0]
        print('    cycles a pass:', ', '.join(
            f'{level} {time:.0f} ({waits:.1f} long waits)'
            for level, (time, waits) in results.items()
        ), f'; DRAM / L1 {ratio:.2f}')
        if elements:
            total += loop.issued / elements
            print(f'    an element: {loop.issued / elements:.1f} instructions, '
                  f'{results["DRAM"][0] / elements:.1f} cycles DRAM, '
                  f'{results["L1"][0] / elements:.1f} L1')
    if elements:
        states = int(constants.get('STATES', 1))
        print(f'  an element, all loops: {total:.1f} instructions; '
              f'an element and state: {total / states:.1f}')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--cu', type=Path, help='CUDA source, compiled by NVRTC')
    source.add_argument('--cubin', type=Path)
    parser.add_argument('--entry', help='one kernel of several')
    parser.add_argument('-D', dest='define', action='append', default=[])
    parser.add_argument('--arch', default='sm_90')
    parser.add_argument('--trips', type=int, default=1, help='of loops inside')
    parser.add_argument('--sass', type=Path, help='keep the listing')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cubin = args.cubin or Path(folder, 'kernel.cubin')
        if args.cu:
            cubin.write_bytes(compile_cubin(args.cu, args.define, args.arch))
        listing, used = disassemble(cubin), resources(cubin)
    if args.sass:
        args.sass.write_text(listing)
    for name, blocks in parse(listing).items():
        if args.entry in (None, name):
            report(name, used[name], blocks, args)


if __name__ == '__main__':
    main()
