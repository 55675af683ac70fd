# mypy: allow-untyped-defs
"""The beginning of every optimizer's step: counts, overflows, and the factor on gradients.

The fields here are part of every optimizer's records; its own come after them.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fusedopt_kernels.device import device_function, load_behind, load_float64, load_number, options
from fusedopt_kernels.record import ADDRESS, FLOAT, INTEGER, NUMBER, TENSOR, Field, Record, Tables
from fusedopt_kernels.storage import rounding_keys, store_keys
from fusedopt_kernels.table import ROWS_PER_PROGRAM, LaunchTable

_ROWS = tl.constexpr(ROWS_PER_PROGRAM)


def row_record(*states: str, **fields: Field) -> Record:
    """A row of an optimizer's table: parameter, gradient, states of the same shape; step count, size, hyper-parameters.

    `master` completes a 16-bit parameter to its weight. `hyper_index` is the row of `hyper` that the update reads.
    Element i of a shard is element `i + i // shard_length * shard_gap + shard_offset` of the whole parameter, on which,
    on the parameter's `number` and on the seed random rounding depends. `pieces` says into how many the update cuts the
    tensor; see `statistics` for `measures` and `measures_at`.
    """
    tensors = {name: TENSOR for name in ("param", "grad", *states, "master")}
    position = {name: INTEGER for name in ("shard_length", "shard_gap", "shard_offset")}
    measures = {"pieces": INTEGER, "measures": INTEGER, "measures_at": ADDRESS}
    one = {"step": ADDRESS, "number": ADDRESS, "numel": INTEGER, "hyper_index": INTEGER}
    return Record(**tensors, **one, **position, **measures, **fields)


def hyper_record(**fields: Field) -> Record:
    """A set of hyper-parameters.

    Gradients are multiplied by `sign * scale` and divided by `grad_scale`. Where `found_inf` is not 0, nothing changes.
    With `shared_steps`, counts go on without a gradient too. Statistics are of gradients before clipping, times
    `measured_scale` and divided by `measured_grad_scale`.
    """
    return Record(
        **{"shared_steps": INTEGER, "sign": FLOAT, "scale": NUMBER, "grad_scale": ADDRESS, "found_inf": ADDRESS},
        **{"measured_scale": NUMBER, "measured_grad_scale": ADDRESS, "seed": INTEGER, "lr": NUMBER},
        **fields,
    )


def scalars_record(*names: str) -> Record:
    """The record that a prologue writes per row: if it is active, the factor on its gradient, the names given; for
    random words their keys, and 1 / `shard_length`."""
    return Record(**{name: FLOAT for name in ("active", "factor", "keys", "one_by_length", *names)})


@device_function
def begin_step(rows, hyper, scalars, T: tl.constexpr):
    """Advances the step count of each of a program's rows, and stores `active` and `factor`.

    Returns where the rows' hyper-parameters are, where their scalars are, and the counts as float64.
    """
    index = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    row = rows + index * T.row.length
    h = hyper + tl.load(row + T.row.hyper_index) * T.hyper.length
    out = scalars + index * T.scalars.length

    finite = load_behind(tl.load(h + T.hyper.found_inf), tl.float32, 0.0) == 0.0
    has_gradient = tl.load(row + T.row.grad) != 0
    step = tl.load(row + T.row.step)
    count = load_behind(step, tl.float64, 0.0) + 1.0
    advances = finite & (step != 0) & (has_gradient | (tl.load(h + T.hyper.shared_steps) != 0))
    tl.store(step.to(tl.pointer_type(tl.float64)), count, mask=advances)

    scale = load_float64(h + T.hyper.sign) * load_number(h + T.hyper.scale)
    unscaled_by = load_behind(tl.load(h + T.hyper.grad_scale), tl.float32, 1.0).to(tl.float64)
    tl.store(out + T.scalars.active, (finite & has_gradient).to(tl.float64))
    tl.store(out + T.scalars.factor, scale / unscaled_by)
    if T.random:
        number = load_behind(tl.load(row + T.row.number), tl.int64, 0)
        key0, key1 = rounding_keys(tl.load(h + T.hyper.seed), number, count)
        store_keys(out + T.scalars.keys, key0, key1)
        tl.store(out + T.scalars.one_by_length, 1.0 / tl.load(row + T.row.shard_length).to(tl.float64))
    return h, out, count


def room_for_scalars(table: LaunchTable, places: Any) -> Tensor:
    """Returns the memory for what a prologue leaves, float64 [rows, scalars]."""
    return table.scratch("scalars", len(table.rows), places.length, dtype=torch.float64)


def run_prologue(prologue: Any, table: LaunchTable, tables: Tables) -> Tensor:
    """Launches a prologue over all rows; returns the scalars that it leaves, float64 [rows, scalars]."""
    scalars = room_for_scalars(table, tables.scalars)
    prologue[(len(table.rows) // ROWS_PER_PROGRAM,)](
        table.rows, table.hyper, scalars, tables, **options(ROWS_PER_PROGRAM)
    )
    return scalars
