# mypy: allow-untyped-defs
"""What a step of Adafactor does beside, for tensors of which it has one shard: sums of shards become sums of the whole.

    averages   adds up the tiles' sums over rows and columns
               ... which are added up over the processes ...
    averages   goes on from there
    row_means  adds up the averages of rows
               ... added up over the processes ...
    totals     adds up the pieces' sums of squares, of update and parameter
               ... added up over the processes ...

All sums that are added up over the same processes lie behind each other, so that it is one collective operation.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels import adafactor_cells as cell
from fusedopt_kernels.adafactor_averages import launch_averages
from fusedopt_kernels.adafactor_plan import MEANS, SQUARES, Plan
from fusedopt_kernels.device import device_function, my_piece, walk
from fusedopt_kernels.table import LaunchTable

AddUp = Callable[[Tensor, Any], None]
"""Puts sums over processes, all of those that the second argument stands for, in the place of local sums."""


@device_function
def sum_up(at, count, BLOCK: tl.constexpr):
    """The sum of so many float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in walk(0, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += tl.load(at + offsets, mask=offsets < count, other=0.0)
    return tl.sum(total)


@triton.jit
def row_means(chunks, rows, scalars, work, MEANS: tl.constexpr):
    """The sum of the averages of the rows of one matrix."""
    index, matrix = my_piece(chunks)
    row = rows + index * cell.ROW_LENGTH
    if tl.load(scalars + index * cell.SCALARS_LENGTH + cell.ACTIVE) == 0.0:
        return
    count = tl.load(row + cell.SHARES)
    parts = tl.arange(0, MEANS)
    sums = tl.load(work + tl.load(row + cell.MEANS) + matrix * count + parts, mask=parts < count, other=0.0)
    tl.store(work + tl.load(row + cell.ROW_MEANS) + matrix, tl.sum(sums))


@triton.jit
def totals(chunks, rows, scalars, kept, BLOCK: tl.constexpr):
    """The sums of squares of one tensor's update and of the tensor."""
    index, _ = my_piece(chunks)
    row = rows + index * cell.ROW_LENGTH
    if tl.load(scalars + index * cell.SCALARS_LENGTH + cell.ACTIVE) == 0.0:
        return
    pieces = tl.load(row + cell.PIECES)
    at = kept + tl.load(row + cell.SQUARES)
    to = kept + tl.load(row + cell.SQUARE_TOTALS)
    tl.store(to, sum_up(at, pieces, BLOCK))
    tl.store(to + 1, sum_up(at + pieces, pieces, BLOCK))


class Shards:
    """The launches and collective operations of one step; none where the plan has no shards."""

    def __init__(
        self,
        table: LaunchTable,
        plan: Plan,
        scalars: Tensor,
        work: list[Tensor],
        kept: Tensor,
        add_up: AddUp | None,
    ) -> None:
        self._rows, self._scalars, self._work, self._kept = table.rows, scalars, work, kept
        self._segments, self._add = plan.segments, add_up
        split = plan.splits.is_split
        # Launches of each phase; not asked for where there are no shards, at every step of everybody else.
        phases = {"averages": plan.shard_averages, "means": plan.shard_matrices} if split.any() else {}
        chunks = {name: table.chunks(f"{name} of shards", plan.in_float64, n) for name, n in phases.items()}
        self._averages, self._matrices = chunks.get("averages", {}), chunks.get("means", {})
        self._tensors = table.chunks("totals of shards", 0 * split, split) if phases else {}

    def averages(self) -> None:
        """From the tiles' sums over rows and columns of shards to averages of whole rows and columns, and of rows."""
        for wide, chunks in self._averages.items():
            launch_averages(chunks, self._rows, self._scalars, self._work[wide], "tiles", "totals")
        self._add_up("sums", self._work)
        for wide, chunks in self._averages.items():
            launch_averages(chunks, self._rows, self._scalars, self._work[wide], "totals", "averages")
        for wide, chunks in self._matrices.items():
            row_means[(len(chunks),)](
                chunks, self._rows, self._scalars, self._work[wide], MEANS, enable_fp_fusion=False
            )
        self._add_up("means", self._work)

    def squares(self) -> None:
        """From sums of squares of pieces of shards to those of whole tensors."""
        for chunks in self._tensors.values():
            totals[(len(chunks),)](chunks, self._rows, self._scalars, self._kept, SQUARES, enable_fp_fusion=False)
        self._add_up("squares", [self._kept])

    def _add_up(self, phase: str, memory: list[Tensor]) -> None:
        for segment in self._segments[phase]:
            if self._add is None:
                raise ValueError(f"the plan has shards, and add_up is {self._add}: pass what adds them up")
            self._add(memory[segment.wide][segment.start : segment.stop], segment.over)
