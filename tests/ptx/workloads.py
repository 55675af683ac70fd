"""Steps that run on every backend: their shapes, the gradients they are given, and what an optimizer does."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers.comparing import Tolerance
from torch import Tensor

from fusedopt.accumulate import GradientAccumulator
from ptx.outcomes import F32, F64, Outcome, states_of

Shape = tuple[int, ...]

ELEMENTWISE: tuple[Shape, ...] = ((4096,), (1,), (7,), (4107,), (0,), (2064,), (3, 5), ())
FACTORED: tuple[Shape, ...] = (
    *((), (0,), (19,), (1025,), (2, 3, 4), (1, 6), (5, 1), (40, 40), (64, 144), (300, 33), (3, 33, 5)),
    *((2, 2, 3, 3), (30, 7, 9)),
)
"""Vectors, small matrices, odd and even ones, tall and wide ones, stacks, and what has no elements."""

FEW: tuple[Shape, ...] = ((), (0,), (19,), (2, 3, 4), (30, 7, 9), (40, 40), (300, 33), (64, 144))


def normal(shapes: Sequence[Shape], seed: int, dtype: torch.dtype = F32, spread: bool = False) -> list[Tensor]:
    """Normally distributed numbers; with `spread` of magnitudes from 1e-6 to 10, and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator, dtype=F64)
        if spread:
            x = x * 10.0 ** torch.randint(-6, 2, x.shape, generator=generator).double() * (x.abs() > 0.1)
        found.append(x.to(dtype))
    return found


def laid_out(t: Tensor, offset: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A copy so many elements behind a multiple of 64 bytes."""
    if offset == 0:
        return t.clone(memory_format=memory_format)
    room = torch.zeros(t.numel() + offset, dtype=t.dtype)
    return room[offset:].view(t.shape).copy_(t)


def spoil_workspaces(optimizer: Any) -> None:
    """Fills with NaN what a step leaves in its workspace, which is none of the next one's business."""
    for stepper in optimizer._engine.steppers.values():
        if hasattr(stepper, "_tables"):
            for t in stepper._tables._eager._scratch.values():
                t.fill_(torch.nan)


def plain_step(optimizer: Any, number: int) -> None:
    """Gradients count by half at every other step, so that kernels cannot take their factor for another number."""
    if number % 2:
        optimizer.grad_scale = torch.tensor([2.0])
    optimizer.step()
    optimizer.forget_scaler()


def skipped_step(optimizer: Any) -> None:
    """One that changes nothing, whatever its gradients are."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([1.0]), torch.tensor([1.0])
    optimizer.step()
    optimizer.forget_scaler()


def unscaled_step(optimizer: Any, number: int) -> None:
    optimizer.step()


def scaled_step(optimizer: Any, number: int) -> None:
    """As under a GradScaler of which the second step finds infinite gradients."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([1024.0]), torch.tensor([float(number == 1)])
    optimizer.step()
    optimizer.forget_scaler()


def rate_on_the_device(optimizer: Any, number: int) -> None:
    optimizer.param_groups[0]["lr"].fill_((0.5, 0.0, 0.25)[number])
    optimizer.step()


@dataclass(frozen=True)
class Case:
    """Some steps of an optimizer. One more parameter, of three elements, never has a gradient.

    Attributes:
        make: the optimizer's class.
        options: of the optimizer.
        dtype, grad_dtype: of the parameters, and of gradients if they differ.
        offset: by how many elements parameters, gradients and states are off an aligned address.
        edit: changes the gradients, [step][parameter].
        step: takes a step. Another one, which is skipped, follows if it is `plain_step`.
        groups: parameters as the optimizer gets them.
        parameters: what parameters may differ by; that of their dtype if None.
        steps_before: that the state says were taken.
        watched: whether races are looked for, which takes longer than all else where tensors are large.
    """

    make: Any
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = F32
    shapes: tuple[Shape, ...] = ELEMENTWISE
    grad_dtype: torch.dtype | None = None
    steps: int = 2
    offset: tuple[int, int, int] = (0, 0, 0)
    spread: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    edit: Callable[[list[list[Any]]], None] | None = None
    step: Callable[[Any, int], None] = plain_step
    groups: Callable[[list[Any]], list[Any]] = list
    parameters: Tolerance | None = None
    steps_before: int = 0
    watched: bool = True

    def run(self, backend: str) -> Outcome:
        """Returns what the steps leave behind, by name."""
        at_p, at_g, at_state = self.offset
        params = [torch.nn.Parameter(laid_out(t, at_p, self.memory_format)) for t in normal(self.shapes, 1, self.dtype)]
        grads: list[list[Any]] = [
            [
                laid_out(g, at_g, self.memory_format)
                for g in normal(self.shapes, 10 + k, self.grad_dtype or self.dtype, self.spread)
            ]
            for k in range(self.steps)
        ]
        if self.edit:
            self.edit(grads)
        params.append(torch.nn.Parameter(torch.ones(3, dtype=self.dtype)))
        optimizer = self.make(self.groups(params), backend=backend, **copy.deepcopy(self.options))
        if at_state or self.steps_before:
            optimizer.init_state()
            for state in optimizer.state.values():
                state["step"].fill_(self.steps_before)
                moved = {name: laid_out(t, at_state) for name, t in state.items() if t.dim()}
                state.update(moved)
        found: Outcome = {}
        for k, row in enumerate(grads):
            if self.grad_dtype not in (None, self.dtype):
                optimizer.apply_gradients(zip(row, params[:-1]), scale=0.5 if k % 2 else 1.0)
            else:
                for p, g in zip(params, row):
                    p.grad = g
                self.step(optimizer, k)
            if optimizer.tracker:
                found["statistics"] = optimizer.statistics.tensor.clone()
            spoil_workspaces(optimizer)
        if self.step is plain_step:
            skipped_step(optimizer)
        found |= states_of(optimizer, params)
        found["skipped steps"] = torch.tensor(int(optimizer.skipped_steps or 0))
        if optimizer.grad_norm is not None:
            found["grad_norm"] = optimizer.grad_norm.clone()
        return found


@dataclass(frozen=True)
class Accumulation:
    """Gradients that `GradientAccumulator` adds up."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    weights: tuple[Any, ...]
    offset: int = 0
    parameters: Tolerance | None = None
    watched: bool = True

    def run(self, backend: str) -> Outcome:
        accumulator = GradientAccumulator(self.dtype, backend=backend)
        for k, weight in enumerate(self.weights):
            grads = normal(ELEMENTWISE, k, self.grad_dtype, spread=True)
            accumulator([laid_out(g, self.offset) for g in grads], weight)
        return {f"g{i}": g.clone() for i, g in enumerate(accumulator.gradients) if g is not None}
