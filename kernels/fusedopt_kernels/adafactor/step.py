# mypy: allow-untyped-defs
"""Adafactor for all tensors of a table, in six phases: six launches where there is one launch class.

    prologue   advances the step counts; works out rates and weights
    sums       reads g, and p for its root mean square: sums of g² over rows and columns of tiles; for vectors and small
               matrices, writes the averages themselves (exp_avg_sq; exp_avg_sq_row and exp_avg_sq_col)
    averages   those of larger matrices: writes exp_avg_sq_row and exp_avg_sq_col (of shards, `shard_averages` does)
    squares    reads g: the update's sums of squares
    finish     both root mean squares of each tensor, and writes RMS; from them, its step size
    apply      reads g and p, writes p, and exp_avg where there is one

`prologue` and `finish` are one launch for all tensors, `averages` one per precision of the arithmetic, the others one
per launch class. g is read three times, p twice (once without `scale_parameter`), and p is written once. The update's
mean square is a bilinear form of g², but its two vectors depend on all of g: hence the second reading. Sums are kept
for each piece of a tensor, and added up in the order of the pieces: two runs give the same bits, whatever else shares
the launches. `layout` shows the workspace that phases hand sums on in. Shards of tensors go through three more
launches, see `shards`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels import rules
from fusedopt_kernels.adafactor.averages import averages, averages_options
from fusedopt_kernels.adafactor.layout import MATRIX, SMALL, TABLES
from fusedopt_kernels.adafactor.plan import SQUARES, Plan, access_of, as_spec, sizes_of
from fusedopt_kernels.adafactor.shards import AllReduce, ShardPhases, sum_up
from fusedopt_kernels.adafactor.small import small_sums, small_update
from fusedopt_kernels.adafactor.tiles import matrix_sums, matrix_update, vector_apply, vector_sums
from fusedopt_kernels.device import (
    device_function,
    dtype_name,
    exp,
    load_float64,
    load_number,
    log,
    minimum,
    my_piece,
    options,
    piece_of,
    sqrt_rn,
)
from fusedopt_kernels.statistics import measuring
from fusedopt_kernels.step import begin_step, room_for_scalars, run_prologue
from fusedopt_kernels.table import LaunchTable, launch_class

THREADS = 256
"""Threads of a program of the phases that read gradients."""

_square_weight = device_function(rules.square_weight)
_relative_step = device_function(rules.relative_step)
_scaled_rate = device_function(rules.scaled_rate)
_clip_divisor = device_function(rules.clip_divisor)


@device_function
def _fmax(x, y):
    """The larger number; x where y is NaN."""
    return tl.where(y > x, y, x)


@device_function
def _maximum(x, y):
    """The larger number; x where x is NaN."""
    return tl.where(x < y, y, x)


@triton.jit
def prologue(rows, hyper, scalars, T: tl.constexpr):
    """Begins the step of each row and works out what does not depend on its elements, in float64."""
    h, out, count = begin_step(rows, hyper, scalars, T)
    relative = _relative_step(
        count, load_float64(h + T.hyper.ceiling), load_float64(h + T.hyper.slope), sqrt_rn, minimum
    )
    lr = load_number(h + T.hyper.lr)
    tl.store(out + T.scalars.rate, tl.where(tl.load(h + T.hyper.relative_step) != 0, relative, lr))
    square_weight = _square_weight(count, load_float64(h + T.hyper.decay_rate), exp, log)
    tl.store(out + T.scalars.square_weight, square_weight)
    tl.store(out + T.scalars.square_eps, load_number(h + T.hyper.square_eps))
    tl.store(out + T.scalars.one_minus_beta1, 1.0 - load_number(h + T.hyper.beta1))
    tl.store(out + T.scalars.scale_parameter, tl.load(h + T.hyper.scale_parameter).to(tl.float64))


@triton.jit
def sums(
    chunks,
    rows,
    scalars,
    partial_sums,
    square_partials,
    T: tl.constexpr,
    SIZES: tl.constexpr,
    A: tl.constexpr,
):
    """The contribution of one piece of a tensor to the averages of squares, and its parameter's sum of squares."""
    SPEC: tl.constexpr = as_spec(T, SIZES, A)
    index, piece = my_piece(chunks)
    row = rows + index * SPEC.row.length
    scalar = scalars + index * SPEC.scalars.length
    if tl.load(scalar + SPEC.scalars.active) == 0.0:
        return
    kind = tl.load(row + SPEC.row.kind)
    aligned = tl.load(row + SPEC.row.aligned) != 0
    if kind == SMALL:
        small_sums(row, scalar, square_partials, piece, SPEC)
    elif kind == MATRIX:
        if aligned:
            matrix_sums(row, scalar, partial_sums, square_partials, piece, SPEC, True)
        else:
            matrix_sums(row, scalar, partial_sums, square_partials, piece, SPEC, False)
    else:
        if aligned:
            vector_sums(row, scalar, square_partials, piece, SPEC, True)
        else:
            vector_sums(row, scalar, square_partials, piece, SPEC, False)


