# mypy: allow-untyped-defs
"""The extra work of an Adafactor step for tensors of which it has one shard: sums of shards become sums of the whole.

    shard_totals     adds up the tiles' sums over rows and columns
                     ... which are added up over the processes ...
    shard_averages   goes on from there
    row_means        adds up the averages of rows
                     ... added up over the processes ...
    square_totals    adds up the pieces' sums of squares, of update and parameter
                     ... added up over the processes ...

All sums that are added up over the same processes lie next to each other, so that it is one collective operation.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels.adafactor.averages import averages_options, shard_averages, shard_totals
from fusedopt_kernels.adafactor.layout import TABLES
from fusedopt_kernels.adafactor.plan import MEANS, SQUARES, Plan
from fusedopt_kernels.device import device_function, loop_range, my_piece
from fusedopt_kernels.table import LaunchTable

AllReduce = Callable[[Tensor, Any], None]
"""Puts sums over processes, all of those that the second argument stands for, in the place of local sums."""


@device_function
def sum_up(at, count, BLOCK: tl.constexpr):
    """The sum of `count` float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in loop_range(0, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += tl.load(at + offsets, mask=offsets < count, other=0.0)
    return tl.sum(total)


@triton.jit
def row_means(chunks, rows, scalars, partial_sums, T: tl.constexpr, MEANS: tl.constexpr):
    """The sum of the averages of the rows of one matrix."""
    index, matrix = my_piece(chunks)
    row = rows + index * T.row.length
    if tl.load(scalars + index * T.scalars.length + T.scalars.active) == 0.0:
        return
    count = tl.load(row + T.row.row_programs)
    parts = tl.arange(0, MEANS)
    at = partial_sums + tl.load(row + T.row.row_mean_partials) + matrix * count
    sums = tl.load(at + parts, mask=parts < count, other=0.0)
    tl.store(partial_sums + tl.load(row + T.row.row_means) + matrix, tl.sum(sums))


@triton.jit
def square_totals(chunks, rows, scalars, square_partials, T: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of squares of one tensor's update and of the tensor."""
    index, _ = my_piece(chunks)
    row = rows + index * T.row.length
    if tl.load(scalars + index * T.scalars.length + T.scalars.active) == 0.0:
        return
    pieces = tl.load(row + T.row.pieces)
    at = square_partials + tl.load(row + T.row.square_partials)
    to = square_partials + tl.load(row + T.row.square_totals)
    tl.store(to, sum_up(at, pieces, BLOCK))
    tl.store(to + 1, sum_up(at + pieces, pieces, BLOCK))


class ShardPhases:
    """The launches and collective operations of one step; none where the plan has no shards."""

    def __init__(
        self,
        table: LaunchTable,
        plan: Plan,
        scalars: Tensor,
        partial_sums: list[Tensor],
        square_partials: Tensor,
        all_reduce: AllReduce | None,
    ) -> None:
        self._rows, self._scalars = table.rows, scalars
        self._partial_sums, self._square_partials = partial_sums, square_partials
        self._segments, self._all_reduce = plan.segments, all_reduce
        is_shard = plan.shards.is_shard
        # Launches of each phase; without shards no step asks for them.
        phases = {"averages": plan.shard_averages, "means": plan.shard_matrices} if is_shard.any() else {}
        chunks = {name: table.chunks(f"{name} of shards", plan.in_float64, n) for name, n in phases.items()}
        self._averages, self._matrices = chunks.get("averages", {}), chunks.get("means", {})
        self._tensors = table.chunks("totals of shards", 0 * is_shard, is_shard) if phases else {}

    def averages(self) -> None:
        """From the tiles' sums over rows and columns of shards to averages of whole rows and columns, and of rows."""
        for wide, chunks in self._averages.items():
            arguments = self._rows, self._scalars, self._partial_sums[wide]
            shard_totals[(len(chunks),)](chunks, *arguments, **averages_options(wide))
        self._reduce("sums")
        for wide, chunks in self._averages.items():
            arguments = self._rows, self._scalars, self._partial_sums[wide]
            shard_averages[(len(chunks),)](chunks, *arguments, **averages_options(wide))
        for wide, chunks in self._matrices.items():
            arguments = self._rows, self._scalars, self._partial_sums[wide]
            row_means[(len(chunks),)](chunks, *arguments, TABLES, MEANS, enable_fp_fusion=False)
        self._reduce("means")

    def squares(self) -> None:
        """From sums of squares of pieces of shards to those of whole tensors."""
        for chunks in self._tensors.values():
            arguments = self._rows, self._scalars, self._square_partials, TABLES, SQUARES
            square_totals[(len(chunks),)](chunks, *arguments, enable_fp_fusion=False)
        self._reduce("squares")

    def all_sums(self) -> list[tuple[Tensor, Any]]:
        """Returns what a step adds up over processes, and what stands for these, in the order of the phases."""
        return [pair for phase in self._segments for pair in self._sums(phase)]

    def _sums(self, phase: str) -> list[tuple[Tensor, Any]]:
        memory = [self._square_partials] if phase == "squares" else self._partial_sums
        return [(memory[s.wide][s.start : s.stop], s.processes) for s in self._segments[phase]]

    def _reduce(self, phase: str) -> None:
        for sums, processes in self._sums(phase):
            if self._all_reduce is None:
                raise ValueError(f"the plan has shards, and all_reduce is {self._all_reduce}: pass what adds them up")
            self._all_reduce(sums, processes)
