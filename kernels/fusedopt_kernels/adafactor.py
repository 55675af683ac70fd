# mypy: allow-untyped-defs
"""Adafactor for all tensors of a table, in six launches for each dtype class.

    prologue   advances the step counts; works out rates and weights
    sums       reads g, and p for its root mean square: sums of g² over rows and columns of tiles; for vectors and small
               matrices, the averages of squares themselves
    averages   those of matrices
    squares    reads g: the update's sums of squares
    finish     both root mean squares of each tensor; from them, its step size
    apply      reads g and p, writes p

Those that work on next to nothing (`prologue`, `averages`, `finish`) are shared by all classes. So g is read three
times, p twice, once without `scale_parameter`, and written once. The update's mean square is a bilinear form of g², but
its two vectors depend on all of g: hence the second reading. Sums are kept for each piece of a tensor, and added up in
the order of the pieces: two runs give the same bits, whatever else shares the launches. Shards of tensors go through
three more launches, see `adafactor_shards`.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels import adafactor_cells as cell
from fusedopt_kernels import rules
from fusedopt_kernels.adafactor_averages import launch_averages
from fusedopt_kernels.adafactor_plan import SQUARES, Plan, Spec, as_spec, spec_of
from fusedopt_kernels.adafactor_shards import AddUp, Shards, sum_up
from fusedopt_kernels.adafactor_small import small_sums, small_update
from fusedopt_kernels.adafactor_tiles import matrix_sums, matrix_update, vector_apply, vector_sums
from fusedopt_kernels.device import (
    TRITON_DTYPES,
    device_function,
    exp,
    load_behind,
    load_float64,
    load_number,
    log,
    minimum,
    my_piece,
    options,
    piece_of,
    sqrt_rn,
)
from fusedopt_kernels.table import ROWS_PER_PROGRAM, LaunchTable, launch_class

THREADS = 256
"""Of the phases that read gradients."""

_ROWS = tl.constexpr(ROWS_PER_PROGRAM)

_square_weight = device_function(rules.square_weight)
_relative_step = device_function(rules.relative_step)
_scaled_rate = device_function(rules.scaled_rate)
_clip_divisor = device_function(rules.clip_divisor)


@device_function
def _number_maximum(x, y):
    """The larger number; x where y is NaN."""
    return tl.where(y > x, y, x)


@device_function
def _nan_maximum(x, y):
    """The larger number; x where x is NaN."""
    return tl.where(x < y, y, x)


@triton.jit
def prologue(rows, hyper, scalars):
    """Advances the step count of each row and works out what does not depend on its numbers, in float64."""
    index = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    row = rows + index * cell.ROW_LENGTH
    h = hyper + tl.load(row + cell.BATCH) * cell.HYPER_LENGTH
    out = scalars + index * cell.SCALARS_LENGTH

    finite = load_behind(tl.load(h + cell.FOUND_INF), tl.float32, 0.0) == 0.0
    active = finite & (tl.load(row + cell.GRAD) != 0)
    step = tl.load(row + cell.STEP)
    count = load_behind(step, tl.float32, 0.0) + 1.0
    tl.store(step.to(tl.pointer_type(tl.float32)), count, mask=active & (step != 0))

    count = count.to(tl.float64)
    relative = _relative_step(count, load_float64(h + cell.CEILING), load_float64(h + cell.SLOPE), sqrt_rn, minimum)
    lr = load_number(h + cell.LR, h + cell.LR32, h + cell.LR64)
    scale = load_float64(h + cell.SIGN) * load_number(h + cell.SCALE, h + cell.SCALE32, h + cell.SCALE64)
    factor = scale / load_behind(tl.load(h + cell.GRAD_SCALE), tl.float32, 1.0).to(tl.float64)
    tl.store(out + cell.ACTIVE, active.to(tl.float64))
    tl.store(out + cell.FACTOR, factor)
    tl.store(out + cell.RATE, tl.where(tl.load(h + cell.RELATIVE_STEP) != 0, relative, lr))
    tl.store(out + cell.SQUARE_WEIGHT, _square_weight(count, load_float64(h + cell.DECAY_RATE), exp, log))
    tl.store(out + cell.ADDED, load_float64(h + cell.SQUARE_FLOOR))
    tl.store(out + cell.OWN_WEIGHT, load_float64(h + cell.UPDATE_WEIGHT))
    tl.store(out + cell.SCALED, tl.load(h + cell.SCALE_PARAMETER).to(tl.float64))


@triton.jit
def sums(
    chunks,
    rows,
    scalars,
    work,
    kept,
    P: tl.constexpr,
    G: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    LINES: tl.constexpr,
    STRIP: tl.constexpr,
    MEANS: tl.constexpr,
):
    """What one piece of one tensor adds to the averages of squares, and its parameter's sum of squares."""
    SPEC: tl.constexpr = as_spec(P, G, COMPUTE, BLOCK, HALF_BLOCK, TILE_WIDTH, TILE_HEIGHT, LINES, STRIP, MEANS)
    index, piece = my_piece(chunks)
    row = rows + index * cell.ROW_LENGTH
    scalar = scalars + index * cell.SCALARS_LENGTH
    if tl.load(scalar + cell.ACTIVE) == 0.0:
        return
    kind = tl.load(row + cell.KIND)
    even = tl.load(row + cell.EVEN) != 0
    if kind == cell.SMALL:
        small_sums(row, scalar, kept, piece, SPEC)
    elif kind == cell.MATRIX:
        if even:
            matrix_sums(row, scalar, work, kept, piece, SPEC, True)
        else:
            matrix_sums(row, scalar, work, kept, piece, SPEC, False)
    else:
        if even:
            vector_sums(row, scalar, kept, piece, SPEC, True)
        else:
            vector_sums(row, scalar, kept, piece, SPEC, False)


