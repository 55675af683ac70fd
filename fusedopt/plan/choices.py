"""The rows of a plan: optimizers, and how they keep weights and moments."""

from typing import Any, NamedTuple

import torch

from fusedopt.adafactor import Adafactor
from fusedopt.adamw import AdamW
from fusedopt.lion import Lion
from fusedopt.optimizer.base import FusedOptimizer


class Choice(NamedTuple):
    """An optimizer as it is made for a run.

    Attributes:
        optimizer: its class.
        dtype: of weights and gradients.
        options: of its constructor.
    """

    optimizer: type[FusedOptimizer]
    dtype: torch.dtype
    options: dict[str, Any] = {}


_FLOAT32, _BFLOAT16 = torch.float32, torch.bfloat16
_MASTER, _STOCHASTIC = {"master_weights": True}, {"stochastic_rounding": True}
_MOMENTUM = {"beta1": 0.9}
_MOMENTS: tuple[dict[str, Any], ...] = ({"state_dtype": _FLOAT32}, {"state_dtype": _BFLOAT16})

CHOICES = (
    Choice(AdamW, _FLOAT32),
    *(Choice(AdamW, _BFLOAT16, {**policy, **moments}) for policy in ({}, _STOCHASTIC, _MASTER) for moments in _MOMENTS),
    Choice(Adafactor, _FLOAT32),
    Choice(Adafactor, _FLOAT32, _MOMENTUM),
    Choice(Adafactor, _BFLOAT16, _STOCHASTIC),
    Choice(Adafactor, _BFLOAT16, {**_STOCHASTIC, **_MOMENTUM, "state_dtype": _BFLOAT16}),
    Choice(Adafactor, _BFLOAT16, _MASTER),
    Choice(Adafactor, _BFLOAT16, {**_MASTER, **_MOMENTUM}),
    Choice(Lion, _FLOAT32),
    Choice(Lion, _BFLOAT16, {**_STOCHASTIC, "state_dtype": _BFLOAT16}),
    Choice(Lion, _BFLOAT16, _MASTER),
)
"""What a plan compares, unless it is told otherwise."""
