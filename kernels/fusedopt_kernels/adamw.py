# mypy: allow-untyped-defs
"""AdamW for all tensors of a table: a prologue over its rows, then one launch per launch class."""

import triton
import triton.language as tl

from fusedopt_kernels import rules
from fusedopt_kernels.device import (
    device_function,
    div_rn,
    dtypes_of_names,
    exp,
    load_float64,
    load_number,
    log,
    sqrt_rn,
)
from fusedopt_kernels.elementwise import (
    Elementwise,
    open_piece,
    pointers,
    pointers_or_none,
    words_of_piece,
)
from fusedopt_kernels.record import FLOAT, NUMBER
from fusedopt_kernels.statistics import measured, store_measures, where_active
from fusedopt_kernels.step import begin_step, hyper_record, row_record, scalars_record
from fusedopt_kernels.storage import load_moment, load_weight, store_moment, store_weight

ROW = row_record("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
HYPER = hyper_record(
    weight_decay=NUMBER,
    eps=NUMBER,
    log_beta1=FLOAT,  # NaN where the prologue works it out: beta is a tensor
    log_beta2=FLOAT,
    beta1=NUMBER,
    beta2=NUMBER,
    decays_update=FLOAT,
    corrects_eps=FLOAT,
)
SCALARS = scalars_record("beta1", "beta2", "decay_step", "step_size", "eps_hat")

_adamw_scalars = device_function(rules.adamw_scalars)
_adam_moments = device_function(rules.adam_moments)
_adamw_update = device_function(rules.adamw_update)


@device_function
def _log_beta(given, beta):
    """The logarithm that the host gives, or that of beta where it gives NaN."""
    return tl.where(given == given, given, log(tl.where(given == given, 0.5, beta)))


@triton.jit
def prologue(rows, hyper, scalars, T: tl.constexpr):
    """Begins the step of each row and works out its scalars, in float64."""
    h, out, count = begin_step(rows, hyper, scalars, T)
    beta1 = load_number(h + T.hyper.beta1)
    beta2 = load_number(h + T.hyper.beta2)
    tl.store(out + T.scalars.beta1, beta1)
    tl.store(out + T.scalars.beta2, beta2)
    decay_step, step_size, eps_hat = _adamw_scalars(
        count,
        load_number(h + T.hyper.lr),
        load_number(h + T.hyper.weight_decay),
        load_number(h + T.hyper.eps),
        _log_beta(load_float64(h + T.hyper.log_beta1), beta1),
        _log_beta(load_float64(h + T.hyper.log_beta2), beta2),
        load_float64(h + T.hyper.decays_update),
        load_float64(h + T.hyper.corrects_eps),
        exp,
        sqrt_rn,
    )
    tl.store(out + T.scalars.decay_step, decay_step)
    tl.store(out + T.scalars.step_size, step_size)
    tl.store(out + T.scalars.eps_hat, eps_hat)


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
    v_at = pointers(row + T.row.exp_avg_sq, S.exp_avg_sq, first, offsets, S)
    raw = tl.load(g_at, mask=mask).to(S.compute)
    g = raw * tl.load(scalar + T.scalars.factor).to(S.compute)
    m = load_moment(m_at, mask, S.compute)
    v = load_moment(v_at, mask, S.compute)
    master_at = pointers_or_none(row + T.row.master, S.master, first, offsets, S)
    p = load_weight(p_at, master_at, mask, S.master, S.compute)
    if S.max_exp_avg_sq is not None:
        h_at = pointers(row + T.row.max_exp_avg_sq, S.max_exp_avg_sq, first, offsets, S)
        h = load_moment(h_at, mask, S.compute)

    beta1 = tl.load(scalar + T.scalars.beta1)
    beta2 = tl.load(scalar + T.scalars.beta2)
    m, v = _adam_moments(
        g, m, v, beta1.to(S.compute), (1.0 - beta1).to(S.compute), beta2.to(S.compute), (1.0 - beta2).to(S.compute)
    )
    store_moment(m, m_at, written, S.exp_avg)
    words = words_of_piece(row, scalar, first, offsets, v, T, S)
    store_moment(v, v_at, written, S.exp_avg_sq, words, S.rounding)
    if S.max_exp_avg_sq is not None:
        v = tl.maximum(h, v, propagate_nan=tl.PropagateNan.ALL)
        store_moment(v, h_at, written, S.max_exp_avg_sq)
    decay_step = tl.load(scalar + T.scalars.decay_step).to(S.compute)
    step_size = tl.load(scalar + T.scalars.step_size).to(S.compute)
    eps_hat = tl.load(scalar + T.scalars.eps_hat).to(S.compute)
    new = _adamw_update(p, m, v, decay_step, step_size, eps_hat, sqrt_rn, div_rn)
    kept = store_weight(new, p_at, master_at, words, written, S.param, S.master, S.rounding)
    if T.measures is not None:
        store_measures(partials, row, first // S.block, measured(raw, p, new, kept, mask, written, T), T)


ADAMW = Elementwise(ROW, HYPER, SCALARS, prologue, update)
