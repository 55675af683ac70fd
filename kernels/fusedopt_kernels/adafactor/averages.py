# mypy: allow-untyped-defs
"""Adafactor's averages of squares over rows and columns of matrices, whole or from the sums of all shards."""

from typing import Any

import triton
import triton.language as tl

from fusedopt_kernels.adafactor.layout import TABLES
from fusedopt_kernels.adafactor.plan import ENTRIES, PARTIALS
from fusedopt_kernels.adafactor.tiles import running_average
from fusedopt_kernels.device import device_function, div_rn, loop_range, my_piece, options

THREADS = 128
"""As many as ENTRIES: a single thread must hold an entry, which is written where it was read."""


def averages_options(wide: int) -> dict[str, Any]:
    """Returns the constants and compile options of the kernels here, for arithmetic in float64 or in float32."""
    compute = tl.float64 if wide else tl.float32
    return {"T": TABLES, "COMPUTE": compute, "ENTRIES": ENTRIES, "PARTIALS": PARTIALS, **options(THREADS)}


@device_function
def _my_lines(chunks, rows, scalars, T: tl.constexpr, ENTRIES: tl.constexpr):
    """The entries of a matrix's row or column sums that this program works on.

    Returns where the row of the table and its scalars are; the matrix, the part of it and whether that is of its rows;
    how many entries there are, the first of this program and the one after its last.
    """
    index, piece = my_piece(chunks)
    row = rows + index * T.row.length
    height, width = tl.load(row + T.row.height), tl.load(row + T.row.width)
    rows_per_program, row_programs = tl.load(row + T.row.rows_per_program), tl.load(row + T.row.row_programs)
    pieces = row_programs + (width + ENTRIES - 1) // ENTRIES
    matrix = piece // pieces
    part = piece % pieces
    is_row = part < row_programs
    length = tl.where(is_row, height, width)
    first = tl.where(is_row, part * rows_per_program, (part - row_programs) * ENTRIES)
    last = tl.minimum(first + tl.where(is_row, rows_per_program, ENTRIES), length)
    return row, scalars + index * T.scalars.length, matrix, part, is_row, length, first, last


@device_function
def _tiles_of(row, partial_sums, matrix, is_row, length, T: tl.constexpr):
    """Where the sums of a matrix's tiles begin, and how many tiles there are."""
    tiles_x, tiles_y = tl.load(row + T.row.tiles_x), tl.load(row + T.row.tiles_y)
    tiles = tl.where(is_row, tiles_x, tiles_y)
    all_row_sums = tl.load(row + T.row.matrices) * tiles_x * tl.load(row + T.row.height)
    behind_rows = tl.where(is_row, 0, all_row_sums)
    return partial_sums + tl.load(row + T.row.partial_sums) + behind_rows + matrix * tiles * length, tiles


@device_function
def _tile_sums(at, tiles, length, entries, mask, COMPUTE: tl.constexpr, ENTRIES: tl.constexpr, PARTIALS: tl.constexpr):
    """The sums of some entries over all tiles."""
    total = tl.zeros([PARTIALS, ENTRIES], COMPUTE)
    for tile in loop_range(0, tiles, PARTIALS):
        tile_and_on = tile + tl.arange(0, PARTIALS)
        some = mask[None, :] & (tile_and_on < tiles)[:, None]
        total += tl.load(at + tile_and_on[:, None] * length + entries[None, :], mask=some, other=0.0)
    return tl.sum(total, axis=0)


@device_function
def _totals_of(row, partial_sums, matrix, is_row, length, T: tl.constexpr):
    """Where the totals of a shard's rows or columns begin."""
    totals = tl.where(is_row, tl.load(row + T.row.row_totals), tl.load(row + T.row.column_totals))
    return partial_sums + totals + matrix * length


