# mypy: allow-untyped-defs
"""Lion for all tensors of a table: a prologue over its rows, then one launch per launch class."""

import triton
import triton.language as tl

from fusedopt_kernels import rules
from fusedopt_kernels.device import device_function, dtypes_of_names, load_number, sign
from fusedopt_kernels.elementwise import (
    Elementwise,
    open_piece,
    pointers,
    pointers_or_none,
    words_of_piece,
)
from fusedopt_kernels.record import NUMBER
from fusedopt_kernels.statistics import measured, store_measures, where_active
from fusedopt_kernels.step import begin_step, hyper_record, row_record, scalars_record
from fusedopt_kernels.storage import load_moment, load_weight, store_moment, store_weight

_running_average = device_function(rules.running_average)
_lion_update = device_function(rules.lion_update)


@triton.jit
def prologue(rows, hyper, scalars, T: tl.constexpr):
    """Begins the step of each row and brings it its hyper-parameters."""
    h, out, _ = begin_step(rows, hyper, scalars, T)
    tl.store(out + T.scalars.lr, load_number(h + T.hyper.lr))
    tl.store(out + T.scalars.weight1, 1.0 - load_number(h + T.hyper.beta1))
    tl.store(out + T.scalars.weight2, 1.0 - load_number(h + T.hyper.beta2))
    tl.store(out + T.scalars.weight_decay, load_number(h + T.hyper.weight_decay))


@triton.jit
def update(chunks, rows, scalars, partials, T: tl.constexpr, A: tl.constexpr):
    """One piece of one tensor."""
    S: tl.constexpr = dtypes_of_names(A)
    index, row, first, offsets, mask = open_piece(chunks, rows, T, S)
    scalar = scalars + index * T.scalars.length
    active = tl.load(scalar + T.scalars.active)
    written = mask
    if T.measures is not None:
        written = where_active(mask, active)
        active = tl.load(row + T.row.measures_at)  # skipped steps are measured, too
    if active == 0:
        return
    p_at = pointers(row + T.row.param, S.param, first, offsets, S)
    g_at = pointers(row + T.row.grad, S.grad, first, offsets, S)
    m_at = pointers(row + T.row.exp_avg, S.exp_avg, first, offsets, S)
    raw = tl.load(g_at, mask=mask).to(S.compute)
    g = raw * tl.load(scalar + T.scalars.factor).to(S.compute)
    m = load_moment(m_at, mask, S.compute)
    master_at = pointers_or_none(row + T.row.master, S.master, first, offsets, S)
    p = load_weight(p_at, master_at, mask, S.master, S.compute)

    direction = _running_average(m, g, tl.load(scalar + T.scalars.weight1).to(S.compute))
    m = _running_average(m, g, tl.load(scalar + T.scalars.weight2).to(S.compute))
    lr = tl.load(scalar + T.scalars.lr).to(S.compute)
    weight_decay = tl.load(scalar + T.scalars.weight_decay).to(S.compute)
    store_moment(m, m_at, written, S.exp_avg)
    new = _lion_update(p, direction, lr, weight_decay, sign)
    words = words_of_piece(row, scalar, first, offsets, new, T, S)
    kept = store_weight(new, p_at, master_at, words, written, S.param, S.master, S.rounding)
    if T.measures is not None:
        store_measures(partials, row, first // S.block, measured(raw, p, new, kept, mask, written, T), T)


LION = Elementwise(
    row_record("exp_avg"),
    hyper_record(beta1=NUMBER, beta2=NUMBER, weight_decay=NUMBER),
    scalars_record("lr", "weight1", "weight2", "weight_decay"),
    prologue,
    update,
)
