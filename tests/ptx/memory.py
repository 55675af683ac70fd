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


class Span(NamedTuple):
    """Addresses that may be touched: the first, and the one behind the last."""

    start: int
    end: int
    name: str


class Registry:
    """All memory that a launch may touch."""

    def __init__(self, spans: Iterable[Span]) -> None:
        merged: list[Span] = []
        for span in sorted(spans):
            if merged and span.start < merged[-1].end:  # a view and its base
                merged[-1] = merged[-1]._replace(end=max(merged[-1].end, span.end))
            else:
                merged.append(span)
        self._spans = [Span(0, 0, "below everything"), *merged]
        self._starts, self._ends = (np.array(column, np.uint64) for column in list(zip(*self._spans))[:2])

    def contains(self, address: Array, size: int) -> Array:
        """Which addresses have so many bytes behind them that all belong to one span."""
        return address + np.uint64(size) <= self._ends[np.searchsorted(self._starts, address, side="right") - 1]

    def describe(self, address: int) -> str:
        """Says where an address is."""
        span = self._spans[int(np.searchsorted(self._starts, np.uint64(address), side="right")) - 1]
        return f"byte {address - span.start} of {span.end - span.start} of {span.name}"


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
