# mypy: allow-untyped-defs
"""Statistics as by-products of an update: the `Measures` of each piece of a tensor, and of the tensor as a whole.

The launch that updates a piece has its gradient, weight and update in hand, and leaves their measures behind it:
float64 [measures, pieces] for each tensor, from `row.measures` on. One more launch adds them up, always in the same
order. In the kernels, `T.measures` has their places, or is None: then nothing of this is compiled.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels.device import device_function, load_behind, load_number, loop_range
from fusedopt_kernels.measures import PLACES
from fusedopt_kernels.record import Tables
from fusedopt_kernels.table import LaunchTable

_MEASURES = tl.constexpr(8)
"""The next power of two: a block holds all measures of some elements."""

_BLOCK = 1024
"""Pieces that are added up at a time."""


@device_function
def where_active(mask, active):
    """The same mask, or one of nothing if the step is skipped.

    Compared after it is broadcast: not every interpreter broadcasts truth values. And not as a choice of numbers: the
    compiler would no longer know that neighbours are in the mask together, and access them one by one.
    """
    return mask & (tl.broadcast_to(active, mask.shape) != 0.0)


@device_function
def _sum_of_squares(x, mask):
    x = tl.where(mask, x, 0.0).to(tl.float64)
    return tl.sum(x * x)


@device_function
def measured(g, p, new, kept, inside, written, T: tl.constexpr):
    """The measures of some elements, a block of float64; squares are too, of which float32 holds too few.

    Args:
        g: gradients, before any factor.
        p, new: weights before and after the update.
        kept: weights as they can be read again, if that is in 16 bits alone; else None.
        inside: which elements the tensor has.
        written: which of them are updated: none if the step is skipped.
        T: has the `measures`.
    """
    change = tl.where(written, new - p, 0.0)
    place = tl.arange(0, _MEASURES)
    block = tl.zeros([_MEASURES], tl.float64)
    if kept is not None:
        lost = tl.sum((written & (change != 0.0) & (kept == p)).to(tl.int32))
        block = tl.where(place == T.measures.lost, lost.to(tl.float64), block)
    update = _sum_of_squares(change, written)
    largest = tl.max(tl.abs(change)).to(tl.float64)
    block = tl.where(place == T.measures.gradient, _sum_of_squares(g, inside), block)
    block = tl.where(place == T.measures.weight, _sum_of_squares(p, inside), block)
    block = tl.where(place == T.measures.update, update, block)
    return tl.where(place == T.measures.largest, tl.where(update != update, update, largest), block)


@device_function
def no_measures():
    """The measures of no elements."""
    return tl.zeros([_MEASURES], tl.float64)


@device_function
def added(a, b, T: tl.constexpr):
    """The measures of two sets of elements together."""
    place = tl.arange(0, _MEASURES)
    return tl.where(place == T.measures.largest, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), a + b)


@device_function
def store_measures(partials, row, piece, block, T: tl.constexpr):
    """Keeps the measures of a piece."""
    place = tl.arange(0, _MEASURES)
    at = partials + tl.load(row + T.row.measures) + piece + place * tl.load(row + T.row.pieces)
    tl.store(at, block, mask=place < T.measures.lost + 1)


@triton.jit
def finish(rows, hyper, partials, T: tl.constexpr, MEASURES: tl.constexpr, BLOCK: tl.constexpr):
    """One measure of one tensor, from those of its pieces."""
    program = tl.program_id(0).to(tl.int64)
    row = rows + program // MEASURES * T.row.length
    place = program % MEASURES
    sums = tl.load(row + T.row.measures_at)
    if sums == 0:
        return
    pieces = tl.load(row + T.row.pieces)
    at = partials + tl.load(row + T.row.measures) + place * pieces
    total = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    for first in loop_range(0, pieces, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(at + offsets, mask=offsets < pieces, other=0.0)
        total += x
        largest = tl.maximum(largest, x)
    measure = tl.sum(total)
    # The sum of all maxima is NaN if one of them is, which a maximum may leave out.
    measure = tl.where((place == T.measures.largest) & (measure == measure), tl.max(largest), measure)
    h = hyper + tl.load(row + T.row.hyper_index) * T.hyper.length
    unscaled_by = load_behind(tl.load(h + T.hyper.measured_grad_scale), tl.float32, 1.0).to(tl.float64)
    factor = load_number(h + T.hyper.measured_scale) / unscaled_by
    measure = tl.where(place == T.measures.gradient, measure * factor * factor, measure)
    tl.store(sums.to(tl.pointer_type(tl.float64)) + place, measure)


def finish_measures(table: LaunchTable, tensors: int, partials: Tensor, tables: Any) -> None:
    """Adds up what the launches of a step left, for the rows that have a place for it.

    Args:
        table: whose rows have the fields of `step.row_record`, and whose hyper-parameters those of `hyper_record`.
        tensors: number of rows.
        partials: what was left, float64.
        tables: `record.Tables` with the places of both.
    """
    measures = len(PLACES)
    finish[(tensors * measures,)](
        table.rows, table.hyper, partials, tables, measures, _BLOCK, num_warps=4, enable_fp_fusion=False
    )


def measuring(tables: Tables, partials: Tensor | None) -> Tables:
    """The tables of kernels that leave measures, if there is memory for them."""
    return tables if partials is None else tables._replace(measures=PLACES)
