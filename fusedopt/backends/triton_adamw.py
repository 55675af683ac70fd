"""AdamW on the Triton backend: what is in its launch table at this step."""

from collections.abc import Sequence

import numpy as np
import torch

from fusedopt.backends.capture import Tables, on_device
from fusedopt.backends.numbers import DeviceNumbers
from fusedopt.backends.rows import Rows
from fusedopt.batch import AdamWHyper, Batch, Control
from fusedopt_kernels import adamw as kernels
from fusedopt_kernels import rules
from fusedopt_kernels.table import addresses, float_bits


class TritonAdamW:
    """The stepper of AdamW for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = Rows()
        self.tables = Tables(device)

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        with on_device(self._device):
            rows = self._look(batches)
            numbers = DeviceNumbers(self._device)
            hyper = np.array([_hyper(batch.hyper, control, numbers) for batch in batches])
            table = self.tables.filled(rows, hyper, keep=numbers.kept)
            kernels.adamw(table, self._rows.keys, self._rows.numel)
            self._rows.copy_back()

    def _look(self, batches: Sequence[Batch]) -> np.ndarray:
        """The rows of the table."""
        params = [p for batch in batches for p in batch.params]
        states = [s for batch in batches for s in batch.states]
        amsgrad = [batch.hyper.amsgrad for batch in batches for _ in batch.params]
        # Parameters that never had a gradient stand in for the states that they do not have: no kernel touches them.
        self._rows.look(
            params,
            [g for batch in batches for g in batch.grads],
            [s.get("exp_avg", p) for s, p in zip(states, params)],
            [s.get("exp_avg_sq", p) for s, p in zip(states, params)],
            [s.get("max_exp_avg_sq", p) if a else None for s, p, a in zip(states, params, amsgrad)],
        )
        steps = addresses([s.get("step") for s in states])
        batch_of = np.repeat(np.arange(len(batches)), [len(batch.params) for batch in batches])
        return np.column_stack([self._rows.addresses, steps, self._rows.numel, batch_of])


def _hyper(hyper: AdamWHyper, control: Control, numbers: DeviceNumbers) -> np.ndarray:
    """One row of the table of hyper-parameters."""
    lr, *lr_at = numbers.number("lr", hyper.lr)
    scale, *scale_at = numbers.number("scale", control.scale)
    beta1, beta2 = (hyper.beta1, hyper.beta2) if hyper.correct_bias else (0.0, 0.0)
    values = kernels.Numbers(
        lr=lr,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        log_beta1=rules.log_beta(beta1),
        log_beta2=rules.log_beta(beta2),
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        decays_update=hyper.convention.decays_update,
        corrects_eps=hyper.convention.corrects_eps,
        scale=scale,
        sign=-1.0 if hyper.maximize else 1.0,
    )
    shared = int(hyper.convention.shared_steps)
    found = [numbers.address(control.grad_scale), numbers.address(control.found_inf)]
    return np.concatenate([float_bits(values), [shared, *lr_at, *scale_at, *found]])
