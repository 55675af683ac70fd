"""Configurations of our optimizers, one row each: their bytes are counted, and their kernels are compiled."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from perf import providers
from perf.providers import BELOW, RULES

DTYPES = {
    **{str(d).removeprefix("torch."): (d,) * 3 for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)},
    "bfloat16, gradient and moments float32": (torch.bfloat16, torch.float32, torch.float32),
    "float32, gradient bfloat16": (torch.float32, torch.bfloat16, torch.float32),
}
"""Dtypes of parameter, gradient and moments that occur in training."""


class Case(NamedTuple):
    """One configuration."""

    rule: str  # a key of `RULES`
    dtypes: str  # a key of `DTYPES`
    options: Mapping[str, Any] = {}  # of the constructor, besides the rule's
    extra: int = 0  # bytes per parameter that the options add to the least that a step moves

    @property
    def name(self) -> str:
        return ", ".join([self.dtypes, *map(_shown, self.options, self.options.values())])

    @property
    def floor(self) -> float:
        """Fewest bytes per parameter, where parameters and gradients have one dtype."""
        return RULES[self.rule].floor(DTYPES[self.dtypes][0]) + self.extra

    def make(self, params: Sequence[Tensor]) -> Optimizer:
        (ours,) = providers.of(self.rule, ["fusedopt"])
        return ours.make(params, **self.options, backend="triton")


def _shown(option: str, value: Any) -> str:
    return option if value is True else f"{option}={value}".replace("torch.", "")


_MASTER, _STOCHASTIC = {"master_weights": True}, {"stochastic_rounding": True}
_BFLOAT16_STATES = {"state_dtype": torch.bfloat16}

LOW_PRECISION = (
    Case("adamw", "bfloat16", _MASTER, extra=12),
    Case("adamw", "bfloat16", {**_MASTER, **_BFLOAT16_STATES}, extra=4),
    Case("adamw", "bfloat16", {**_MASTER, "amsgrad": True}, extra=20),
    Case("adamw", "bfloat16", _STOCHASTIC),
    Case("adamw", "bfloat16", {**_STOCHASTIC, "amsgrad": True}, extra=4),
    Case("adamw", "bfloat16", {**_STOCHASTIC, "state_dtype": torch.float32}, extra=8),
    Case("adamw", "bfloat16", _BFLOAT16_STATES),
    Case("adamw", "float16", _MASTER, extra=16),
    Case("adamw", "float16", _STOCHASTIC),
    Case("adamw", "float32", _BFLOAT16_STATES, extra=-8),
    Case("adamw", "float32", {**_BFLOAT16_STATES, "amsgrad": True}, extra=-4),
    Case("lion", "bfloat16", _MASTER, extra=8),
    Case("lion", "bfloat16", {**_MASTER, **_BFLOAT16_STATES}, extra=4),
    Case("lion", "bfloat16", _STOCHASTIC),
    Case("lion", "float16", _MASTER, extra=12),
    Case("lion", "float16", _STOCHASTIC),
    Case("lion", "float32", _BFLOAT16_STATES, extra=-4),
    Case("adafactor", "bfloat16", {**_MASTER, "beta1": 0.9}, extra=14),
    Case("adafactor", "bfloat16", {**_MASTER, **_BFLOAT16_STATES, "beta1": 0.9}, extra=10),
    Case("adafactor", "bfloat16", {**_STOCHASTIC, "beta1": 0.9}, extra=8),
    Case("adafactor", "float16", {**_MASTER, "beta1": 0.9}, extra=20),
    Case("adafactor", "float16", {**_STOCHASTIC, "beta1": 0.9}, extra=8),
    Case("adafactor", "float32", {**_BFLOAT16_STATES, "beta1": 0.9}, extra=4),
)
"""Weights or moments of 16 bits that lose nothing."""

_TRACKED = {"track_statistics": True}

STATISTICS = (
    Case("adamw", "float32", _TRACKED),
    Case("adamw", "bfloat16", _TRACKED),
    Case("adamw", "bfloat16", {**_MASTER, **_TRACKED}, extra=12),
    Case("adamw", "bfloat16", {**_STOCHASTIC, **_TRACKED}),
    Case("adamw", "float64", _TRACKED),
    Case("lion", "bfloat16", _TRACKED),
    Case("adafactor", "float32", _TRACKED),
    Case("adafactor", "bfloat16", {**_STOCHASTIC, "beta1": 0.9, **_TRACKED}, extra=8),
)
"""Steps that leave statistics, which move no more of parameters, gradients and states."""

CASES = (
    *(Case(rule, dtypes) for rule in RULES if rule != BELOW for dtypes in ("float32", "bfloat16")),
    *(Case(rule, dtypes) for rule in ("adamw", "lion") for dtypes in list(DTYPES)[2:]),
    Case("adamw", "float32", {"amsgrad": True}, extra=8),
    Case("adamw", "bfloat16", {"amsgrad": True}, extra=4),
    Case("adafactor", "float64"),
    *LOW_PRECISION,
    *STATISTICS,
)
"""Below the limit, clipping launches the same kernels as above it."""
