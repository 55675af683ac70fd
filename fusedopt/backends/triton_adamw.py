"""AdamW on the Triton backend: what is in its launch table at this step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.capture import Tables, on_device
from fusedopt.backends.numbers import DeviceNumbers
from fusedopt.backends.rows import Rows
from fusedopt.batch import AdamWHyper, Batch, Control
from fusedopt_kernels import adamw as kernels
from fusedopt_kernels import rules
from fusedopt_kernels.table import float_bits


class TritonAdamW:
    """The stepper of AdamW for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = Rows()
        self._tables = Tables(device)

    @property
    def captured(self) -> bool:
        """Whether there may be a CUDA graph that goes on reading what this holds."""
        return self._tables.captured

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        shared = any(batch.hyper.convention.shared_steps for batch in batches)
        if not shared and all(g is None for batch in batches for g in batch.grads):
            return
        params = [p for batch in batches for p in batch.params]
        states = [s for batch in batches for s in batch.states]
        with on_device(self._device):
            rows = self._look(batches, params, states)
            numbers = DeviceNumbers(self._device)
            hyper = _hyper(batches, control, numbers)
            table = self._tables.filled(rows, hyper, keep=lambda: [params, [dict(s) for s in states], numbers.kept])
            kernels.adamw(table, self._rows.keys, self._rows.numel)
            self._rows.copy_back()

    def _look(self, batches: Sequence[Batch], params: list[Tensor], states: list[dict[str, Tensor]]) -> np.ndarray:
        """The rows of the table."""
        amsgrad = [batch.hyper.amsgrad for batch in batches for _ in batch.params]
        # Parameters that never had a gradient stand in for the states that they do not have: no kernel touches them.
        self._rows.look(
            params,
            [g for batch in batches for g in batch.grads],
            [s["exp_avg"] if s else p for s, p in zip(states, params)],
            [s["exp_avg_sq"] if s else p for s, p in zip(states, params)],
            [(s["max_exp_avg_sq"] if s else p) if a else None for s, p, a in zip(states, params, amsgrad)],
        )
        steps = self._rows.counts([s.get("step") for s in states])
        batch_of = np.repeat(np.arange(len(batches)), [len(batch.params) for batch in batches])
        return np.column_stack([self._rows.addresses, steps, self._rows.numel, batch_of])


def _hyper(batches: Sequence[Batch], control: Control, numbers: DeviceNumbers) -> np.ndarray:
    """The table of hyper-parameters, one row per batch."""
    scale, *scale_at = numbers.number("scale", control.scale)
    skip_at = [numbers.address(control.grad_scale), numbers.address(control.found_inf)]
    rows = []
    for batch in batches:
        hyper: AdamWHyper = batch.hyper
        lr, *lr_at = numbers.number("lr", hyper.lr)
        corrected1, corrected2 = (hyper.beta1, hyper.beta2) if hyper.correct_bias else (0.0, 0.0)
        values = kernels.Numbers(
            lr=lr,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            log_beta1=rules.log_beta(corrected1),
            log_beta2=rules.log_beta(corrected2),
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            decays_update=hyper.convention.decays_update,
            corrects_eps=hyper.convention.corrects_eps,
            scale=scale,
            sign=-1.0 if hyper.maximize else 1.0,
        )
        rows.append([*float_bits(values), int(hyper.convention.shared_steps), *lr_at, *scale_at, *skip_at])
    return np.array(rows, np.int64)
