# mypy: allow-untyped-defs
"""AdamW for all tensors of a table: a prologue over its rows, then one launch per launch class."""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from fusedopt_kernels import rules
from fusedopt_kernels.device import (
    TRITON_DTYPES,
    device_function,
    div_rn,
    exp,
    load_behind,
    load_float64,
    load_number,
    load_pointer,
    load_size,
    my_piece,
    narrow,
    options,
    sqrt_rn,
)
from fusedopt_kernels.table import ROWS_PER_PROGRAM, LaunchTable, launch_class

COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "numel", "batch")
"""A row of the table: addresses (0: no such tensor; the first five walked over together), sizes, row of `hyper`."""

TENSORS = 5


class Numbers(NamedTuple):
    """The float64 of a row of `hyper`. `scale` and `sign` are factors of the gradient."""

    lr: float
    weight_decay: float
    eps: float
    log_beta1: float
    log_beta2: float
    beta1: float
    beta2: float
    decays_update: float
    corrects_eps: float
    scale: float
    sign: float


REFERENCES = ("shared_steps", "lr32", "lr64", "scale32", "scale64", "grad_scale", "found_inf")
"""The int64 behind them: a flag, and addresses of numbers on the device (0: there is none)."""

BLOCK = 2048
THREADS = 256
"""A program's work: 8 elements per thread, which is two 128-bit accesses to a float32 tensor, one to a bfloat16 one."""

_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _STEP, _NUMEL, _BATCH = map(tl.constexpr, range(8))
_COLUMNS = tl.constexpr(len(COLUMNS))
_LR, _WEIGHT_DECAY, _EPS, _LOG_BETA1, _LOG_BETA2, _BETA1, _BETA2 = map(tl.constexpr, range(7))
_DECAYS_UPDATE, _CORRECTS_EPS, _SCALE, _SIGN = map(tl.constexpr, range(7, 11))
_SHARED_STEPS, _LR32, _LR64, _SCALE32, _SCALE64, _GRAD_SCALE, _FOUND_INF = map(tl.constexpr, range(11, 18))
_HYPER = tl.constexpr(len(Numbers._fields) + len(REFERENCES))
_ACTIVE, _FACTOR, _B1, _B2, _SHRINK, _STEP_SIZE, _EPS_HAT = map(tl.constexpr, range(7))
_SCALARS = tl.constexpr(8)
_ROWS = tl.constexpr(ROWS_PER_PROGRAM)

_adamw_scalars = device_function(rules.adamw_scalars)
_adam_moments = device_function(rules.adam_moments)
_adamw_update = device_function(rules.adamw_update)


@triton.jit
def prologue(rows, hyper, scalars):
    """Advances the step count of each row and works out its scalars, in float64."""
    index = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    row = rows + index * _COLUMNS
    h = hyper + tl.load(row + _BATCH) * _HYPER
    out = scalars + index * _SCALARS

    finite = load_behind(tl.load(h + _FOUND_INF), tl.float32, 0.0) == 0.0
    active = finite & (tl.load(row + _GRAD) != 0)
    step = tl.load(row + _STEP)
    count = load_behind(step, tl.float32, 0.0) + 1.0
    advanced = finite & (step != 0) & ((tl.load(row + _GRAD) != 0) | (tl.load(h + _SHARED_STEPS) != 0))
    tl.store(step.to(tl.pointer_type(tl.float32)), count, mask=advanced)

    shrink, step_size, eps_hat = _adamw_scalars(
        count.to(tl.float64),
        load_number(h + _LR, h + _LR32, h + _LR64),
        load_float64(h + _WEIGHT_DECAY),
        load_float64(h + _EPS),
        load_float64(h + _LOG_BETA1),
        load_float64(h + _LOG_BETA2),
        load_float64(h + _DECAYS_UPDATE),
        load_float64(h + _CORRECTS_EPS),
        exp,
        sqrt_rn,
    )
    scale = load_float64(h + _SIGN) * load_number(h + _SCALE, h + _SCALE32, h + _SCALE64)
    tl.store(out + _ACTIVE, active.to(tl.float64))
    tl.store(out + _FACTOR, scale / load_behind(tl.load(h + _GRAD_SCALE), tl.float32, 1.0).to(tl.float64))
    tl.store(out + _B1, load_float64(h + _BETA1))
    tl.store(out + _B2, load_float64(h + _BETA2))
    tl.store(out + _SHRINK, shrink)
    tl.store(out + _STEP_SIZE, step_size)
    tl.store(out + _EPS_HAT, eps_hat)


