"""Machine code of the kernels: functions, loops, branches, and how often each instruction is issued by a warp.

Counts are static: instructions of each loop, times how often the loop runs, which the caller says. Predicated
instructions count as issued, as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
TARGET = re.compile(r"\b0x([0-9a-f]+)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes from the start of the function.
        text: as the disassembler writes it.
    """

    address: int
    text: str

    @property
    def name(self) -> str:
        """The operation with its modifiers, such as `MUFU.EX2`."""
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]

    @property
    def kind(self) -> str:
        """The operation alone, such as `MUFU`."""
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch leads; None for any other instruction."""
        if self.kind != "BRA":
            return None
        found = TARGET.findall(self.text)
        return int(found[-1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """A loop of a function: all between a branch backwards and its target, without the loops inside.

    Attributes:
        first: address of its first instruction.
        last: address of the branch.
        own: its instructions, without those of loops inside.
        inside: the loops directly inside.
    """

    first: int
    last: int
    own: tuple[Instruction, ...]
    inside: tuple[Loop, ...]

    @property
    def kinds(self) -> Counter[str]:
        """How often each operation occurs, without the loops inside."""
        return Counter(instruction.kind for instruction in self.own)

    def side_branch(self) -> int:
        """Return how many of its own instructions the longest branch forwards within it leaves out."""
        lengths = [0]
        for instruction in self.own:
            target = instruction.target
            if target is not None and instruction.address < target <= self.last:
                lengths.append(sum(instruction.address < other.address < target for other in self.own))
        return max(lengths)


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each function that cuobjdump printed, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in disassembly.splitlines():
        if line.strip().startswith("Function :"):
            code = found.setdefault(line.split(":", 1)[1].strip(), [])
        elif match := INSTRUCTION.search(line):
            code.append(Instruction(int(match[1], 16), match[2]))
    return found


def without_repair(code: Sequence[Instruction]) -> list[Instruction]:
    """Return the instructions up to where a thread ends if all of y is finite: what stands behind repairs it."""
    vote = next((i for i, each in enumerate(code) if each.name.startswith("BAR.RED")), len(code))
    ends = (i for i in range(vote, len(code)) if code[i].kind == "EXIT")
    return list(code[: next(ends, len(code)) + 1])


def body(code: Sequence[Instruction]) -> Loop:
    """Return a function as a loop that runs once, with its loops inside. NOPs, which only fill, are left out."""
    kept = [instruction for instruction in code if instruction.kind != "NOP"]
    ends: dict[int, int] = {}
    for instruction in kept:
        target = instruction.target
        # The branch to itself behind the last EXIT is no loop.
        if target is not None and target < instruction.address:
            ends[target] = max(ends.get(target, 0), instruction.address)
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
    last = kept[-1].address if kept else 0
    return _loop(0, last, kept, spans)


def _loop(first: int, last: int, code: Sequence[Instruction], spans: Sequence[tuple[int, int]]) -> Loop:
    inside, covered = [], first - 1
    for begin, end in spans:
        if begin > covered and (begin, end) != (first, last):
            within = [span for span in spans if begin <= span[0] and span[1] <= end and span != (begin, end)]
            part = [instruction for instruction in code if begin <= instruction.address <= end]
            inside.append(_loop(begin, end, part, within))
            covered = end
    own = tuple(
        instruction
        for instruction in code
        if not any(loop.first <= instruction.address <= loop.last for loop in inside)
    )
    return Loop(first, last, own, tuple(inside))


def walk(loop: Loop, runs: Callable[[Loop], float], times: float = 1.0) -> Iterator[tuple[Loop, float]]:
    """Visit a loop and all inside, each with how often its instructions are issued.

    Args:
        loop: what `body` returned, at first.
        runs: how often a loop runs for each time that the one around it does.
        times: how often the loop itself is entered.
    """
    yield loop, times
    for each in loop.inside:
        yield from walk(each, runs, times * runs(each))
