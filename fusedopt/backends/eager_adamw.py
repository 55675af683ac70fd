"""AdamW on the eager backend: torch's own fused CPU kernel wherever it can serve, the rules on tensors elsewhere."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from fusedopt_kernels import rules
from fusedopt_kernels.layout import is_dense, same_layout
from torch import Tensor

from fusedopt.backends.steps import StepCounts
from fusedopt.batch import AdamWHyper, Batch, Control


class _Row(NamedTuple):
    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    h: Tensor | None  # the largest v so far


class EagerAdamW:
    """The stepper of AdamW for one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._counts = StepCounts()

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        scale = float(control.scale)
        shared = batches[0].hyper.convention.shared_steps
        work = [[i for i, g in enumerate(batch.grads) if g is not None] for batch in batches]
        if not any(work):
            return
        counted = [
            [s for s in batch.states if s] if shared else [batch.states[i] for i in active]
            for batch, active in zip(batches, work)
        ]
        counts = iter(self._counts.advance([s for states in counted for s in states]))
        for batch, active, states in zip(batches, work, counted):
            steps = [next(counts) for _ in states]
            rows = [_row(batch, i) for i in active]
            for step in dict.fromkeys(steps):
                same = rows if shared or steps.count(step) == len(rows) else [r for r, s in zip(rows, steps) if s == step]
                self._update(batch.hyper, same, step, scale)

    def _update(self, hyper: AdamWHyper, rows: list[_Row], step: float, scale: float) -> None:
        scalars = _scalars(hyper, step)
        served = [row for row in rows if _fused_serves(row)] if self._on_cpu and scale == 1.0 and scalars[1] > 0.0 else []
        if served:
            _fused_update(hyper, served, step, *scalars)
        if len(served) < len(rows):
            done = set(map(id, served))
            for row in rows:
                if id(row) not in done:
                    _rule_update(hyper, row, scale, *scalars)


def _row(batch: Batch, i: int) -> _Row:
    state = batch.states[i]
    return _Row(batch.params[i], batch.grads[i], state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"))  # type: ignore[arg-type]


def _scalars(hyper: AdamWHyper, step: float) -> tuple[float, float, float]:
    betas = (hyper.beta1, hyper.beta2) if hyper.correct_bias else (0.0, 0.0)
    scalars: tuple[float, float, float] = rules.adamw_scalars(
        step,
        float(hyper.lr),
        hyper.weight_decay,
        hyper.eps,
        *map(rules.log_beta, betas),
        hyper.convention.decays_update,
        hyper.convention.corrects_eps,
        exp=math.exp,
        sqrt=math.sqrt,
    )
    return scalars


def _fused_serves(row: _Row) -> bool:
    """torch's fused CPU kernel walks memory, blind to strides and to a dtype that is not the parameter's."""
    tensors = [t for t in row if t is not None]
    if any(t.dtype != row.p.dtype for t in tensors):
        return False
    if all(t.is_contiguous() for t in tensors):
        return True
    return is_dense(row.p) and all(same_layout(row.p, t) for t in tensors)


def _fused_update(
    hyper: AdamWHyper, rows: list[_Row], step: float, shrink: float, step_size: float, eps_hat: float
) -> None:
    """torch's kernel computes torch's convention, so it gets the lr, decay and eps with which that gives our scalars."""
    correction1 = 1.0 - hyper.beta1**step
    root2 = math.sqrt(1.0 - hyper.beta2**step)
    lr = step_size * correction1 / root2
    columns = [list(column) for column in zip(*rows)]
    torch._fused_adamw_(
        *columns[:4],
        columns[4] if hyper.amsgrad else [],
        [torch.tensor(step, dtype=torch.float32)] * len(rows),
        lr=lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=shrink / lr,
        eps=eps_hat / root2,
        amsgrad=hyper.amsgrad,
        maximize=hyper.maximize,
    )


def _rule_update(
    hyper: AdamWHyper, row: _Row, scale: float, shrink: float, step_size: float, eps_hat: float
) -> None:
    dtype = torch.promote_types(row.p.dtype, torch.float32)
    factor = -scale if hyper.maximize else scale
    g = row.g.to(dtype) if factor == 1.0 else row.g.to(dtype) * factor
    m, v = rules.adam_moments(
        g, row.m.to(dtype), row.v.to(dtype), hyper.beta1, 1.0 - hyper.beta1, hyper.beta2, 1.0 - hyper.beta2
    )
    row.m.copy_(m)
    row.v.copy_(v)
    if hyper.amsgrad:
        assert row.h is not None
        v = torch.maximum(row.h.to(dtype), v)
        row.h.copy_(v)
    row.p.copy_(rules.adamw_update(row.p.to(dtype), m, v, shrink, step_size, eps_hat, sqrt=torch.sqrt, div=torch.div))
