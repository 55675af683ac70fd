"""AdamW on the Triton backend."""

from collections.abc import Sequence

import numpy as np
import torch
from fusedopt_kernels import adamw as kernels
from fusedopt_kernels import rules
from fusedopt_kernels.table import LaunchTable, addresses, even, float_bits, launch_keys
from torch import Tensor

from fusedopt.batch import AdamWHyper, Batch, Control


class TritonAdamW:
    """The stepper of AdamW for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._table = LaunchTable(device)

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        params = [p for batch in batches for p in batch.params]
        grads = [g for batch in batches for g in batch.grads]
        states = [s for batch in batches for s in batch.states]
        amsgrad = [batch.hyper.amsgrad for batch in batches for _ in batch.params]
        columns: list[list[Tensor | None]] = [
            params,
            grads,
            *([s.get(name) for s in states] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")),
        ]
        numel = [p.numel() for p in params]
        rows = np.array(
            [*map(addresses, columns), numel, [i for i, batch in enumerate(batches) for _ in batch.params]], np.int64
        ).T
        dtypes = [[p.dtype if t is None else t.dtype for p, t in zip(params, column)] for column in columns[:4]]
        dtypes.append([p.dtype if a else None for p, a in zip(params, amsgrad)])
        keys = launch_keys(dtypes, even(rows[:, [0, 1, 2, 3, 4, 6]]))
        hyper = np.concatenate(
            [float_bits([_numbers(b.hyper, control) for b in batches]), np.array([_references(b.hyper) for b in batches])],
            axis=1,
        )
        self._table.update(rows, hyper)
        pieces = -(-rows[:, 6] // kernels.BLOCK)
        scalars = torch.empty(len(self._table.rows), 8, dtype=torch.float64, device=self._device)
        kernels.adamw(self._table, scalars, keys, pieces)


def _numbers(hyper: AdamWHyper, control: Control) -> list[float]:
    betas = (hyper.beta1, hyper.beta2) if hyper.correct_bias else (0.0, 0.0)
    return [
        float(hyper.lr), hyper.weight_decay, hyper.eps, *map(rules.log_beta, betas), hyper.beta1, hyper.beta2,
        hyper.convention.decays_update, hyper.convention.corrects_eps, float(control.scale), -1.0 if hyper.maximize else 1.0,
    ]  # fmt: skip


def _references(hyper: AdamWHyper) -> list[int]:
    return [int(hyper.convention.shared_steps), 0, 0, 0, 0, 0, 0]
