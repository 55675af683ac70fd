"""Memory that kernels reach, what of it they may touch, and what was found when they did."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ptx.arithmetic import Array

BASE = 1 << 16
"""No memory of a process lies below."""

_END = 1 << 47


def _whole_memory(dtype: Any) -> Array:
    size = np.dtype(dtype).itemsize
    place = {"data": (BASE, False), "shape": ((_END - BASE) // size,), "typestr": np.dtype(dtype).str, "version": 3}
    return np.asarray(type("Memory", (), {"__array_interface__": place})())


CELLS = {np.dtype(dtype).itemsize: _whole_memory(dtype) for dtype in (np.uint8, np.uint16, np.uint32, np.uint64)}
"""The memory of this process from `BASE` on, by size of an element."""

HALVES = CELLS[2]


class Span(NamedTuple):
    """Addresses that may be touched: the first, and the one behind the last; what lies there, and of which dtype."""

    start: int
    end: int
    name: str
    dtype: str = ""

    def memory(self) -> Array:
        """Its bytes, which can be written to."""
        return CELLS[1][self.start - BASE : self.end - BASE]


class Registry:
    """All memory that a launch may touch.

    Attributes:
        spans: the first stands for what lies below all others.
        touched: the spans that `touch` was called for.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        merged: list[Span] = []
        for span in sorted(spans):
            if merged and span.start < merged[-1].end:  # a view and its base
                merged[-1] = merged[-1]._replace(end=max(merged[-1].end, span.end))
            else:
                merged.append(span)
        self.spans = [Span(0, 0, "below everything"), *merged]
        self._starts, self._ends = (np.array(column, np.uint64) for column in list(zip(*self.spans))[:2])
        self.touched: set[Span] = set()

    def contains(self, address: Array, size: int) -> Array:
        """Which addresses have so many bytes behind them that all belong to one span."""
        return address + np.uint64(size) <= self._ends[self._numbers(address)]

    def touch(self, address: Array, size: int) -> None:
        """Notes which spans are touched at these addresses, all of which are in some."""
        if not self.contains(address, size).all():
            raise IndexError(f"{size} bytes out of bounds, at {self.describe(int(address.min()))}")
        self.touched |= {self.spans[number] for number in np.unique(self._numbers(address)).tolist()}

    def contents(self) -> list[tuple[Span, Array]]:
        """Copies of all of it."""
        return [(span, span.memory().copy()) for span in self.spans[1:]]

    def span(self, address: int) -> Span:
        """The span that begins last at or before an address."""
        return self.spans[int(self._numbers(np.uint64(address)))]

    def describe(self, address: int) -> str:
        """Says where an address is."""
        span = self.span(address)
        return f"byte {address - span.start} of {span.end - span.start} of {span.name}"

    def _numbers(self, address: Any) -> Any:
        return np.searchsorted(self._starts, address, side="right") - 1


class Written(NamedTuple):
    """What a launch wrote: cells of two bytes, by their number from `BASE` on, and what is in them."""

    places: Array
    values: Array

    def put_back(self) -> None:
        """Writes it again."""
        HALVES[self.places] = self.values


class Journal:
    """What is overwritten, so that it can be undone."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, Array, Array]] = []

    def note(self, size: int, cells: Array) -> None:
        """Keeps what is in these cells of `CELLS[size]`, which are about to be written to."""
        self._entries.append((size, cells, CELLS[size][cells]))

    def written(self) -> Written:
        """What is now where something was written."""
        halves = [((cells * (size // 2))[:, None] + np.arange(size // 2)).ravel() for size, cells, _ in self._entries]
        places = np.unique(np.concatenate([np.zeros(0, np.int64), *halves]))
        return Written(places, HALVES[places])

    def undo(self) -> None:
        """Leaves memory as it was before."""
        for size, cells, old in reversed(self._entries):
            CELLS[size][cells] = old


@dataclass
class Findings:
    """What was found, by kind and place: how often, and the first example."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, kind: str, where: str, example: str = "", times: int = 1) -> None:
        self.counts[kind, where] += int(times)
        self.examples.setdefault((kind, where), example)

    def merge(self, other: "Findings") -> None:
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.counts}

    def __str__(self) -> str:
        return "\n".join(
            f"{kind}: {where}: {n} times, first: {self.examples[kind, where]}"
            for (kind, where), n in sorted(self.counts.items())
        )


class Access(NamedTuple):
    """What some threads did at one instruction.

    Attributes:
        number: of the instruction.
        threads: in the launch.
        address: of each.
        size: in bytes, of all elements of a vector.
        epoch: how many barriers each thread's block had passed.
        values: what was written, uint8 [threads, size]; None for a read.
    """

    number: int
    threads: Array
    address: Array
    size: int
    epoch: Array
    values: Array | None


def as_bytes(values: list[Array]) -> Array:
    """Vectors, given by element, as uint8 [threads, bytes of a vector]."""
    stacked = np.ascontiguousarray(np.stack(values, axis=1))
    return stacked.view(np.uint8).reshape(len(stacked), len(values) * stacked.itemsize)