@triton.jit
def squares(
    chunks,
    rows,
    scalars,
    partial_sums,
    square_partials,
    T: tl.constexpr,
    SIZES: tl.constexpr,
    A: tl.constexpr,
):
    """The sum of squares of one piece of one tensor's update; a vector's is known from `sums`."""
    SPEC: tl.constexpr = as_spec(T, SIZES, A)
    # Backwards: what `sums` read last may still be in the cache.
    index, piece = piece_of(chunks, tl.num_programs(0) - 1 - tl.program_id(0))
    row = rows + index * SPEC.row.length
    scalar = scalars + index * SPEC.scalars.length
    if tl.load(scalar + SPEC.scalars.active) == 0.0:
        return
    kind = tl.load(row + SPEC.row.kind)
    aligned = tl.load(row + SPEC.row.aligned) != 0
    if kind == SMALL:
        small_update(row, scalar, square_partials, piece, SPEC, False)
    elif kind == MATRIX:
        if aligned:
            matrix_update(row, scalar, partial_sums, square_partials, piece, SPEC, True, False)
        else:
            matrix_update(row, scalar, partial_sums, square_partials, piece, SPEC, False, False)


@triton.jit
def finish(chunks, rows, hyper, scalars, square_partials, T: tl.constexpr, BLOCK: tl.constexpr):
    """The root mean squares of one tensor and of its update; from them, how far the update goes."""
    index, _ = my_piece(chunks)
    row = rows + index * T.row.length
    h = hyper + tl.load(row + T.row.hyper_index) * T.hyper.length
    scalar = scalars + index * T.scalars.length
    if tl.load(scalar + T.scalars.active) == 0.0:
        return
    numel = tl.load(row + T.row.whole_numel).to(tl.float64)
    count = tl.load(row + T.row.square_totals_count)
    at = square_partials + tl.load(row + T.row.square_totals)
    update_rms = sqrt_rn(sum_up(at, count, BLOCK) / numel)
    rate = tl.load(scalar + T.scalars.rate)
    if tl.load(scalar + T.scalars.scale_parameter) != 0.0:
        rms = sqrt_rn(sum_up(at + count, count, BLOCK) / numel)
        rate = _scaled_rate(rate, rms, load_number(h + T.hyper.rms_eps), _fmax)
        at32 = tl.load(row + T.row.rms32)
        at64 = tl.load(row + T.row.rms64)
        tl.store(at32.to(tl.pointer_type(tl.float32)), rms.to(tl.float32), mask=at32 != 0)
        tl.store(at64.to(tl.pointer_type(tl.float64)), rms, mask=at64 != 0)
    divisor = _clip_divisor(update_rms, load_float64(h + T.hyper.clip_threshold), _maximum)
    tl.store(scalar + T.scalars.step_size, rate / divisor)
    tl.store(scalar + T.scalars.decay_step, rate * load_number(h + T.hyper.weight_decay))


@triton.jit
def apply(
    chunks,
    rows,
    scalars,
    partial_sums,
    partials,
    T: tl.constexpr,
    SIZES: tl.constexpr,
    A: tl.constexpr,
):
    """Updates one piece of one tensor; leaves its measures in `partials`."""
    SPEC: tl.constexpr = as_spec(T, SIZES, A)
    index, piece = my_piece(chunks)
    row = rows + index * SPEC.row.length
    scalar = scalars + index * SPEC.scalars.length
    active = tl.load(scalar + SPEC.scalars.active)
    if SPEC.measures is not None:
        active = tl.load(row + SPEC.row.measures_at)  # skipped steps are measured, too
    if active == 0:
        return
    kind = tl.load(row + SPEC.row.kind)
    aligned = tl.load(row + SPEC.row.aligned) != 0
    if kind == SMALL:
        small_update(row, scalar, partials, piece, SPEC, True)
    elif kind == MATRIX:
        if aligned:
            matrix_update(row, scalar, partial_sums, partials, piece, SPEC, True, True)
        else:
            matrix_update(row, scalar, partial_sums, partials, piece, SPEC, False, True)
    else:
        if aligned:
            vector_apply(row, scalar, partials, piece, SPEC, True)
        else:
            vector_apply(row, scalar, partials, piece, SPEC, False)


