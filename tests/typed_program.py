"""A user's program, for mypy --strict: the public API has types, and they are the right ones."""

from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import assert_type

import fusedopt
from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion, LRRecorder, get_linear_schedule_with_warmup
from fusedopt.plan import Choice, Plan, plan_run


def train(model: torch.nn.Module, steps: int) -> list[float]:
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0, master_weights=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=steps)
    recorder = LRRecorder(optimizer)
    losses: list[float] = []
    for _ in range(steps):
        loss = model(torch.ones(4)).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert_type(optimizer.grad_norm, torch.Tensor | None)
    assert_type(optimizer.describe(), str)
    assert_type(optimizer.workspace_bytes(), int)
    verification = fusedopt.verify_schedule(recorder, scheduler)
    assert_type(verification.ok, bool)
    return losses


def others(params: list[torch.Tensor]) -> list[torch.optim.Optimizer]:
    adafactor = Adafactor(params, lr=1e-3, relative_step=False, beta1=0.9, state_dtype=torch.bfloat16)
    assert_type(adafactor.effective_lr(params[0]), float | torch.Tensor)
    return [adafactor, Lion(params, stochastic_rounding=True, seed=3), AdamWeightDecay(params, 1e-3)]


def plan(module: torch.nn.Module) -> dict[str, Any]:
    made = plan_run(module, fsdp=8, choices=[Choice(Lion, torch.bfloat16)])
    assert_type(made, Plan)
    return made.data()


version: str = fusedopt.__version__
trainer: Callable[[torch.nn.Module, int], list[float]] = train