@triton.jit
def update(
    chunks,
    rows,
    scalars,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one tensor. P, G, M, V, H: dtypes of parameter, gradient and state; H is None without amsgrad."""
    index, piece = my_piece(chunks)
    row = rows + index * _COLUMNS
    scalar = scalars + index * _SCALARS
    if tl.load(scalar + _ACTIVE) == 0.0:
        return
    # One int64 base per tensor and small offsets to it take fewer registers than an int64 address per element.
    start = piece * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < load_size(row + _NUMEL, EVEN) - start
    p_at = load_pointer(row + _PARAM, P, EVEN, TOGETHER) + start + offsets
    g_at = load_pointer(row + _GRAD, G, EVEN, TOGETHER) + start + offsets
    m_at = load_pointer(row + _EXP_AVG, M, EVEN, TOGETHER) + start + offsets
    v_at = load_pointer(row + _EXP_AVG_SQ, V, EVEN, TOGETHER) + start + offsets
    g = tl.load(g_at, mask=mask).to(COMPUTE) * tl.load(scalar + _FACTOR).to(COMPUTE)
    m = tl.load(m_at, mask=mask).to(COMPUTE)
    v = tl.load(v_at, mask=mask).to(COMPUTE)
    p = tl.load(p_at, mask=mask).to(COMPUTE)
    if H is not None:
        h_at = load_pointer(row + _MAX_EXP_AVG_SQ, H, EVEN, TOGETHER) + start + offsets
        h = tl.load(h_at, mask=mask).to(COMPUTE)

    beta1 = tl.load(scalar + _B1)
    beta2 = tl.load(scalar + _B2)
    m, v = _adam_moments(
        g, m, v, beta1.to(COMPUTE), (1.0 - beta1).to(COMPUTE), beta2.to(COMPUTE), (1.0 - beta2).to(COMPUTE)
    )
    tl.store(m_at, narrow(m, M), mask=mask)
    tl.store(v_at, narrow(v, V), mask=mask)
    if H is not None:
        v = tl.maximum(h, v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(h_at, narrow(v, H), mask=mask)
    shrink = tl.load(scalar + _SHRINK).to(COMPUTE)
    step_size = tl.load(scalar + _STEP_SIZE).to(COMPUTE)
    eps_hat = tl.load(scalar + _EPS_HAT).to(COMPUTE)
    p = _adamw_update(p, m, v, shrink, step_size, eps_hat, sqrt_rn, div_rn)
    tl.store(p_at, narrow(p, P), mask=mask)


def adamw(table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> None:
    """One step of all tensors of a table.

    Args:
        table: rows of `COLUMNS`; hyper rows of `Numbers`, as bits, and `REFERENCES`.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
    """
    launches = table.chunks("update", keys, -(-numel // BLOCK))
    scalars = table.scratch("scalars", len(table.rows), _SCALARS.value, dtype=torch.float64)
    prologue[(len(table.rows) // ROWS_PER_PROGRAM,)](table.rows, table.hyper, scalars, **options(ROWS_PER_PROGRAM))
    for key, chunks in launches.items():
        dtypes, even = launch_class(key, TENSORS)
        update[(len(chunks),)](
            chunks,
            table.rows,
            scalars,
            *(TRITON_DTYPES[dtype] for dtype in dtypes),
            COMPUTE=tl.float64 if dtypes[0] is torch.float64 else tl.float32,
            EVEN=even,
            TOGETHER=16 // max(dtype.itemsize for dtype in dtypes if dtype),
            BLOCK=BLOCK,
            **options(THREADS),
        )