@device_function
def _averages_of(row, scalar, matrix, is_row, length, T: tl.constexpr, COMPUTE: tl.constexpr):
    """The arguments of `_average`: addresses of the averages, the count of numbers in each, weight and eps."""
    address = tl.where(is_row, tl.load(row + T.row.exp_avg_sq_row), tl.load(row + T.row.exp_avg_sq_col))
    averaged = tl.where(is_row, tl.load(row + T.row.whole_width), tl.load(row + T.row.whole_height)).to(COMPUTE)
    return (
        address.to(tl.pointer_type(COMPUTE)) + matrix * length,
        averaged,
        tl.load(scalar + T.scalars.square_weight).to(COMPUTE),
        tl.load(scalar + T.scalars.square_eps).to(COMPUTE),
    )


@device_function
def _average(into, entries, mask, total):
    """Brings some averages up to date; returns them, 0 outside of the mask."""
    average_at, averaged, weight, eps = into
    new = div_rn(total, averaged) + eps
    average = running_average(tl.load(average_at + entries, mask=mask, other=0.0), new, weight)
    tl.store(average_at + entries, average, mask=mask)
    return tl.where(mask, average, 0.0)


@triton.jit
def averages(
    chunks,
    rows,
    scalars,
    partial_sums,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ENTRIES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Brings some entries of a matrix's row or column up to date, from what `sums` left; of the rows, keeps the sum."""
    row, scalar, matrix, part, is_row, length, first, last = _my_lines(chunks, rows, scalars, T, ENTRIES)
    if tl.load(scalar + T.scalars.active) == 0.0:
        return
    tiles_at, tiles = _tiles_of(row, partial_sums, matrix, is_row, length, T)
    row_mean = tl.zeros([ENTRIES], COMPUTE)
    for start in loop_range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        mask = entries < last
        total = _tile_sums(tiles_at, tiles, length, entries, mask, COMPUTE, ENTRIES, PARTIALS)
        into = _averages_of(row, scalar, matrix, is_row, length, T, COMPUTE)
        row_mean += _average(into, entries, mask, total)
    row_mean_at = partial_sums + tl.load(row + T.row.row_mean_partials) + matrix * tl.load(row + T.row.row_programs)
    tl.store(row_mean_at + part, tl.sum(row_mean), mask=is_row)


@triton.jit
def shard_totals(
    chunks,
    rows,
    scalars,
    partial_sums,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ENTRIES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """The first half of `averages` for a shard: adds up what `sums` left, to be added up over processes."""
    row, scalar, matrix, _, is_row, length, first, last = _my_lines(chunks, rows, scalars, T, ENTRIES)
    if tl.load(scalar + T.scalars.active) == 0.0:
        return
    tiles_at, tiles = _tiles_of(row, partial_sums, matrix, is_row, length, T)
    totals_at = _totals_of(row, partial_sums, matrix, is_row, length, T)
    for start in loop_range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        mask = entries < last
        total = _tile_sums(tiles_at, tiles, length, entries, mask, COMPUTE, ENTRIES, PARTIALS)
        tl.store(totals_at + entries, total, mask=mask)


@triton.jit
def shard_averages(
    chunks,
    rows,
    scalars,
    partial_sums,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ENTRIES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """The second half: from totals over all processes to averages; of the rows, keeps the sum."""
    row, scalar, matrix, part, is_row, length, first, last = _my_lines(chunks, rows, scalars, T, ENTRIES)
    if tl.load(scalar + T.scalars.active) == 0.0:
        return
    totals_at = _totals_of(row, partial_sums, matrix, is_row, length, T)
    into = _averages_of(row, scalar, matrix, is_row, length, T, COMPUTE)
    row_mean = tl.zeros([ENTRIES], COMPUTE)
    for start in loop_range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        mask = entries < last
        row_mean += _average(into, entries, mask, tl.load(totals_at + entries, mask=mask, other=0.0))
    row_mean_at = partial_sums + tl.load(row + T.row.row_mean_partials) + matrix * tl.load(row + T.row.row_programs)
    tl.store(row_mean_at + part, tl.sum(row_mean), mask=is_row)
