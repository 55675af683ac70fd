"""AdamW on the Triton backend: what its kernels get of the hyper-parameters."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from fusedopt.backends.triton.elementwise import ElementwiseStepper
from fusedopt.interface import AdamWHyper
from fusedopt_kernels import rules
from fusedopt_kernels.adamw import ADAMW


class TritonAdamW(ElementwiseStepper):
    """The stepper of AdamW for one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(ADAMW, device)

    def used_states(self, hyper: AdamWHyper) -> Collection[str]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + hyper.amsgrad]

    def hyper_values(self, hyper: AdamWHyper) -> dict[str, float | Tensor]:
        beta1, beta2 = (hyper.beta1, hyper.beta2) if hyper.correct_bias else (0.0, 0.0)
        return {
            **super().hyper_values(hyper),
            "log_beta1": _log_beta(beta1),
            "log_beta2": _log_beta(beta2),
            "decays_update": hyper.convention.decays_update,
            "corrects_eps": hyper.convention.corrects_eps,
        }


def _log_beta(beta: float | Tensor) -> float:
    return math.nan if isinstance(beta, Tensor) else rules.log_beta(beta)
