"""The gate in front of every number: a provider's result against the same rule in float64."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt import reference
from perf.providers import ADAM, LR, RULES, Provider
from perf.workloads import Shape, Workload

STEPS = 3
BUDGET = 1_000_000
"""Elements of the part of a workload that is checked: every distinct shape, long ones with fewer rows."""

ROUNDINGS = 2 * STEPS
"""Roundings of a weight, in half units of its last place."""

TOLERANCES = {
    torch.float64: 1e-9,  # only the order of operations differs
    torch.float32: 1e-4,  # sums in another order, elements where a sum nearly cancels
    torch.float16: 2e-2,  # moments rounded to 11 bits at every step
    torch.bfloat16: 1e-1,  # moments rounded to 8 bits at every step, in the loops after every operation
}
"""Largest error of an element in units of its tensor's largest movement, plus the rounding of the weight."""


class Verdict(NamedTuple):
    """Outcome for the worst tensor, in units of the largest movement of its elements."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def sample(workload: Workload) -> tuple[Shape, ...]:
    """Returns every distinct shape of a workload; of tensors beyond their share of the budget, the first rows."""
    shapes = list(dict.fromkeys(workload.shapes))
    share = max(1, BUDGET // len(shapes))
    return tuple(s if prod(s) <= share or len(s) < 2 else (max(1, share // prod(s[1:])), *s[1:]) for s in shapes)


def check(provider: Provider, workload: Workload, device: torch.device) -> Verdict:
    """Runs some steps on a part of the workload and compares every element of every parameter."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: Shape, std: float) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * std
        return workload.empty(shape, device).copy_(values)

    # Every shape twice: with weights as small as a step of Adafactor, since larger ones would hide a wrong step in
    # their own rounding to 16 bits, and with weights whose size Adafactor's step depends on.
    shapes = sample(workload)
    starts = [normal(shape, std) for std in (1e-5, 4 * LR) for shape in shapes]
    params = [s.clone(memory_format=torch.preserve_format).requires_grad_() for s in starts]
    exact = [s.double().requires_grad_() for s in starts]
    rule = RULES[provider.rule]
    loop = getattr(reference, f"Reference{rule.ours}")
    optimizer = torch.optim.AdamW(exact, **ADAM, foreach=False) if provider.like_torch else loop(exact, **rule.options)
    # A captured step reads the gradients where they were at its capture.
    grads = [torch.zeros_like(s) for s in starts]
    for p, grad in zip(params, grads):
        p.grad = grad
    with torch.no_grad():
        for number in range(STEPS):
            for e, grad in zip(exact, grads):
                grad.copy_(normal(tuple(grad.shape), 0.01 * (number + 1)))
                e.grad = grad.double()
            if number == 0:
                step, own = provider.start(params)
                if provider.mode == "captured":
                    _reset(own, params, starts)
            if rule.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(exact, rule.max_grad_norm)
            optimizer.step()
            step()  # Some clip the gradients in place, which the next step overwrites.
    tolerance = TOLERANCES[workload.dtype] + provider.slack + rule.error16 * (workload.dtype.itemsize == 2)
    rounding = ROUNDINGS * torch.finfo(workload.dtype).eps / 2
    verdicts = []
    for p, e, start in zip(params, exact, starts):
        movement = (e - start.double()).abs().max().item()
        error = (p.double() - e).abs().max().item() / movement
        verdicts.append(Verdict(error, tolerance + rounding * e.abs().max().item() / movement))
    return max(verdicts, key=lambda v: (not v.passed, v.error / v.allowed))


def _reset(optimizer: torch.optim.Optimizer, params: list[Tensor], starts: list[Tensor]) -> None:
    """Undoes the steps that a capture needs, in place: the graph knows the memory."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for p, start in zip(params, starts):
        p.copy_(start)
