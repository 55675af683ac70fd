"""Why does a bfloat16 second moment freeze? Gradients become a tenth of what they were; v should follow."""

from collections.abc import Mapping
from typing import Any

import torch

from fusedopt import AdamW
from perf.primers import Primer
from perf.report import OTHERS, OURS, lines_picture

STEPS, EVERY, BETA2 = 3000, 50, 0.999
LOOKED_AT = (1000, 3000)
NUMEL = 10_000

RUNS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "rounded to nearest": ({}, OTHERS),
    "stochastic_rounding=True": ({"stochastic_rounding": True}, "#E69F00"),
    "state_dtype=torch.bfloat16": ({"state_dtype": torch.bfloat16}, "#009E73"),
    "master_weights=True": ({"master_weights": True}, OURS),
}
"""By name: options of AdamW, and the colour of the curve."""


def excess(options: Mapping[str, Any], steps: int = STEPS) -> list[float]:
    """Returns the root of mean(v) over `right`, after every `EVERY` steps after the fall."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=0.0, betas=(0.9, BETA2), **options)
    optimizer.init_state()
    state = optimizer.state[p]
    state["step"].fill_(10_000.0)
    # What gradients of size 1 leave: 0.0316 is the deviation of an average of their squares.
    state["exp_avg_sq"].copy_(1.0 + 0.0316 * torch.randn(NUMEL, generator=generator))
    found = [1.0]
    for step in range(1, steps + 1):
        p.grad = (0.1 * torch.randn(NUMEL, generator=generator)).bfloat16()
        optimizer.step()
        if step % EVERY == 0:
            found.append(float((state["exp_avg_sq"].double().mean() / right(step)).sqrt()))
    return found


def right(step: int) -> float:
    """Returns the expected v so many steps after gradients fell from 1 to 0.1, where it was 1."""
    remembered = BETA2**step
    return remembered + (1 - remembered) * 0.1**2


def _row(name: str, after: Mapping[int, float]) -> dict[str, str]:
    return {"AdamW, bfloat16": name, **{f"after {n:,} steps": f"{value:.2f}" for n, value in after.items()}}


def run() -> Primer:
    found = {name: (excess(options), color) for name, (options, color) in RUNS.items()}
    rows = [_row(name, {n: curve[n // EVERY] for n in LOOKED_AT}) for name, (curve, _) in found.items()]
    stays = {n: right(n) ** -0.5 for n in LOOKED_AT}
    rows.append(_row("a v that stays at 1: 1 / sqrt(0.999^n + (1 - 0.999^n) / 100)", stays))
    title = "sqrt(v), of what it should be, after gradients fell to a tenth"
    return Primer(rows, lines_picture(found, EVERY, title, "steps after the fall"))
