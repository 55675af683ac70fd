# mypy: allow-untyped-defs
"""Adafactor's averages of squares over rows and columns of matrices, and what becomes of sums of shards."""

import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels import adafactor_cells as cell
from fusedopt_kernels.adafactor_plan import ENTRIES, PARTIALS
from fusedopt_kernels.adafactor_tiles import running_average
from fusedopt_kernels.device import device_function, div_rn, my_piece, options, walk

THREADS = 128
"""As many as ENTRIES, each of which one thread alone has to have in hand: it is written where it was read."""


@device_function
def _tile_sums(at, tiles, length, entries, mask, COMPUTE: tl.constexpr, ENTRIES: tl.constexpr, PARTIALS: tl.constexpr):
    """Of some entries, the sum over all tiles."""
    total = tl.zeros([PARTIALS, ENTRIES], COMPUTE)
    for tile in walk(0, tiles, PARTIALS):
        tile_and_on = tile + tl.arange(0, PARTIALS)
        some = mask[None, :] & (tile_and_on < tiles)[:, None]
        total += tl.load(at + tile_and_on[:, None] * length + entries[None, :], mask=some, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def averages(
    chunks,
    rows,
    scalars,
    work,
    COMPUTE: tl.constexpr,
    ENTRIES: tl.constexpr,
    PARTIALS: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
):
    """Brings some entries of a matrix's row or column up to date, from what `sums` left; of the rows, keeps the sum.

    In two steps for a shard: `TO="totals"` only adds up what `sums` left, `FROM="totals"` goes on from there.
    """
    index, piece = my_piece(chunks)
    row = rows + index * cell.ROW_LENGTH
    scalar = scalars + index * cell.SCALARS_LENGTH
    if tl.load(scalar + cell.ACTIVE) == 0.0:
        return
    height, width = tl.load(row + cell.HEIGHT), tl.load(row + cell.WIDTH)
    across, down, span = tl.load(row + cell.ACROSS), tl.load(row + cell.DOWN), tl.load(row + cell.SPAN)
    shares = tl.load(row + cell.SHARES)
    pieces = shares + (width + ENTRIES - 1) // ENTRIES
    matrix = piece // pieces
    part = piece % pieces

    of_rows = part < shares
    length = tl.where(of_rows, height, width)
    tiles = tl.where(of_rows, across, down)
    averaged = tl.where(of_rows, tl.load(row + cell.WHOLE_WIDTH), tl.load(row + cell.WHOLE_HEIGHT)).to(COMPUTE)
    first = tl.where(of_rows, part * span, (part - shares) * ENTRIES)
    last = tl.minimum(first + tl.where(of_rows, span, ENTRIES), length)
    behind_rows = tl.where(of_rows, 0, tl.load(row + cell.MATRICES) * across * height)
    partial_sums = work + tl.load(row + cell.SUMS) + behind_rows + matrix * tiles * length
    totals_begin = tl.where(of_rows, tl.load(row + cell.ROW_TOTALS), tl.load(row + cell.COLUMN_TOTALS))
    totals = work + totals_begin + matrix * length
    address = tl.where(of_rows, tl.load(row + cell.ROW), tl.load(row + cell.COL))
    average_at = address.to(tl.pointer_type(COMPUTE)) + matrix * length
    weight = tl.load(scalar + cell.SQUARE_WEIGHT).to(COMPUTE)
    added = tl.load(scalar + cell.ADDED).to(COMPUTE)

    of_averages = tl.zeros([ENTRIES], COMPUTE)
    for start in walk(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        mask = entries < last
        if FROM == "totals":
            total = tl.load(totals + entries, mask=mask, other=0.0)
        else:
            total = _tile_sums(partial_sums, tiles, length, entries, mask, COMPUTE, ENTRIES, PARTIALS)
        if TO == "totals":
            tl.store(totals + entries, total, mask=mask)
        else:
            new = div_rn(total, averaged) + added
            average = running_average(tl.load(average_at + entries, mask=mask, other=0.0), new, weight)
            tl.store(average_at + entries, average, mask=mask)
            of_averages += tl.where(mask, average, 0.0)
    if TO == "averages":
        tl.store(work + tl.load(row + cell.MEANS) + matrix * shares + part, tl.sum(of_averages), mask=of_rows)


def launch_averages(chunks: Tensor, rows: Tensor, scalars: Tensor, work: Tensor, source: str, result: str) -> None:
    """`averages` of the tensors of some chunks, whose arithmetic has the dtype of `work`."""
    compute = tl.float64 if work.dtype.itemsize == 8 else tl.float32
    averages[(len(chunks),)](
        chunks, rows, scalars, work, compute, ENTRIES, PARTIALS, source, result, **options(THREADS)
    )
