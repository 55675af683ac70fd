"""Every optimizer as a row of one table: what holds for all of them is tested over its rows.

A new optimizer is one more entry of `OPTIMIZERS`. A row makes its optimizer: `OPTIMIZERS["AdamW"](params, lr=0.5)`.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fusedopt import Adafactor, AdamW, AdamWeightDecay, PolynomialDecay, WarmUp
from fusedopt.adafactor_schedule import AdafactorSchedule
from fusedopt.backends import has_triton


@dataclass(frozen=True)
class Row:
    """An optimizer under test."""

    cls: type[torch.optim.Optimizer]
    numbers: tuple[str, ...]
    """Its options that are a number or None."""
    states: frozenset[str]
    """What it keeps of a matrix, with the options below."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those that tests of training give it: a rate that moves weights visibly, and a decay."""
    of_names: Mapping[str, Any] | None = None
    """Where it goes by the names of parameters, what it is told about those of a model."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By name, options on top of `options` that take another way through the code."""
    rate: str = "lr"
    fixed_rate: Mapping[str, Any] = field(default_factory=dict)
    """What else makes the learning rate the number that is given."""

    def __call__(self, params: nn.Module | Iterable[Any], **options: Any) -> Any:
        """Returns a new optimizer of a model, or of parameters, with the row's options and these."""
        given = dict(self.options)
        if isinstance(params, nn.Module):
            given.update(self.of_names or {})
            params = params.parameters() if self.of_names is None else params.named_parameters()
        return self.cls(params, **{**copy.deepcopy(given), **options})

    def at(self, lr: Any, params: Iterable[Any], **options: Any) -> Any:
        """Returns a new optimizer with this learning rate, and else with these options alone."""
        return self.cls(params, **{self.rate: lr, **self.fixed_rate, **options})


OPTIMIZERS: dict[str, Row] = {
    "AdamW": Row(
        AdamW,
        numbers=("lr", "eps", "weight_decay", "max_grad_norm"),
        states=frozenset({"step", "exp_avg", "exp_avg_sq"}),
        options={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "without_correction": {"correct_bias": False, "weight_decay": 0.0},
            "torch-amsgrad": {"convention": "torch", "amsgrad": True, "lr": 1e-3, "weight_decay": 0.0},
            "keras": {"convention": "keras"},
            "eps_0": {"eps": 0.0, "weight_decay": 0.0},
            "tensor_lr": {"lr": torch.tensor(0.01)},
        },
    ),
    "AdamWeightDecay": Row(
        AdamWeightDecay,
        numbers=(
            *("learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay_rate", "clipvalue", "clipnorm"),
            *("global_clipnorm", "decay", "max_grad_norm"),
        ),
        states=frozenset({"step", "exp_avg", "exp_avg_sq"}),
        options={"learning_rate": 0.01, "weight_decay_rate": 0.1},
        of_names={"exclude_from_weight_decay": ["bias"]},
        variants={
            "clipnorm": {"clipnorm": 0.5},
            "function": {
                "learning_rate": WarmUp(0.05, PolynomialDecay(0.05, 20), warmup_steps=3),
                "decay": 0.01,
            },
        },
        rate="learning_rate",
    ),
    "Adafactor": Row(
        Adafactor,
        numbers=("lr", "clip_threshold", "decay_rate", "beta1", "weight_decay", "max_grad_norm"),
        states=frozenset({"step", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"}),
        options={"weight_decay": 0.1},
        variants={
            "warmup": {"warmup_init": True},
            "lr-beta1": {"lr": 0.01, "beta1": 0.9, "relative_step": False, "weight_decay": 0.0},
        },
        fixed_rate={"relative_step": False, "scale_parameter": False},
    ),
}

VARIANTS: dict[str, Row] = {
    name if variant is None else f"{name}-{variant}": replace(row, options={**row.options, **options})
    for name, row in OPTIMIZERS.items()
    for variant, options in {None: {}, **row.variants}.items()
}
"""Every row and, as "AdamW-keras", every variant of it."""

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

NEEDS_TRITON = pytest.mark.skipif(not has_triton(), reason="triton is not installed")

BACKENDS = ["eager", pytest.param("triton", marks=NEEDS_TRITON)]

# Every variant on every backend. A step of Adafactor takes the interpreter half a second, and its options for rates
# are the same scalars of the same kernels, so they are spared.
ROWS = [pytest.param(name, "eager", id=f"{name}-eager") for name in VARIANTS] + [
    pytest.param(name, "triton", id=f"{name}-triton", marks=NEEDS_TRITON)
    for name in VARIANTS
    if name != "Adafactor-warmup"
]


def scheduler_for(name: str, optimizer: Any) -> LambdaLR | None:
    """Returns a schedule that goes with this variant; None where the rate is a function of the step already."""
    row = VARIANTS[name]
    if callable(row.options.get(row.rate)):
        return None
    if any(group.get("relative_step") for group in optimizer.param_groups):
        return AdafactorSchedule(optimizer)
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))
