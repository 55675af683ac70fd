"""AdamW on the Triton backend: what is in its launch table at a step."""

from collections.abc import Sequence

from torch import Tensor

from fusedopt.backends.triton.rows import Rows
from fusedopt.backends.triton.stepper import States, TritonStepper, gradients
from fusedopt.batch import AdamWHyper, Batch
from fusedopt_kernels import adamw as kernels
from fusedopt_kernels import rules
from fusedopt_kernels.table import LaunchTable


class TritonAdamW(TritonStepper):
    """The stepper of AdamW for one device."""

    row = kernels.ROW
    hyper = kernels.HYPER

    def refresh(self, rows: Rows, batches: Sequence[Batch], params: list[Tensor], states: States) -> None:
        amsgrad = [batch.hyper.amsgrad for batch in batches for _ in batch.params]
        # Parameters that never had a gradient stand in for the states that they do not have: no kernel touches them.
        rows.refresh(
            params,
            gradients(batches),
            [s["exp_avg"] if s else p for s, p in zip(states, params)],
            [s["exp_avg_sq"] if s else p for s, p in zip(states, params)],
            [(s["max_exp_avg_sq"] if s else p) if a else None for s, p, a in zip(states, params, amsgrad)],
        )

    def hyper_values(self, hyper: AdamWHyper) -> dict[str, float]:
        corrected1, corrected2 = (hyper.beta1, hyper.beta2) if hyper.correct_bias else (0.0, 0.0)
        return {
            "weight_decay": hyper.weight_decay,
            "eps": hyper.eps,
            "log_beta1": rules.log_beta(corrected1),
            "log_beta2": rules.log_beta(corrected2),
            "beta1": hyper.beta1,
            "beta2": hyper.beta2,
            "decays_update": hyper.convention.decays_update,
            "corrects_eps": hyper.convention.corrects_eps,
        }

    def launch(self, table: LaunchTable) -> None:
        kernels.adamw(table, self._rows.keys, self._rows.numel)
