"""Reads compiled GPU code: instructions, basic blocks, loops, the way through a loop.

What is read is the text of `nvdisasm -c -hex -gi FILE.cubin`. The encoding of an
instruction (Volta and later) says how the compiler scheduled it: how many cycles pass
before the next one, by which of six counters its result, or that its registers were
read, is announced, and for which counters it waits. So no latency of arithmetic or of
a tensor core has to be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

NO_COUNTER = 7
# Of a source: file name and line. Code of an inlined function has its callers', too.
Place = tuple[str, int]

_SECTION = re.compile(r'\.section\s+\.text\.([^,\s]+)')
_LABEL = re.compile(r'^\s*(\.L_[\w.]+):')
_INSTRUCTION = re.compile(
    r'/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)\s*(?:\s(.*?))?\s*;\s*/\* 0x'
)
_SECOND_WORD = re.compile(r'^\s*/\* 0x([0-9a-f]{16}) \*/\s*$')
_PLACE = re.compile(r'(?:File|inlined at) "([^"]*)", line (\d+)')
_TARGET = re.compile(r'`\((\.L_[\w.]+)\)')
_JUMPS = ('BRA', 'JMP')
_TABLES = ('BRX', 'BRXU', 'JMX')
_ENDS = (*_TABLES, 'EXIT', 'RET', 'BSYNC', 'KILL', 'BPT')
# Spilled registers are put back anywhere, and say that they are of lines nearby.
_NO_WORK = ('NOP', 'BRA', 'BSSY', 'BSYNC', 'WARPSYNC', 'LDL', 'STL')


@dataclass(frozen=True)
class Instruction:
    """One instruction, and what the compiler arranged around it."""

    guard: str  # predicate, '' for none
    opcode: str  # with its modifiers: LDG.E.64
    operands: str
    stall: int  # cycles until the next instruction of the warp
    result: int  # counter that says when the result is there, or NO_COUNTER
    read: int  # the same for the registers that it reads
    waits: tuple[int, ...]  # counters that must be at zero before
    places: frozenset[Place] = frozenset()

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
    def jumps(self) -> bool:
        """Whether it goes elsewhere in the kernel; for older GPUs by a call."""
        return self.kind in _JUMPS or self.kind == 'CALL' and self.target is not None

    @property
    def parted(self) -> bool:
        """Whether it jumps only where the lanes of a warp are not together."""
        return self.kind == 'BRA' and 'DIV' in self.modifiers

    @property
    def ends(self) -> bool:
        """Whether a basic block ends behind it."""
        return self.jumps or self.kind in _ENDS

    @property
    def never(self) -> bool:
        """Whether its guard is false whatever happens: a filler of the compiler."""
        return self.guard in ('!PT', '!UPT')

    @property
    def width(self) -> int:
        """Bytes that a lane moves by an instruction of memory."""
        sizes = {'128': 16, '64': 8, 'U16': 2, 'S16': 2, 'U8': 1, 'S8': 1}
        if self.kind in ('LDSM', 'STSM'):
            sizes = {'2': 8, '4': 16}  # matrices
        return next((sizes[x] for x in self.modifiers if x in sizes), 4)


def decode(
    guard: str, opcode: str, operands: str, high: int, places: Iterable[Place] = ()
) -> Instruction:
    """An instruction, given the upper half of its encoding as `high`."""
    control = high >> 41
    return Instruction(
        guard,
        opcode,
        operands,
        stall=control & 15,
        result=control >> 5 & 7,
        read=control >> 8 & 7,
        waits=tuple(i for i in range(6) if control >> (11 + i) & 1),
        places=frozenset(places),
    )


@dataclass
class Block:
    """A basic block; blocks are numbered in the order of their addresses."""

    number: int
    label: str
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def stems_from(self, places: set[Place]) -> bool:
        """Whether most of its work was written there."""
        work = [i for i in self.instructions if i.kind not in _NO_WORK]
        there = sum(not places.isdisjoint(i.places) for i in work)
        return 2 * there > len(work)


def parse(listing: str) -> dict[str, list[Block]]:
    """The basic blocks of every kernel of a listing, by the kernel's name."""
    kernels: dict[str, list[Block]] = {}
    blocks: list[Block] = []
    pending: list[str] | None = None
    places: list[Place] = []
    comes_of_comment = False
    for line in listing.splitlines():
        if line.lstrip().startswith('//##'):
            if not comes_of_comment:
                places = []
            places += [
                (file.rpartition('/')[2], int(number))
                for file, number in _PLACE.findall(line)
            ]
            comes_of_comment = True
            continue
        comes_of_comment = False
        if section := _SECTION.search(line):
            blocks = kernels[section[1]] = [Block(0, 'start')]
            places = []
        elif (label := _LABEL.match(line)) and blocks:
            blocks.append(Block(len(blocks), label[1]))
        elif instruction := _INSTRUCTION.search(line):
            pending = [x or '' for x in instruction.groups()]
        elif (second := _SECOND_WORD.match(line)) and pending:
            decoded = decode(*pending, int(second[1], 16), places)
            blocks[-1].instructions.append(decoded)
            pending = None
            if decoded.ends:
                blocks.append(Block(len(blocks), f'{blocks[-1].label}+'))
    for blocks in kernels.values():
        _connect(blocks)
    return kernels


