"""Reads compiled GPU code: instructions, basic blocks, loops, the way through a loop.

What is read is the text of `nvdisasm -c -hex FILE.cubin`. The encoding of an
instruction (Volta and later) says how the compiler scheduled it: how many cycles pass
before the next one, on which of six counters its result or its reading of registers
is announced, and which counters it waits for. No latency of arithmetic has to be
guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

NO_COUNTER = 7
_SECTION = re.compile(r'\.section\s+\.text\.([^,\s]+)')
_LABEL = re.compile(r'^\s*(\.L_[\w.]+):')
_INSTRUCTION = re.compile(
    r'/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)\s*(?:\s(.*?))?\s*;\s*/\* 0x'
)
_SECOND_WORD = re.compile(r'^\s*/\* 0x([0-9a-f]{16}) \*/\s*$')
_TARGET = re.compile(r'`\((\.L_[\w.]+)\)')


@dataclass(frozen=True)
class Instruction:
    """One instruction, and what the compiler arranged around it."""

    guard: str  # predicate, '' for none
    opcode: str  # with its modifiers: LDG.E.64
    operands: str
    stall: int  # cycles until the next instruction of the warp
    result: int  # counter that goes down when the result is there, or NO_COUNTER
    read: int  # the same for the registers that were read
    waits: tuple[int, ...]  # counters that must be at zero before
    text: str = ''

    @property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition('.')[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split('.')[1:]

    @property
    def target(self) -> str | None:
        """Label of the instruction that a branch goes to."""
        found = _TARGET.search(self.operands)
        return found[1] if found else None

    @property
    def never(self) -> bool:
        """Whether its guard is the constant false."""
        return self.guard in ('!PT', '!UPT')


def decode(guard: str, opcode: str, operands: str, high: int) -> Instruction:
    """An instruction and the control bits in the upper half of its encoding."""
    control = high >> 41
    waits = tuple(i for i in range(6) if control >> (11 + i) & 1)
    text = ' '.join(x for x in (guard and '@' + guard, opcode, operands) if x)
    return Instruction(
        guard,
        opcode,
        operands,
        stall=control & 15,
        result=control >> 5 & 7,
        read=control >> 8 & 7,
        waits=waits,
        text=text,
    )


@dataclass
class Block:
    """A basic block; blocks are numbered in the order of their addresses."""

    number: int
    label: str
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass
class Loop:
    """A natural loop: numbers of its blocks and the loops directly inside."""

    header: int
    blocks: set[int]
    latches: set[int]
    inner: list[Loop] = field(default_factory=list)


def parse(listing: str) -> dict[str, list[Block]]:
    """The basic blocks of every kernel of a listing, by the kernel's name."""
    kernels: dict[str, list[Block]] = {}
    blocks: list[Block] = []
    pending = None
    for line in listing.splitlines():
        section = _SECTION.search(line)
        label = _LABEL.match(line)
        instruction = _INSTRUCTION.search(line)
        second = _SECOND_WORD.match(line)
        if section:
            blocks = kernels[section[1]] = [Block(0, 'start')]
        elif label and blocks:
            blocks.append(Block(len(blocks), label[1]))
        elif instruction:
            pending = [x or '' for x in instruction.groups()]
        elif second and pending:
            decoded = decode(*pending, int(second[1], 16))
            blocks[-1].instructions.append(decoded)
            pending = None
            if decoded.kind in _ENDS:
                blocks.append(Block(len(blocks), f'{blocks[-1].label}+'))
    for blocks in kernels.values():
        _connect(blocks)
    return kernels


_ENDS = ('BRA', 'BRX', 'BRXU', 'JMP', 'EXIT', 'RET', 'BSYNC', 'KILL', 'BPT')


