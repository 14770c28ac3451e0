"""What one trip through a kernel's main loop costs, read from its SASS.

**Main loop**: the one whose trip moves the most bytes of samples by wide access; of several such
the innermost, and of those side by side (one for each direction of time) the one with the longest
trip. A kernel without loops counts as one trip, and so does one whose loops move less than what is
around them. Samples are what plain loads and stores of global memory move. Words by which blocks
talk to each other are loaded and stored `.STRONG` or by atomics, and do not count.

**Trip**: among all ways from the loop's head back to it, that which moves the most bytes of
samples by wide access; among those, one that enters no inner loop and calls no subroutine that it
can pass by; among those, the longest. Inner loops are waiting (on a status word) or walking (sample
by sample, where a tile will not do); the trip that enters each of them once is counted beside it.

A warp is taken to be converged: of BRA.CONV only the branch is followed, of BRA.DIV none. A call of
what lies behind the next instruction is a branch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

INSTRUCTION_BYTES = 16  # since Volta
WIDE = 16  # bytes of one access, at least
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str = ""
    predicate: str = ""

    @cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def is_protocol(self) -> bool:
        """Whether it touches a word that blocks share."""
        if self.name in ("LDG", "STG", "LD", "ST"):
            return "STRONG" in self.words or "MMIO" in self.words
        return self.name in ("ATOM", "ATOMG", "RED", "REDG")

    @property
    def sample_bytes(self) -> int:
        """Bytes a thread moves between its registers and global memory, status words apart."""
        if self.name not in ("LDG", "STG", "LD", "ST") or self.is_protocol:
            return 0
        return next((_WIDTHS[word] for word in self.words if word in _WIDTHS), 4)

    @property
    def is_double(self) -> bool:
        if self.name in ("F2F", "F2I", "I2F"):
            return "F64" in self.words
        return self.name in ("DADD", "DFMA", "DMUL", "DSETP", "DMNMX")

    @property
    def writes(self) -> bool:
        return self.name in ("STG", "ST")

    @property
    def target(self) -> int | None:
        """Where a branch goes to."""
        if self.name in ("BRX", "BRXU", "JMX", "JMXU", "UBLKCP", "UTMALDG", "UTMASTG", "LDGSTS"):
            raise ValueError(f"{self.opcode}: neither its branches nor its bytes can be counted")
        if self.name not in ("BRA", "JMP") or "DIV" in self.words:
            return None
        return int(self.operands.rpartition(",")[2], 16)

    @property
    def falls_through(self) -> bool:
        if self.name in ("BRA", "JMP"):
            conditional = bool(self.predicate) or "," in self.operands
            return "DIV" in self.words or (conditional and "CONV" not in self.words)
        return self.name not in ("EXIT", "RET") or bool(self.predicate)


def total(accesses: Mapping[int, int], *, wide: bool = False) -> int:
    """Bytes of these accesses, or of the wide ones among them."""
    return sum(size * times for size, times in accesses.items() if not wide or size >= WIDE)


@dataclass
class Trip:
    """One way through a loop, summed up for one thread."""

    instructions: int = 0
    doubles: int = 0  # of float64, of which consumer cards do one in the time of 64 others
    barriers: int = 0
    cold: int = 0  # inner loops and subroutines entered
    reads: Counter[int] = field(default_factory=Counter)  # of samples: bytes of an access -> times
    writes: Counter[int] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        return total(self.reads + self.writes)

    @property
    def wide(self) -> int:
        return total(self.reads + self.writes, wide=True)

    @property
    def per_byte(self) -> float:
        return self.instructions / self.bytes if self.bytes else float("inf")

    def __add__(self, other: Trip) -> Trip:
        return Trip(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> Trip:
        trip = cls()
        for instruction in instructions:
            trip.instructions += instruction.name != "NOP"
            trip.doubles += instruction.is_double
            trip.barriers += instruction.name == "BAR"
            trip.cold += instruction.name == "CALL"
            if instruction.sample_bytes:
                accesses = trip.writes if instruction.writes else trip.reads
                accesses[instruction.sample_bytes] += 1
        return trip

    def usual(self) -> tuple[int, ...]:
        """What the trip that counts has most of."""
        return self.wide, -self.cold, self.instructions

    def longest(self) -> tuple[int, ...]:
        """What the longest one has most of."""
        return self.wide, self.instructions


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    successors: list[int]


@dataclass
class Loop:
    """Blocks that can reach one another, by their addresses; the kernel itself is the outermost."""

    head: int
    blocks: set[int]
    inner: list[Loop]
    is_kernel: bool = False


@dataclass(frozen=True)
class MainLoop:
    trip: Trip
    longest: Trip  # which enters the inner loops, once each
    computing: int  # inner loops that can be passed by and that neither wait nor walk
    is_loop: bool  # else the whole kernel


def main_loop(code: list[Instruction]) -> MainLoop:
    """The costs of a kernel whose instructions these are."""
    blocks = _blocks(_with_branches(code))
    kernel = Loop(0, set(blocks), _loops(blocks, set(blocks)), is_kernel=True)
    trips = [(_trip(blocks, loop, Trip.usual), loop) for loop in _all_loops(kernel)]
    most = max(_moves(*each) for each in trips)
    equal = [each for each in trips if _moves(*each) == most]
    innermost = [
        (trip, loop)
        for trip, loop in equal
        if not any(other.blocks < loop.blocks for _, other in equal)
    ]
    trip, loop = max(innermost, key=lambda each: each[0].instructions)
    computing = sum(_computes(blocks, inner) for inner in loop.inner)
    longest = _trip(blocks, loop, Trip.longest)
    return MainLoop(trip, longest, computing, not loop.is_kernel)


def _moves(trip: Trip, loop: Loop) -> tuple[int, ...]:
    """What the main loop has most of."""
    repeats = not loop.is_kernel
    return trip.wide, trip.wide > 0 and repeats, 0 if trip.wide else trip.bytes, repeats


def _with_branches(code: list[Instruction]) -> list[Instruction]:
    """The same with a branch for each call that only passes by the next instruction."""

    def is_branch(at: int, instruction: Instruction) -> bool:
        if instruction.name != "CALL":
            return False
        target = re.fullmatch(r"0x[0-9a-f]+", instruction.operands)
        return target is not None and int(target[0], 16) == (at + 2) * INSTRUCTION_BYTES

    return [
        replace(instruction, opcode="BRA") if is_branch(at, instruction) else instruction
        for at, instruction in enumerate(code)
    ]


def _blocks(code: list[Instruction]) -> dict[int, Block]:
    """The blocks that the first instruction leads to; an address is the index of an instruction."""
    following: dict[int, list[int]] = {}
    waiting = [0]
    while waiting:
        at = waiting.pop()
        if at not in following:
            following[at] = [at + 1] if code[at].falls_through else []
            target = code[at].target
            following[at] += [] if target is None else [target // INSTRUCTION_BYTES]
            waiting += following[at]
    ends = {at for at, tos in following.items() if tos != [at + 1] or code[at].name == "EXIT"}
    heads = {0} | {to for at in ends for to in following[at]}
    blocks = {}
    for head in heads:
        end = head
        while end not in ends and end + 1 not in heads:
            end += 1
        blocks[head] = Block(code[head : end + 1], following[end])
    return blocks


def _loops(graph: Mapping[int, Block], nodes: set[int], head: int = 0) -> list[Loop]:
    """The outermost loops among these nodes, each with its own; `head` is where they are entered.

    A loop is a strongly connected component; without the edges to its head it falls into the loops
    inside it.
    """
    loops = []
    for component in _components(graph, nodes, head):
        first = component[0]
        if len(component) > 1 or first in graph[first].successors:
            inside = set(component)
            loops.append(Loop(first, inside, _loops(_without(graph, inside, first), inside, first)))
    return loops


def _without(graph: Mapping[int, Block], nodes: set[int], head: int) -> dict[int, Block]:
    """The nodes alone, without the edges to `head`."""
    return {
        node: Block(
            graph[node].instructions,
            [to for to in graph[node].successors if to in nodes and to != head],
        )
        for node in nodes
    }


def _components(graph: Mapping[int, Block], nodes: set[int], head: int) -> Iterator[list[int]]:
    """Strongly connected components (Tarjan's algorithm), each from the node first reached on."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    done: set[int] = set()
    for root in [head, *sorted(nodes)]:
        if root in index:
            continue
        path = [(root, iter(graph[root].successors))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while path:
            node, successors = path[-1]
            for to in successors:
                if to not in nodes or to in done:
                    continue
                if to not in index:
                    index[to] = low[to] = len(index)
                    stack.append(to)
                    path.append((to, iter(graph[to].successors)))
                    break
                low[node] = min(low[node], index[to])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    component, stack[at:] = stack[at:], []
                    done.update(component)
                    yield component


def _all_loops(loop: Loop) -> Iterator[Loop]:
    yield loop
    for inner in loop.inner:
        yield from _all_loops(inner)


Key = Callable[[Trip], tuple[int, ...]]


def _trip(blocks: Mapping[int, Block], loop: Loop, key: Key) -> Trip:
    """The best way from the loop's head back to it, or from the kernel's start to its end."""
    node_of = {block: block for block in loop.blocks}
    costs = {block: Trip.of(blocks[block].instructions) for block in loop.blocks}
    for inner in loop.inner:  # one node each
        node_of |= dict.fromkeys(inner.blocks, inner.head)
        once = _trip(blocks, inner, key)
        costs[inner.head] = replace(once, reads=Counter(), writes=Counter(), cold=once.cold + 1)

    edges: dict[int, set[int]] = {node: set() for node in node_of.values()}
    ends = set()
    for block, node in node_of.items():
        successors = blocks[block].successors
        leaves = blocks[block].instructions[-1].name == "EXIT"
        if leaves if loop.is_kernel else loop.head in successors:
            ends.add(node)
        edges[node] |= {node_of[to] for to in successors if to in node_of}
    start = node_of[loop.head]
    edges = {node: tos - {node, start} for node, tos in edges.items()}

    best = {start: costs[start]}
    for node in _in_order(edges, start):
        for to in edges[node]:
            way = best[node] + costs[to]
            if to not in best or key(way) > key(best[to]):
                best[to] = way
    return max((best[end] for end in ends), key=key)


def _in_order(edges: Mapping[int, set[int]], start: int) -> list[int]:
    """The nodes of a graph without loops, each after those that lead to it."""
    after: list[int] = []
    seen = {start}
    path = [(start, iter(sorted(edges[start])))]
    while path:
        node, remaining = path[-1]
        to = next((to for to in remaining if to not in seen), None)
        if to is None:
            after.append(node)
            path.pop()
        else:
            seen.add(to)
            path.append((to, iter(sorted(edges[to]))))
    return after[::-1]


def _computes(blocks: Mapping[int, Block], loop: Loop) -> bool:
    """Whether an inner loop does neither what waiting nor what walking needs."""
    inside = [i for block in loop.blocks for i in blocks[block].instructions]
    return not any(i.is_protocol or i.sample_bytes or i.name in ("VOTE", "BAR") for i in inside)