def _connect(blocks: list[Block]) -> None:
    """Fill in where each block goes."""
    labelled = {block.label: block.number for block in blocks}
    # Where the threads that part behind a BSSY meet again, by its register.
    joins: dict[str, list[int]] = {}
    for block in blocks:
        for i in block.instructions:
            if i.kind == 'BSSY' and i.target is not None:
                register = i.operands.split(',')[0]
                joins.setdefault(register, []).append(labelled[i.target])
    for block in blocks:
        last = block.instructions[-1] if block.instructions else None
        block.next = []
        falls = last is None or not last.ends or bool(last.guard)
        if last is not None and last.kind in _TABLES:
            raise ValueError(f'a jump by table: {last.opcode} {last.operands}')
        if last is not None and last.jumps:
            if last.target is None:
                raise ValueError(f'a jump without a label: {last.operands}')
            # Lanes of a warp are taken to be together, as they are behind a BSYNC.
            if not last.parted:
                block.next.append(labelled[last.target])
            # A uniform predicate is written as an operand.
            falls |= last.parted or re.match(r'!?UP\d', last.operands) is not None
        elif last is not None and last.kind == 'BSYNC':
            places = joins.get(last.operands, [])
            ahead = [x for x in places if x > block.number]
            block.next += [min(ahead)] if ahead else places
        if falls and block.number + 1 < len(blocks):
            block.next.append(block.number + 1)
        block.next = list(dict.fromkeys(block.next))


# Loops


@dataclass
class Loop:
    """A natural loop: numbers of its blocks, and the loops directly inside."""

    header: int
    blocks: set[int]
    latches: set[int]  # blocks that go back to the header
    inner: list[Loop] = field(default_factory=list)


def _before(blocks: list[Block]) -> dict[int, list[int]]:
    """For each block that can be reached those that go to it."""
    found: dict[int, list[int]] = {0: []}
    todo = [0]
    while todo:
        number = todo.pop()
        for following in blocks[number].next:
            if following not in found:
                todo.append(following)
            found.setdefault(following, []).append(number)
    return found