@triton.jit
def finish(chunks, rows, hyper, scalars, kept, BLOCK: tl.constexpr):
    """The root mean squares of one tensor and of its update; from them, how far the update goes."""
    index, _ = my_piece(chunks)
    row = rows + index * cell.ROW_LENGTH
    h = hyper + tl.load(row + cell.BATCH) * cell.HYPER_LENGTH
    scalar = scalars + index * cell.SCALARS_LENGTH
    if tl.load(scalar + cell.ACTIVE) == 0.0:
        return
    numel = tl.load(row + cell.WHOLE_NUMEL).to(tl.float64)
    pieces = tl.load(row + cell.SQUARE_TOTALS_COUNT)
    at = kept + tl.load(row + cell.SQUARE_TOTALS)
    update_rms = sqrt_rn(sum_up(at, pieces, BLOCK) / numel)
    rate = tl.load(scalar + cell.RATE)
    if tl.load(scalar + cell.SCALED) != 0.0:
        rms = sqrt_rn(sum_up(at + pieces, pieces, BLOCK) / numel)
        rate = _scaled_rate(rate, rms, load_float64(h + cell.RMS_FLOOR), _number_maximum)
        at32 = tl.load(row + cell.RMS32)
        at64 = tl.load(row + cell.RMS64)
        tl.store(at32.to(tl.pointer_type(tl.float32)), rms.to(tl.float32), mask=at32 != 0)
        tl.store(at64.to(tl.pointer_type(tl.float64)), rms, mask=at64 != 0)
    tl.store(
        scalar + cell.STEP_SIZE, rate / _clip_divisor(update_rms, load_float64(h + cell.CLIP_THRESHOLD), _nan_maximum)
    )
    tl.store(scalar + cell.SHRINK, rate * load_float64(h + cell.WEIGHT_DECAY))