def _connect(blocks: list[Block]) -> None:
    """Fill in where each block goes."""
    labelled = {block.label: block.number for block in blocks}
    joins: dict[str, list[int]] = {}
    for block in blocks:
        for i in block.instructions:
            if i.kind == 'BSSY' and i.target is not None:
                register = i.operands.split(',')[0]
                joins.setdefault(register, []).append(labelled[i.target])
    for block in blocks:
        last = block.instructions[-1] if block.instructions else None
        goes_on = block.number + 1 < len(blocks)
        following: list[int] = []
        if last is not None and last.kind in ('BRA', 'JMP'):
            if last.target is None:
                raise ValueError(f'a branch without a label: {last.text}')
            following.append(labelled[last.target])
            # A uniform predicate is an operand, not a guard.
            goes_on &= bool(last.guard) or re.match(r'!?UP', last.operands) is not None
        elif last is not None and last.kind == 'BSYNC':
            # It goes to where its BSSY said: the next such place.
            ahead = [x for x in joins.get(last.operands, []) if x > block.number]
            following += [min(ahead)] if ahead else joins.get(last.operands, [])
            goes_on = not following
        elif last is not None and last.kind in ('BRX', 'BRXU'):
            raise ValueError(f'a jump by table: {last.text}')
        elif last is not None and last.kind in _ENDS:
            goes_on = bool(last.guard)
        if goes_on:
            following.append(block.number + 1)
        block.next = list(dict.fromkeys(following))


def _dominators(blocks: list[Block]) -> list[set[int]]:
    """For each block those that every way from the start to it goes through."""
    before: list[list[int]] = [[] for _ in blocks]
    for block in blocks:
        for number in block.next:
            before[number].append(block.number)
    everything = set(range(len(blocks)))
    found = [{0}] + [set(everything) for _ in blocks[1:]]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            dominating = [found[x] for x in before[number]]
            new = {number} | (set.intersection(*dominating) if dominating else set())
            if new != found[number]:
                found[number], changed = new, True
    return found


def loops(blocks: list[Block]) -> list[Loop]:
    """The outermost natural loops, those inside in `inner`."""
    dominators = _dominators(blocks)
    before: list[list[int]] = [[] for _ in blocks]
    for block in blocks:
        for number in block.next:
            before[number].append(block.number)
    found: dict[int, Loop] = {}
    for block in blocks:
        for header in block.next:
            # nvcc ends every kernel by a jump to itself that is never reached.
            if header not in dominators[block.number] or block.next == [block.number]:
                continue
            loop = found.setdefault(header, Loop(header, {header}, set()))
            loop.latches.add(block.number)
            todo = [block.number]
            while todo:
                number = todo.pop()
                if number not in loop.blocks:
                    loop.blocks.add(number)
                    todo += before[number]
    outermost: list[Loop] = []
    by_size = sorted(found.values(), key=lambda x: -len(x.blocks))
    for loop in by_size:
        around = [x for x in by_size if loop.header in x.blocks and x is not loop]
        around = [x for x in around if len(x.blocks) > len(loop.blocks)]
        (around[-1].inner if around else outermost).append(loop)
    return outermost


def _longest(
    blocks: list[Block], inside: set[int], inner: Iterable[Loop], start: int,
    ends: set[int], trips: int,
) -> list[Instruction]:
    """The longest way from `start` to one of `ends`, through blocks `inside`."""
    nested = {number: loop for loop in inner for number in loop.blocks}
    memo: dict[int, list[Instruction] | None] = {}

    def pieces(number: int) -> tuple[list[Instruction], set[int], set[int]]:
        loop = nested.get(number)
        if loop is None:
            return blocks[number].instructions, set(blocks[number].next), {number}
        body = way_through(blocks, loop, 1)
        exits = {x for n in loop.blocks for x in blocks[n].next} - loop.blocks
        return body * trips, exits, loop.blocks

    def search(number: int) -> list[Instruction] | None:
        if number in memo:
            return memo[number]
        memo[number] = None  # a way back to here is no way on
        own, following, covered = pieces(number)
        best: list[Instruction] | None = [] if covered & ends else None
        for x in following:
            if x in inside and x != start:
                rest = search(x)
                if rest is not None and (best is None or len(rest) > len(best)):
                    best = rest
        memo[number] = None if best is None else own + best
        return memo[number]

    return search(start) or []


def way_through(blocks: list[Block], loop: Loop, trips: int = 1) -> list[Instruction]:
    """The longest way through one pass of a loop; loops inside run `trips` times."""
    return _longest(
        blocks, loop.blocks, loop.inner, loop.header, loop.latches, trips
    )
