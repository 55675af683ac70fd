"""Where did my weight decay go? 1,000 steps with zero gradients: nothing but the decay can move the weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusedopt import AdamW, float32_parameters
from perf.decay import RIGHT, STEPS, WEIGHT_DECAY
from perf.primers import Primer
from perf.providers import LR
from perf.report import INK, OTHERS, OURS, lines_picture

_LEFT, _MOVED = "of their size is left", "of the weights have moved"
EVERY = 50  # steps between two points of a curve

Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
_OPTIONS: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
_ROUNDED: dict[str, Any] = {**_OPTIONS, "stochastic_rounding": True}
_MASTER: dict[str, Any] = {**_OPTIONS, "master_weights": True}

RUNS: Mapping[str, tuple[Make, torch.dtype, str]] = {
    "torch.optim.AdamW, float32": (lambda p: torch.optim.AdamW(p, **_OPTIONS), torch.float32, INK),
    "torch.optim.AdamW, bfloat16": (lambda p: torch.optim.AdamW(p, **_OPTIONS), torch.bfloat16, OTHERS),
    "fusedopt.AdamW, bfloat16": (lambda p: AdamW(p, **_OPTIONS), torch.bfloat16, "#56606B"),
    "..., stochastic_rounding=True": (lambda p: AdamW(p, **_ROUNDED), torch.bfloat16, "#E69F00"),
    "..., master_weights=True": (lambda p: AdamW(p, **_MASTER), torch.bfloat16, OURS),
}
"""By name: the optimizer, the dtype of the weights, and the colour of the curve."""


def shares(make: Make, dtype: torch.dtype, steps: int = STEPS) -> tuple[list[float], float]:
    """Returns the mean size of 65,536 weights over what it was, after every `EVERY` steps; and how many have moved."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 256, bias=False, dtype=dtype)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer = make([model.weight])

    def weights() -> torch.Tensor:
        kept = float32_parameters(optimizer, model)["weight"] if isinstance(optimizer, AdamW) else model.weight.detach()
        return kept.double().clone()

    before, found = weights(), [1.0]
    for step in range(1, steps + 1):
        optimizer.step()
        if step % EVERY == 0:
            found.append(float(weights().abs().mean() / before.abs().mean()))
    return found, float((weights() != before).double().mean())


def run() -> Primer:
    curves, rows = {}, []
    for name, (make, dtype, color) in RUNS.items():
        left, moved = shares(make, dtype)
        curves[name] = left, color
        rows.append({"AdamW": name, _LEFT: f"{left[-1]:.4f}", _MOVED: f"{moved:.1%}"})
    rows.append({"AdamW": f"(1 - {LR:g} * {WEIGHT_DECAY:g})^{STEPS:,}", _LEFT: f"{RIGHT:.4f}", _MOVED: ""})
    title = "Mean size of the weights, of what it was; gradients are zero"
    return Primer(rows, lines_picture(curves, EVERY, title, "step"))