def _dominators(before: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block those that every way from the start to it goes through."""
    found = {number: set(before) for number in before} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in sorted(before.keys() - {0}):
            new = set.intersection(*(found[x] for x in before[number])) | {number}
            if new != found[number]:
                found[number], changed = new, True
    return found


def loops(blocks: list[Block]) -> list[Loop]:
    """The outermost natural loops, in the order of their addresses."""
    before = _before(blocks)
    dominators = _dominators(before)
    found: dict[int, Loop] = {}
    for latch in before:
        for header in set(blocks[latch].next) & dominators[latch]:
            loop = found.setdefault(header, Loop(header, {header}, set()))
            loop.latches.add(latch)
            todo = [latch]
            while todo:
                number = todo.pop()
                if number not in loop.blocks:
                    loop.blocks.add(number)
                    todo += before[number]
    outermost: list[Loop] = []
    for loop in found.values():
        around = [x for x in found.values() if loop.blocks < x.blocks]
        nearest = min(around, key=lambda x: len(x.blocks), default=None)
        (outermost if nearest is None else nearest.inner).append(loop)
    return sorted(outermost, key=lambda x: x.header)


class Ways:
    """Ways through the blocks of a kernel.

    Args:
        blocks: Of the kernel.
        rare: Numbers of blocks that no way goes through, if there is another.
        trips: How often a loop inside another is passed, by lines of its `for`; once
            where nothing is said.
    """

    def __init__(
        self,
        blocks: list[Block],
        rare: Iterable[int] = (),
        trips: Mapping[Place, int] | None = None,
    ) -> None:
        self.blocks, self.rare, self._trips = blocks, set(rare), trips or {}

    def _told(self, loop: Loop) -> int | None:
        """How often a loop is passed, if its line says so."""
        ends = (self.blocks[number].instructions[-1:] for number in loop.latches)
        places = {place for end in ends for i in end for place in i.places}
        return max((self._trips[x] for x in places & self._trips.keys()), default=None)

    def untold(self, way: list[Instruction], inner: Iterable[Loop]) -> int:
        """How many of the loops that a way goes through do not say how often."""
        on_way, todo, found = set(map(id, way)), list(inner), 0
        while todo:
            loop = todo.pop()
            todo += loop.inner
            latches = (i for n in loop.latches for i in self.blocks[n].instructions)
            passed = any(id(i) in on_way for i in latches)
            found += passed and self._told(loop) is None
        return found

    def through(self, loop: Loop) -> list[Instruction]:
        """The longest way through one pass of a loop."""
        without = loop.blocks - (self.rare - {loop.header})
        for inside in (without, loop.blocks):
            found = self._longest(loop.header, loop.latches, inside, loop.inner)
            if found is not None:
                return found
        raise ValueError('a loop without a way through')

    def whole(self) -> list[Instruction]:
        """The longest way from the start of the kernel to an end."""
        outermost = loops(self.blocks)
        ends = {block.number for block in self.blocks if not block.next}
        everything = {block.number for block in self.blocks}
        for inside in (everything - (self.rare - {0}), everything):
            found = self._longest(0, ends, inside, outermost)
            if found is not None:
                return found
        return []

    def _longest(
        self, start: int, ends: set[int], inside: set[int], inner: list[Loop]
    ) -> list[Instruction] | None:
        nested = {number: loop for loop in inner for number in loop.blocks}
        known: dict[int, list[Instruction] | None] = {}

        def search(number: int) -> list[Instruction] | None:
            if number in known:
                return known[number]
            known[number] = None  # a way back to where it came from is no way on
            loop = nested.get(number)
            if loop is None:
                own, covered = self.blocks[number].instructions, {number}
            else:
                own, covered = self.through(loop) * (self._told(loop) or 1), loop.blocks
            best: list[Instruction] | None = [] if covered & ends else None
            following = {x for n in covered for x in self.blocks[n].next} - covered
            for x in sorted((following & inside) - {start}):
                rest = search(x)
                if rest is not None and (best is None or len(rest) > len(best)):
                    best = rest
            if best is not None:
                known[number] = own + best
            return known[number]

        return search(start)


# Marks in the source


def rare_places(name: str, text: str) -> set[Place]:
    """The lines that `if (rarely(...))` or `while (rarely(...))` guards in a source.

    The line of the condition is not among them, nor is what an `else` guards.

    Args:
        name: Of the file, without a folder.
        text: What is in it.
    """
    text = re.sub(r'//[^\n]*', lambda x: ' ' * len(x[0]), text)
    found: set[Place] = set()
    for statement in re.finditer(r'\b(?:if|while)\s*(?:constexpr\s*)?\(', text):
        begin = _closing(text, statement.end() - 1, '()') + 1
        if not re.search(r'\brarely\s*\(', text[statement.end() : begin]):
            continue
        body = begin + len(text[begin:]) - len(text[begin:].lstrip())
        if text[body : body + 1] == '{':
            end = _closing(text, body, '{}')
        else:
            end = text.index(';', body)
        first, last = text.count('\n', 0, begin) + 2, text.count('\n', 0, end) + 1
        found |= {(name, line) for line in range(first, last + 1)}
    return found


def trip_places(name: str, text: str) -> dict[Place, int]:
    """How often loops are passed that say so: `for (...) {  // 4 trips`.

    Args:
        name: Of the file, without a folder.
        text: What is in it.
    """
    lines = enumerate(text.splitlines(), 1)
    found = (
        (i, re.search(r'\b(?:for|while)\b.*//.*?(\d+) trips', x)) for i, x in lines
    )
    return {(name, i): int(match[1]) for i, match in found if match}


def _closing(text: str, opening: int, pair: str) -> int:
    """Where the bracket at `opening` is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == pair[0]) - (text[place] == pair[1])
        if depth == 0:
            return place
    raise ValueError(f'a {pair[0]} is not closed')
