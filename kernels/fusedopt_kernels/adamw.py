# mypy: allow-untyped-defs
"""AdamW for all tensors of a table: a prologue over its rows, then one launch per launch class."""

import numpy as np
import triton
import triton.language as tl

from fusedopt_kernels import rules
from fusedopt_kernels.device import (
    device_function,
    div_rn,
    exp,
    load_float64,
    load_number,
    load_pointer,
    narrow,
    sqrt_rn,
)
from fusedopt_kernels.elementwise import launch_elementwise, open_piece
from fusedopt_kernels.record import FLOAT, Tables
from fusedopt_kernels.step import begin_step, hyper_record, row_record, run_prologue, scalars_record
from fusedopt_kernels.table import LaunchTable

ROW = row_record("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
HYPER = hyper_record(
    weight_decay=FLOAT,
    eps=FLOAT,
    log_beta1=FLOAT,
    log_beta2=FLOAT,
    beta1=FLOAT,
    beta2=FLOAT,
    decays_update=FLOAT,
    corrects_eps=FLOAT,
)
SCALARS = scalars_record("beta1", "beta2", "shrink", "step_size", "eps_hat")
TABLES = Tables(ROW.places, HYPER.places, SCALARS.places)

_adamw_scalars = device_function(rules.adamw_scalars)
_adam_moments = device_function(rules.adam_moments)
_adamw_update = device_function(rules.adamw_update)


@triton.jit
def prologue(rows, hyper, scalars, T: tl.constexpr):
    """Begins the step of each row and works out its scalars, in float64."""
    h, out, count = begin_step(rows, hyper, scalars, T)
    shrink, step_size, eps_hat = _adamw_scalars(
        count,
        load_number(h + T.hyper.lr),
        load_float64(h + T.hyper.weight_decay),
        load_float64(h + T.hyper.eps),
        load_float64(h + T.hyper.log_beta1),
        load_float64(h + T.hyper.log_beta2),
        load_float64(h + T.hyper.decays_update),
        load_float64(h + T.hyper.corrects_eps),
        exp,
        sqrt_rn,
    )
    tl.store(out + T.scalars.beta1, load_float64(h + T.hyper.beta1))
    tl.store(out + T.scalars.beta2, load_float64(h + T.hyper.beta2))
    tl.store(out + T.scalars.shrink, shrink)
    tl.store(out + T.scalars.step_size, step_size)
    tl.store(out + T.scalars.eps_hat, eps_hat)


@triton.jit
def update(
    chunks,
    rows,
    scalars,
    T: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one tensor. P, G, M, V, H: dtypes of parameter, gradient and state; H is None without amsgrad."""
    index, row, first, offsets, mask = open_piece(chunks, rows, T, ALIGNED, BLOCK)
    scalar = scalars + index * T.scalars.length
    if tl.load(scalar + T.scalars.active) == 0.0:
        return
    p_at = load_pointer(row + T.row.param, P, ALIGNED, VECTOR_WIDTH) + first + offsets
    g_at = load_pointer(row + T.row.grad, G, ALIGNED, VECTOR_WIDTH) + first + offsets
    m_at = load_pointer(row + T.row.exp_avg, M, ALIGNED, VECTOR_WIDTH) + first + offsets
    v_at = load_pointer(row + T.row.exp_avg_sq, V, ALIGNED, VECTOR_WIDTH) + first + offsets
    g = tl.load(g_at, mask=mask).to(COMPUTE) * tl.load(scalar + T.scalars.factor).to(COMPUTE)
    m = tl.load(m_at, mask=mask).to(COMPUTE)
    v = tl.load(v_at, mask=mask).to(COMPUTE)
    p = tl.load(p_at, mask=mask).to(COMPUTE)
    if H is not None:
        h_at = load_pointer(row + T.row.max_exp_avg_sq, H, ALIGNED, VECTOR_WIDTH) + first + offsets
        h = tl.load(h_at, mask=mask).to(COMPUTE)

    beta1 = tl.load(scalar + T.scalars.beta1)
    beta2 = tl.load(scalar + T.scalars.beta2)
    m, v = _adam_moments(
        g, m, v, beta1.to(COMPUTE), (1.0 - beta1).to(COMPUTE), beta2.to(COMPUTE), (1.0 - beta2).to(COMPUTE)
    )
    tl.store(m_at, narrow(m, M), mask=mask)
    tl.store(v_at, narrow(v, V), mask=mask)
    if H is not None:
        v = tl.maximum(h, v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(h_at, narrow(v, H), mask=mask)
    shrink = tl.load(scalar + T.scalars.shrink).to(COMPUTE)
    step_size = tl.load(scalar + T.scalars.step_size).to(COMPUTE)
    eps_hat = tl.load(scalar + T.scalars.eps_hat).to(COMPUTE)
    p = _adamw_update(p, m, v, shrink, step_size, eps_hat, sqrt_rn, div_rn)
    tl.store(p_at, narrow(p, P), mask=mask)


def adamw(table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> None:
    """One step of all tensors of a table.

    Args:
        table: rows of `ROW`, sets of hyper-parameters of `HYPER`.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
    """
    scalars = run_prologue(prologue, table, TABLES)
    launch_elementwise(update, "update", table, ROW, keys, numel, (table.rows, scalars, TABLES))
