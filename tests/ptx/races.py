"""Accesses of two threads to one place, one of them a write, that nothing orders.

Nothing orders blocks of a launch. Threads of a block are ordered by barriers: what one did before a barrier comes
before what another does behind it. Several threads that write the same number, and none that reads, do no harm:
layouts of Triton hold copies of a number in several threads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ptx.arithmetic import Array
from ptx.memory import Access


class Race(NamedTuple):
    """A pair of instructions that race.

    Attributes:
        what: "between blocks" or "in a block".
        writer, other: numbers of instructions; `other` reads, or writes too.
        place: address where they meet first.
        threads: some that meet there.
        times: at how many places they meet.
    """

    what: str
    writer: int
    other: int
    place: int
    threads: list[int]
    times: int


class _Touched(NamedTuple):
    """One element per place that an access of a thread touches."""

    place: Array
    thread: Array
    epoch: Array
    number: Array
    write: Array
    value: Array


def races(log: Sequence[Access], threads_per_block: int) -> list[Race]:
    """Returns the races among accesses to one memory, given the number of threads of a block."""
    if all(a.values is None for a in log):
        return []
    grain = int(np.gcd.reduce([a.size for a in log]))
    reads, writes = ([a for a in log if (a.values is None) == is_read] for is_read in (True, False))
    written = _touched(writes, grain)
    places = np.unique(written.place)
    read = _touched(reads, grain, places)  # most of what is read is never written
    touched = _Touched(*map(np.concatenate, zip(read, written)))
    block = touched.thread // threads_per_block
    between = _conflicts("between blocks", touched, grain, touched.place, block)
    order = np.lexsort((touched.epoch, block, touched.place))
    touched, block = _Touched(*(column[order] for column in touched)), block[order]
    changes = [np.diff(column) != 0 for column in (touched.place, block, touched.epoch)]
    group = np.concatenate([[0], np.cumsum(np.logical_or.reduce(changes))])
    return between + _conflicts("in a block", touched, grain, group, touched.thread)


def _touched(accesses: Sequence[Access], grain: int, among: Array | None = None) -> _Touched:
    """What these accesses touch among some places, None for all; they all read, or all write."""
    found = []
    for size in {a.size for a in accesses}:
        alike = [a for a in accesses if a.size == size]
        address, threads, epoch = (
            np.concatenate(columns) for columns in zip(*((a.address, a.threads, a.epoch) for a in alike))
        )
        number = np.repeat([a.number for a in alike], [len(a.threads) for a in alike])
        places = (address // np.uint64(grain)).astype(np.int64)[:, None] + np.arange(size // grain)
        value = np.zeros(places.shape, np.int64)
        if alike[0].values is not None:
            wide = np.zeros((*places.shape, 16), np.uint8)
            wide[..., :grain] = np.concatenate([a.values for a in alike]).reshape(*places.shape, grain)
            halves = wide.view(np.int64)
            value = halves[..., 0] ^ (halves[..., 1] << 1)
        keep = np.ones(places.shape, bool)
        if among is not None:
            keep = among[np.minimum(np.searchsorted(among, places), len(among) - 1)] == places
        row = np.nonzero(keep)[0]
        write = np.full(len(row), alike[0].values is not None, np.int64)
        found.append(_Touched(places[keep], threads[row], epoch[row], number[row], write, value[keep]))
    return _Touched(*map(np.concatenate, zip(*found))) if found else _Touched(*np.zeros((6, 0), np.int64))


def _conflicts(what: str, touched: _Touched, grain: int, group: Array, who: Array) -> list[Race]:
    """Races within groups of accesses, where `who` differs."""
    order = np.argsort(group, kind="stable")
    group, who, touched = group[order], who[order], _Touched(*(column[order] for column in touched))
    if not len(group):
        return []
    begin = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1])
    end = np.append(begin[1:], len(group))
    write, limits = touched.write, np.iinfo(np.int64)

    def over(function: np.ufunc, column: Array) -> Array:
        return function.reduceat(column, begin)

    several = over(np.minimum, who) != over(np.maximum, who)
    same = over(np.minimum, np.where(write, touched.value, limits.max)) == over(
        np.maximum, np.where(write, touched.value, limits.min)
    )
    only_writes, any_write = over(np.minimum, write) == 1, over(np.maximum, write) == 1
    found: dict[tuple[int, int], Race] = {}
    for at in np.flatnonzero(several & any_write & ~(only_writes & same)):
        members = slice(begin[at], end[at])
        number, writes = touched.number[members], write[members] == 1
        writer = int(number[writes][0])
        other = int(number[~writes][0] if not writes.all() else number[writes][-1])
        known = found.get((writer, other))
        if known is None:
            threads = sorted(set(touched.thread[members].tolist()))[:4]
            known = Race(what, writer, other, int(touched.place[begin[at]]) * int(grain), threads, 0)
        found[writer, other] = known._replace(times=known.times + 1)
    return list(found.values())
