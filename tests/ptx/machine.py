"""A launch: threads run a kernel on the memory of this process, and everything is watched that a GPU would not report.

Threads that are together run as one array; those behind a branch wait for the others, by the lowest number of a block.
What touches memory outside of the registry, or lies askew, is a finding and is not carried out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.arithmetic import Array
from ptx.memory import BASE, CELLS, Access, Findings, Journal, Registry, as_bytes
from ptx.races import races
from ptx.translator import SHARED_BASE, Kernel

WARP = 32
GROUPS = 3
"""Into how many groups the warps of a batch fall where their order is random."""

_WAITING, _EXITED = 1 << 29, 1 << 30
"""Numbers behind those of all blocks: of a barrier, to which the block behind it is added; and of no block."""


class StuckError(Exception):
    """What a GPU would hang on, or not define: a barrier or shuffle that not all threads reach, a loop without end."""


@dataclass(frozen=True)
class Schedule:
    """In which order threads run.

    Attributes:
        seed: of a random order of blocks, and of warps, which run some at a time; None for all at once.
        batch: blocks at once.
        inexact: by how many units in the last place results of approximate instructions are moved, at random.
        watched: whether accesses are compared for races, which do not depend on the order.
    """

    seed: int | None = None
    batch: int = 64
    inexact: int = 0
    watched: bool = True


class Run:
    """One launch of a kernel.

    Attributes:
        findings: what was found.
        executed: numbers of basic blocks, and -1 minus numbers of guarded accesses, that some thread carried out.
        journal: of global memory.
    """

    def __init__(
        self,
        kernel: Kernel,
        blocks: int,
        shared_bytes: int,
        arguments: Sequence[int],
        registry: Registry,
        schedule: Schedule,
        most_steps: int = 200_000,
    ) -> None:
        self.kernel, self.registry, self.schedule = kernel, registry, schedule
        self.findings = Findings()
        self.executed: set[int] = set()
        self.journal = Journal()
        self._threads = kernel.listing.threads
        self._blocks, self._shared_bytes = blocks, max(16, shared_bytes)
        self._arguments = dict(zip(kernel.listing.params, arguments, strict=True))
        self._random = np.random.default_rng(schedule.seed)
        self._steps_left = most_steps
        self._log: list[Access] = []

    def __call__(self) -> None:
        order = np.arange(self._blocks)
        if self.schedule.seed is not None:
            self._random.shuffle(order)
        with np.errstate(all="ignore"):
            for first in range(0, self._blocks, self.schedule.batch):
                self._run_batch(order[first : first + self.schedule.batch])
        self._report_races("global", self._log)

    # ---- order

    def _run_batch(self, blocks: Array) -> None:
        threads, n = self._threads, len(blocks) * self._threads
        self._thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self._block = np.repeat(blocks.astype(np.uint32), threads)
        self._place = np.repeat(np.arange(len(blocks)), threads)  # of the block in this batch
        self._ident = self._block.astype(np.int64) * threads + self._thread
        self._epoch = np.zeros(len(blocks), np.int64)
        self._shared = np.full((len(blocks), self._shared_bytes), 0xCD, np.uint8)
        self._initialised = np.zeros(self._shared.shape, bool)
        self._shared_log: list[Access] = []
        registers = [np.frombuffer(b"\xa5" * 8 * n, dtype=d)[:n] if d is not np.bool_ else np.zeros(n, bool)
                     for d in self.kernel.registers]  # fmt: skip
        counter = np.zeros(n, np.int64)
        while (counter < _EXITED).any():
            for group in self._groups(len(blocks)):
                self._run_group(group, counter, registers)
            self._open_barriers(blocks, counter.reshape(len(blocks), threads))
        self._report_races("shared", self._shared_log)

    def _groups(self, blocks: int) -> list[Array]:
        """Threads of a batch by who goes first until the next barrier; those of one group go together."""
        everyone = np.arange(blocks * self._threads)
        if self.schedule.seed is None:
            return [everyone]
        warps = self._random.permutation(everyone.reshape(-1, WARP))
        return [group.ravel() for group in np.array_split(warps, GROUPS) if len(group)]

    def _run_group(self, group: Array, counter: Array, registers: list[Array]) -> None:
        """Until all threads of the group wait or are done."""
        mine = counter[group]
        while (now := int(mine.min())) < _WAITING:
            self._steps_left -= 1
            if self._steps_left < 0:
                raise StuckError(f"{self.kernel.listing.name} does not come to an end")
            here = mine == now
            index = None if here.all() and len(group) == len(counter) else group[here]
            self._here = now
            self.executed.add(now)
            taken = self.kernel.functions[now](self, registers, index, len(counter) if index is None else len(index))
            end, target = self.kernel.blocks[now].end, self.kernel.targets[now]
            if end == "barrier":
                self._whole_warps(index, "a barrier")
                mine[here] = _WAITING + now + 1
            elif end == "branch":
                mine[here] = np.where(taken, target, now + 1)
            else:
                mine[here] = {"fall": now + 1, "jump": target, "exit": _EXITED}[end]
        counter[group] = mine

    def _open_barriers(self, blocks: Array, counter: Array) -> None:
        """Lets blocks go on all of whose threads wait at one barrier."""
        waiting = counter < _EXITED
        for place in np.flatnonzero(waiting.any(1)):
            if not waiting[place].all() or len(set(counter[place].tolist())) > 1:
                raise StuckError(f"{self.kernel.listing.name}: block {blocks[place]} waits for threads that never come")
            counter[place] -= _WAITING
            self._epoch[place] += 1

    def _whole_warps(self, index: Array | None, what: str) -> None:
        if index is None:
            return
        if len(index) % WARP or (np.diff(index.reshape(-1, WARP)) != 1).any():
            raise StuckError(f"{self.kernel.listing.name}: {what} in a divergent warp, in basic block {self._here}")

    # ---- what instructions ask for

    def special(self, name: str, index: Array | None) -> Array:
        values = {"%tid.x": self._thread, "%ctaid.x": self._block}
        constants = {"%ntid.x": self._threads, "%nctaid.x": self._blocks}
        column = values[name] if name in values else np.full(len(self._thread), constants[name], np.uint32)
        return column if index is None else column[index]

    def param(self, name: str) -> Any:
        return np.uint64(self._arguments[name])

    def approximate(self, x: Array) -> Array:
        if not self.schedule.inexact:
            return x
        most = self.schedule.inexact
        moved = x.view(np.int32) + self._random.integers(-most, most + 1, x.shape, np.int32)
        return np.where(np.isfinite(x) & (x != 0), moved.view(np.float32), x)

    def check_divisor(self, number: int, divisor: Array) -> None:
        if (np.asarray(divisor) == 0).any():
            self.findings.add("division by zero", self.kernel.where(number))

    def shuffle_xor(self, number: int, index: Array | None, value: Array, lanes: int) -> Array:
        self._whole_warps(index, "a shuffle")
        return value.reshape(-1, WARP)[:, np.arange(WARP) ^ lanes].ravel()

    def shuffle(self, number: int, index: Array | None, value: Array, lane: Array) -> Array:
        self._whole_warps(index, "a shuffle")
        lanes = (lane % WARP).astype(np.int64).reshape(-1, WARP)
        return np.take_along_axis(value.reshape(-1, WARP), lanes, 1).ravel()

    def warp_sum(self, number: int, index: Array | None, value: Array, members: Array) -> Array:
        self._whole_warps(index, "a sum")
        if (members != 0xFFFFFFFF).any():
            raise StuckError(f"{self.kernel.where(number)}: a sum of a part of a warp")
        return np.repeat(value.reshape(-1, WARP).sum(1, dtype=np.uint32), WARP)

    # ---- global memory

    def _active(self, number: int, index: Array | None, mask: Array | None, n: int) -> tuple[Array, Array]:
        """Which of the threads at an instruction carry it out: positions among them, and in the batch."""
        at = np.arange(n) if mask is None else np.flatnonzero(mask)
        if mask is not None and len(at):
            self.executed.add(-1 - number)
        return at, at if index is None else index[at]

    def _allowed(
        self, number: int, index: Array | None, address: Array, mask: Array | None, size: int
    ) -> tuple[Array, Array]:
        """`_active`, less the threads that may not."""
        at, threads = self._active(number, index, mask, len(address))
        wanted = address[at]
        wrong = np.zeros(len(at), bool)
        askew, outside = wanted % np.uint64(size) != 0, ~self.registry.contains(wanted, size)
        for kind, bad in (("misaligned", askew), ("out of bounds", outside)):
            if bad.any():
                thread, place = int(self._ident[threads[bad][0]]), self.registry.describe(int(wanted[bad][0]))
                self.findings.add(
                    kind, self.kernel.where(number), f"{size} bytes at {place} by thread {thread}", int(bad.sum())
                )
                wrong |= bad
        return at[~wrong], threads[~wrong]

    def global_load(
        self, number: int, index: Array | None, address: Array, mask: Array | None, size: int, count: int
    ) -> list[Array]:
        at, threads = self._allowed(number, index, address, mask, size * count)
        self._record(self._log, number, threads, address[at], size * count, None)
        first = ((address[at] - np.uint64(BASE)) // np.uint64(size)).astype(np.int64)
        return [_spread(CELLS[size][first + k], at, len(address)) for k in range(count)]

    def global_store(
        self, number: int, index: Array | None, address: Array, mask: Array | None, size: int, values: list[Array]
    ) -> None:
        at, threads = self._allowed(number, index, address, mask, size * len(values))
        self._record(self._log, number, threads, address[at], size * len(values), [v[at] for v in values])
        first = ((address[at] - np.uint64(BASE)) // np.uint64(size)).astype(np.int64)
        for k, value in enumerate(values):
            self.journal.note(size, first + k)
            CELLS[size][first + k] = value[at]

    # ---- shared memory

    def _shared_columns(self, number: int, address: Array, size: int) -> Array:
        byte = address.astype(np.int64) - SHARED_BASE
        wrong = (byte < 0) | (byte + size > self._shared_bytes) | (byte % size != 0)
        if wrong.any():
            raise StuckError(f"{self.kernel.where(number)}: {size} bytes at byte {byte[wrong][0]} of shared memory")
        return byte[:, None] + np.arange(size)

    def _shared_read(self, number: int, threads: Array, address: Array, size: int) -> Array:
        """uint8 [threads, size]."""
        place, columns = self._place[threads][:, None], self._shared_columns(number, address, size)
        if not self._initialised[place, columns].all():
            self.findings.add("shared memory read before it is written", self.kernel.where(number))
        self._record(self._shared_log, number, threads, self._shared_address(threads, address), size, None)
        return self._shared[place, columns]

    def _shared_write(self, number: int, threads: Array, address: Array, values: Array) -> None:
        size = values.shape[1]
        place, columns = self._place[threads][:, None], self._shared_columns(number, address, size)
        self._shared[place, columns] = values
        self._initialised[place, columns] = True
        if self.schedule.watched and len(threads):
            where, epoch = self._shared_address(threads, address), self._epoch[self._place[threads]]
            self._shared_log.append(Access(number, self._ident[threads], where, size, epoch, values))

    def _shared_address(self, threads: Array, address: Array) -> Array:
        """With the number of the block above it."""
        return (self._block[threads].astype(np.uint64) << np.uint64(32)) + address

    def shared_load(
        self, number: int, index: Array | None, address: Array, mask: Array | None, size: int, count: int
    ) -> list[Array]:
        at, threads = self._active(number, index, mask, len(address))
        found = self._shared_read(number, threads, address[at], size * count).reshape(len(at), count, size)
        columns = np.ascontiguousarray(found.transpose(1, 0, 2)).view(CELLS[size].dtype)[..., 0]
        return [_spread(column, at, len(address)) for column in columns]

    def shared_store(
        self, number: int, index: Array | None, address: Array, mask: Array | None, size: int, values: list[Array]
    ) -> None:
        at, threads = self._active(number, index, mask, len(address))
        self._shared_write(number, threads, address[at], as_bytes([v[at] for v in values]))

    def _rows(self, index: Array | None, address: Array, matrices: int) -> tuple[Array, Array]:
        """Threads that name rows of matrices of 8 x 8 elements of 16 bits, and those rows, [warps, 8 * matrices]."""
        self._whole_warps(index, "a matrix")
        threads = np.arange(len(address)) if index is None else index
        return threads.reshape(-1, WARP)[:, : 8 * matrices], address.reshape(-1, WARP)[:, : 8 * matrices]

    def matrix_load(self, number: int, index: Array | None, address: Array, matrices: int) -> list[Array]:
        threads, rows = self._rows(index, address, matrices)
        words = self._shared_read(number, threads.ravel(), rows.ravel(), 16).view(np.uint32)
        return [m.ravel() for m in words.reshape(len(rows), matrices, WARP).transpose(1, 0, 2)]

    def matrix_store(self, number: int, index: Array | None, address: Array, values: list[Array]) -> None:
        threads, rows = self._rows(index, address, len(values))
        words = np.stack([v.reshape(-1, WARP) for v in values], axis=1)
        self._shared_write(number, threads.ravel(), rows.ravel(), as_bytes([words.ravel()]).reshape(-1, 16))

    # ---- races

    def _record(
        self, log: list[Access], number: int, threads: Array, address: Array, size: int, values: list[Array] | None
    ) -> None:
        if self.schedule.watched and len(threads):
            epoch = self._epoch[self._place[threads]]
            written = None if values is None else as_bytes(values)
            log.append(Access(number, self._ident[threads], address, size, epoch, written))

    def _report_races(self, memory: str, log: list[Access]) -> None:
        for race in races(log, self._threads):
            place = self.registry.describe(race.place) if memory == "global" else f"byte {race.place % (1 << 32)}"
            where = f"{self.kernel.where(race.writer)} / {self.kernel.where(race.other)}"
            self.findings.add(
                f"race {race.what} on {memory} memory", where, f"{place}, threads {race.threads}", race.times
            )


def _spread(values: Array, at: Array, n: int) -> Array:
    """Values at these positions of an array of n, zeros elsewhere."""
    if len(at) == n:
        return values
    wide = np.zeros(n, values.dtype)
    wide[at] = values
    return wide
