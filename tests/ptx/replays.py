"""Launches of the cases, kept to be run again with other kernels."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

from ptx.arithmetic import Array
from ptx.cases import CASES
from ptx.gpu import Replay, kernel_of, listing_of, standing_in
from ptx.machine import Schedule
from ptx.ranks import SHAPES
from ptx.reader import Block
from ptx.workloads import ELEMENTWISE, FACTORED, FEW, Shape

USUAL = (ELEMENTWISE, FACTORED, FEW, SHAPES)
"""Shapes of cases that are not about shapes."""

FIRST, LAST = 2, 2
"""How many launches of a kernel are kept of each case, beside those that carry out what no other one did."""


class Kept(NamedTuple):
    """A launch that is kept.

    Attributes:
        replay: of it.
        statements: of its kernel, which it carries out, by index.
        seconds: that it takes.
        watched: as in `Schedule`.
    """

    replay: Replay
    statements: set[int]
    seconds: float
    watched: bool


class Launches:
    """The launches that are kept, by PTX.

    Attributes:
        names: of the kernels.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._kept: defaultdict[str, list[Kept]] = defaultdict(list)
        self._contents: dict[bytes, Array] = {}

    def of(self, text: str, at: int) -> list[Kept]:
        """Those that carry out a statement, the cheapest first."""
        return sorted((k for k in self._kept[text] if at in k.statements), key=lambda k: k.seconds)

    def executed(self, text: str) -> set[int]:
        """The statements of a kernel that were carried out."""
        return set().union(*(k.statements for k in self._kept[text]))

    def run(self, case: Any, texts: Iterable[str] | None = None) -> None:
        """Runs a case and keeps its launches, of these kernels alone if they are given.

        Raises:
            FindingsError: what the tests of the same cases would find.
        """
        began = time.process_time()
        new: defaultdict[str, list[Kept]] = defaultdict(list)

        def watch(replay: Replay) -> None:
            nonlocal began
            if texts is None or replay.text in texts:
                before = [(span, self._once(content)) for span, content in replay.before]
                replay = replay._replace(before=before)
                kept = Kept(replay, statements_of(replay), time.process_time() - began, case.watched)
                new[replay.text] = self._chosen(replay.text, [*new[replay.text], kept])
                self.names[replay.text] = replay.launch.kernel
            began = time.process_time()

        with standing_in(Schedule(watched=case.watched), True, watch):
            case.run("triton")
        for text, kept in new.items():
            self._kept[text] += kept

    def _chosen(self, text: str, launches: list[Kept]) -> list[Kept]:
        """Some of one case, which carry out as much as all of them."""
        if len(launches) <= FIRST + LAST:
            return launches
        rest = [*launches[:FIRST], *launches[FIRST + 1 :]]
        known = self.executed(text).union(*(kept.statements for kept in rest))
        return rest if launches[FIRST].statements <= known else launches

    def _once(self, content: Array) -> Array:
        """The same content, as it was kept first."""
        return self._contents.setdefault(hashlib.blake2b(content.tobytes(), digest_size=16).digest(), content)


def statements_of(replay: Replay) -> set[int]:
    """Indices of the statements that a launch carried out, of what `machine.Run.executed` has."""
    listing, kernel = listing_of(replay.text), kernel_of(replay.text)
    place = {id(s): k for k, s in enumerate(listing.statements)}
    done = {place[id(kernel.numbered[-1 - number])] for number in replay.executed if number < 0}
    for number in replay.executed:
        if number >= 0:
            block: Block = kernel.blocks[number]
            body = [i for i in block.body if i.guard is None or not i.opcode.startswith(("ld.", "st."))]
            done |= {place[id(i)] for i in (*body, *([block.last] if block.last else []))}
    return done


def larger(name: str, random: Random) -> Any:
    """A case like one of the table, with random shapes that may be larger; None if shapes are what it is about."""
    case = CASES[name]
    if getattr(case, "shapes", None) not in USUAL or getattr(case, "groups", list) is not list:
        return None
    shapes: list[Shape] = [(random.randrange(1, 9000),) for _ in range(3)]
    if "Adafactor" in name:
        shapes += [(16 * random.randrange(1, 24), 16 * random.randrange(1, 24)), (random.randrange(2, 500), 97)]
        shapes += [tuple(random.randrange(1, 33) for _ in range(dims)) for dims in (2, 3, 4)]
    return replace(case, shapes=tuple(shapes))