@triton.jit
def update(
    chunks,
    rows,
    scalars,
    work,
    kept,
    P: tl.constexpr,
    G: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    LINES: tl.constexpr,
    STRIP: tl.constexpr,
    MEANS: tl.constexpr,
    APPLY: tl.constexpr,
):
    """The sum of squares of one piece of one tensor's update, or with APPLY, updates it. A vector's square is known."""
    SPEC: tl.constexpr = as_spec(P, G, COMPUTE, BLOCK, HALF_BLOCK, TILE_WIDTH, TILE_HEIGHT, LINES, STRIP, MEANS)
    program = tl.program_id(0)
    if not APPLY:
        program = tl.num_programs(0) - 1 - program  # backwards: what `sums` read last may still be in the cache
    index, piece = piece_of(chunks, program)
    row = rows + index * cell.ROW_LENGTH
    scalar = scalars + index * cell.SCALARS_LENGTH
    if tl.load(scalar + cell.ACTIVE) == 0.0:
        return
    kind = tl.load(row + cell.KIND)
    even = tl.load(row + cell.EVEN) != 0
    if kind == cell.SMALL:
        small_update(row, scalar, kept, piece, SPEC, APPLY)
    elif kind == cell.MATRIX:
        if even:
            matrix_update(row, scalar, work, kept, piece, SPEC, True, APPLY)
        else:
            matrix_update(row, scalar, work, kept, piece, SPEC, False, APPLY)
    elif APPLY:
        if even:
            vector_apply(row, scalar, piece, SPEC, True)
        else:
            vector_apply(row, scalar, piece, SPEC, False)


def adafactor(table: LaunchTable, keys: np.ndarray, plan: Plan, add_up: AddUp | None = None) -> None:
    """One step of all tensors of a table.

    Args:
        table: rows of `adafactor_cells.COLUMNS`; hyper rows of `Numbers`, as bits, and `REFERENCES`.
        keys: int64 [tensors], the dtype class of each row: `launch_keys` of parameter and gradient.
        plan: of the same tensors.
        add_up: puts the sums over all processes that have a share in the place of local sums; for a plan with shards.
    """
    batch = plan.batch << _BATCH_SHIFT
    pieces = table.chunks("pieces", keys | batch, plan.pieces)
    averaged = table.chunks("averages", plan.in_float64 | batch, plan.averages)
    matrices = table.chunks("squares", keys | batch, plan.matrix_pieces)
    whole = table.chunks("finish", batch, plan.whole)

    scalars = table.scratch("scalars", len(table.rows), cell.SCALARS_LENGTH.value, dtype=torch.float64)
    kept = table.scratch("squares", plan.squares, dtype=torch.float64)
    work = [table.scratch(f"work {d}", n, dtype=d) for d, n in zip((torch.float32, torch.float64), plan.work)]
    shards = Shards(table, plan, scalars, work, kept, add_up)

    prologue[(len(table.rows) // ROWS_PER_PROGRAM,)](table.rows, table.hyper, scalars, **options(ROWS_PER_PROGRAM))
    for number in sorted(set(plan.batch.tolist())):
        for key, chunks in _of_batch(pieces, number):
            spec, wide = _spec(key)
            sums[(len(chunks),)](chunks, table.rows, scalars, work[wide], kept, *spec, **options(THREADS))
        for key, chunks in _of_batch(averaged, number):
            launch_averages(chunks, table.rows, scalars, work[key], "tiles", "averages")
        shards.averages()
        for key, chunks in _of_batch(matrices, number):
            spec, wide = _spec(key)
            update[(len(chunks),)](chunks, table.rows, scalars, work[wide], kept, *spec, False, **options(THREADS))
        shards.squares()
        for _, chunks in _of_batch(whole, number):
            finish[(len(chunks),)](chunks, table.rows, table.hyper, scalars, kept, SQUARES, enable_fp_fusion=False)
        for key, chunks in _of_batch(pieces, number):
            spec, wide = _spec(key)
            update[(len(chunks),)](chunks, table.rows, scalars, work[wide], kept, *spec, True, **options(THREADS))


_BATCH_SHIFT = 16


def _of_batch(launches: dict[int, Tensor], number: int) -> list[tuple[int, Tensor]]:
    """Key and chunks of each launch of a batch."""
    return [(key % (1 << _BATCH_SHIFT), chunks) for key, chunks in launches.items() if key >> _BATCH_SHIFT == number]


def _spec(key: int) -> tuple[Spec, bool]:
    """What a launch is compiled for, and whether it computes in float64."""
    (param, grad), _ = launch_class(key, 2)
    assert param is not None and grad is not None
    wide = param is torch.float64
    compute = tl.float64 if wide else tl.float32
    return spec_of(TRITON_DTYPES[param], TRITON_DTYPES[grad], compute, grad.itemsize), wide
