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
        return ", ".join([self.dtypes, *self.options])

    @property
    def floor(self) -> float:
        """Fewest bytes per parameter, where parameters and gradients have one dtype."""
        return RULES[self.rule].floor(DTYPES[self.dtypes][0]) + self.extra

    def make(self, params: Sequence[Tensor]) -> Optimizer:
        (ours,) = providers.of(self.rule, ["fusedopt"])
        return ours.make(params, **self.options, backend="triton")


CASES = (
    *(Case(rule, dtypes) for rule in RULES if rule != BELOW for dtypes in ("float32", "bfloat16")),
    *(Case(rule, dtypes) for rule in ("adamw", "lion") for dtypes in list(DTYPES)[2:]),
    Case("adamw", "float32", {"amsgrad": True}, extra=8),
    Case("adamw", "bfloat16", {"amsgrad": True}, extra=4),
    Case("adafactor", "float64"),
)
"""Below the limit, clipping launches the same kernels as above it."""