Launches = dict[int, Tensor]
"""Chunks of the launches of a phase, by what they are compiled for."""


class Room(NamedTuple):
    """The memory that a step works in, with the launches that share it.

    Attributes:
        pieces, averages, squares, tensors, update: launches over pieces that read gradients, over rows and columns,
            over pieces of matrices, over tensors, and over the pieces that are updated.
        scalars: float64, what the prologue leaves for each row.
        partial_sums: of float32 and of float64 arithmetic.
        square_partials: float64.
        shards: the extra work for shards.
    """

    pieces: Launches
    averages: Launches
    squares: Launches
    tensors: Launches
    update: Launches
    scalars: Tensor
    partial_sums: list[Tensor]
    square_partials: Tensor
    shards: ShardPhases


def make_room(
    table: LaunchTable, keys: np.ndarray, plan: Plan, all_reduce: AllReduce | None = None, measured: bool = False
) -> Room:
    """Makes the memory that a step works in; takes what `adafactor` takes. A table on "meta" tells how much it is."""
    scalars = room_for_scalars(table, TABLES.scalars)
    square_partials = table.scratch("square_partials", plan.square_partials, dtype=torch.float64)
    dtypes = torch.float32, torch.float64
    partial_sums = [table.scratch(f"partial_sums {d}", n, dtype=d) for d, n in zip(dtypes, plan.partial_sums)]
    pieces = table.chunks("pieces", keys, plan.pieces)
    return Room(
        pieces,
        table.chunks("averages", plan.in_float64, plan.averages),
        table.chunks("squares", keys, plan.matrix_pieces),
        table.chunks("finish", np.zeros_like(keys), plan.whole),
        table.chunks("measured pieces", keys, plan.pieces) if measured else pieces,
        scalars,
        partial_sums,
        square_partials,
        ShardPhases(table, plan, scalars, partial_sums, square_partials, all_reduce),
    )


def adafactor(
    table: LaunchTable,
    keys: np.ndarray,
    plan: Plan,
    all_reduce: AllReduce | None = None,
    partials: Tensor | None = None,
) -> None:
    """One step of all tensors of a table.

    Args:
        table: rows of `layout.ROW`, sets of hyper-parameters of `layout.HYPER`.
        keys: int64 [tensors], the launch class of each row, see `plan.access_of`.
        plan: of the same tensors.
        all_reduce: puts the sums over all processes that have a share in the place of local sums; for a plan with
            shards.
        partials: memory for the measures of all pieces; None: there are to be none.
    """
    # First: a captured step whose launches cannot be captured is refused before anything is queued.
    room = make_room(table, keys, plan, all_reduce, measured=partials is not None)
    scalars, partial_sums, square_partials = room.scalars, room.partial_sums, room.square_partials
    random = any(access_of(key).rounding for key in set(keys.tolist()))
    run_prologue(prologue, table, TABLES._replace(random=random))

    for key, chunks in room.pieces.items():
        constants, wide = _constants(key)
        arguments = table.rows, scalars, partial_sums[wide], square_partials, *constants
        sums[(len(chunks),)](chunks, *arguments, **options(THREADS))
    for wide, chunks in room.averages.items():
        averages[(len(chunks),)](chunks, table.rows, scalars, partial_sums[wide], **averages_options(wide))
    room.shards.averages()
    for key, chunks in room.squares.items():
        constants, wide = _constants(key)
        arguments = table.rows, scalars, partial_sums[wide], square_partials, *constants
        squares[(len(chunks),)](chunks, *arguments, **options(THREADS))
    room.shards.squares()
    for chunks in room.tensors.values():
        tables = table.rows, table.hyper
        finish[(len(chunks),)](chunks, *tables, scalars, square_partials, TABLES, SQUARES, enable_fp_fusion=False)
    for key, chunks in room.update.items():
        (tables, *others), wide = _constants(key)
        constants = measuring(tables, partials), *others
        arguments = table.rows, scalars, partial_sums[wide], partials, *constants
        apply[(len(chunks),)](chunks, *arguments, **options(THREADS))


def _constants(key: int) -> tuple[tuple[Any, ...], int]:
    """The constexpr arguments of a launch; and 1 if it computes in float64, else 0."""
    access = access_of(key)
    grad = launch_class(key, 2).dtypes[1]
    assert grad is not None
    return (TABLES, sizes_of(grad.itemsize), access), int(access.compute == dtype_name(torch.float64))
