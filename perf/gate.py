"""The gate in front of every number: a provider's result against the same rule in float64."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt.reference import ReferenceAdafactor, ReferenceAdamW
from perf.providers import BETAS, DECAY, EPS, FAR, LR, NEAR, Provider
from perf.workloads import Shape, Workload

STEPS = 3
BUDGET = 1_000_000
"""Elements of the part of a workload that is checked: every distinct shape, long ones with fewer rows."""


class Tolerance(NamedTuple):
    """Largest error of an element in units of its tensor's largest movement, beside the rounding of the weight."""

    movement: float
    why: str


TOLERANCES = {
    torch.float64: Tolerance(1e-9, "only the order of operations differs"),
    torch.float32: Tolerance(1e-4, "sums in another order, elements where a sum nearly cancels"),
    torch.float16: Tolerance(2e-2, "moments rounded to 11 bits at every step"),
    torch.bfloat16: Tolerance(1e-1, "moments rounded to 8 bits at every step, in the loops after every operation"),
}


class Reference(NamedTuple):
    """A rule in float64, and how far a right implementation may be from it."""

    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    clip: float | None = None
    slack: float = 0.0
    """Added to the tolerance of movement, for state that is quantised on purpose."""
    roundings: float = 1.0
    """Roundings of the weight per step, in half units of its last place."""


def _adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return ReferenceAdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def _torch_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False)


def _adafactor(params: list[Tensor]) -> torch.optim.Optimizer:
    return ReferenceAdafactor(params)


REFERENCES = {
    "adamw": Reference(_adamw, roundings=2.0),
    "torch adamw": Reference(_torch_adamw, roundings=2.0),
    "torch adamw, 8 bits": Reference(_torch_adamw, slack=0.3, roundings=2.0),
    "adamw master": Reference(_adamw),
    "adamw stochastic": Reference(_adamw, roundings=2.0),
    "adafactor": Reference(_adafactor, roundings=2.0),
    **{f"adamw clipped at {limit:g}": Reference(_adamw, clip=limit, roundings=2.0) for limit in (FAR, NEAR)},
    **{
        f"torch adamw clipped at {limit:g}": Reference(_torch_adamw, clip=limit, roundings=2.0) for limit in (FAR, NEAR)
    },
}


class Verdict(NamedTuple):
    """Whether a provider may be timed.

    Attributes:
        error: largest error of an element, in units of the largest movement of its tensor.
        allowed: what it may be for that tensor.
        passed: whether every tensor is within what is allowed.
    """

    error: float
    allowed: float
    passed: bool


def sample(workload: Workload) -> tuple[Shape, ...]:
    """Every distinct shape of a workload; of tensors too large for their share of the budget, the first rows."""
    shapes = list(dict.fromkeys(workload.shapes))
    share = max(1, BUDGET // len(shapes))
    return tuple(s if prod(s) <= share or len(s) < 2 else (max(1, share // prod(s[1:])), *s[1:]) for s in shapes)


def check(provider: Provider, workload: Workload, device: torch.device, seed: int = 0) -> Verdict:
    """Runs some steps on a part of the workload and compares every element of every parameter."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape, std: float) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * std
        return workload.empty_like(shape, device).copy_(values)

    # Every shape twice: with weights as small as a step of Adafactor, since larger ones would hide a wrong step in
    # their own rounding to 16 bits, and with weights whose size Adafactor's step depends on.
    shapes = sample(workload) * 2
    starts = [normal(shape, 1e-5 if i < len(shapes) // 2 else 4 * LR) for i, shape in enumerate(shapes)]
    params = [s.clone(memory_format=torch.preserve_format).requires_grad_() for s in starts]
    exact = [s.double().requires_grad_() for s in starts]
    reference = REFERENCES[provider.reference]
    optimizer = reference.make(exact)
    # A captured step reads the gradients where they were at its capture.
    homes = [workload.empty_like(shape, device).zero_() for shape in shapes]
    for p, home in zip(params, homes):
        p.grad = home
    with torch.no_grad():
        for home, shape in zip(homes, shapes):
            home.copy_(normal(shape, 0.01))
        step, own = provider.start(params)
        if provider.mode == "captured":
            _forget(own, params, starts)
        for number in range(STEPS):
            if number:
                for home, shape in zip(homes, shapes):
                    home.copy_(normal(shape, 0.01 * (number + 1)))
            for e, home in zip(exact, homes):
                e.grad = home.double()
            if reference.clip is not None:
                torch.nn.utils.clip_grad_norm_(exact, reference.clip)
            optimizer.step()
            # Some clip the gradients in place, which the next step overwrites.
            step()
    verdicts = [_verdict(workload.dtype, reference, p, e, s) for p, e, s in zip(params, exact, starts)]
    return max(verdicts, key=lambda v: (not v.passed, v.error / v.allowed))


def _forget(optimizer: torch.optim.Optimizer, params: list[Tensor], starts: list[Tensor]) -> None:
    """Undoes the steps that a capture needs, in place: the graph knows the memory."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for p, start in zip(params, starts):
        p.copy_(start)


def _verdict(dtype: torch.dtype, reference: Reference, p: Tensor, exact: Tensor, start: Tensor) -> Verdict:
    movement = (exact - start.double()).abs().max().item()
    error = (p.double() - exact).abs().max().item() / movement
    rounding = reference.roundings * STEPS * torch.finfo(dtype).eps / 2 * exact.abs().max().item() / movement
    allowed = TOLERANCES[dtype].movement + reference.slack + rounding
    return Verdict(error, allowed, error <= allowed)
