"""Compares recorded learning rates with the schedule that was meant, and names the mistake behind a difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.optim.lr_scheduler import LambdaLR

from fusedopt.schedules.base import Schedule, StepFunction, values_at
from fusedopt.schedules.checks import non_negative
from fusedopt.schedules.diagnosis import Run, explain
from fusedopt.schedules.recorder import LRRecorder
from fusedopt.wrappers import unwrapped_scheduler


@dataclass(frozen=True, eq=False)
class Verification:
    """The rates that a run used, next to those that it was meant to use.

    Attributes:
        steps: Numbers of the optimizer steps, int64 of shape [n]; those that an overflow made void count.
        recorded: Rates that were used, float64 of shape [n, param groups].
        expected: Rates that were meant, same shape.
        differs: Where they differ by more than the tolerance, bool, same shape.
        finding: One sentence: that all is well, or the mistake and the way out.
    """

    steps: np.ndarray
    recorded: np.ndarray
    expected: np.ndarray
    differs: np.ndarray
    finding: str

    @property
    def ok(self) -> bool:
        """True if no rate differs."""
        return not self.differs.any()

    @property
    def wrong_steps(self) -> np.ndarray:
        """Numbers of the steps where a param group differs."""
        return self.steps[self.differs.any(axis=1)]

    def raise_on_difference(self) -> Verification:
        """Returns itself.

        Raises:
            RuntimeError: With the finding, if a step used another rate than it was meant to.
        """
        if not self.ok:
            raise RuntimeError(self.finding)
        return self


def verify_schedule(
    recorder: LRRecorder,
    schedule: Schedule | LambdaLR | Callable[[int], float] | Sequence[Callable[[int], float]],
    tolerance: float | None = None,
    raise_on_difference: bool = False,
) -> Verification:
    """Compares the rates that a run used with those of a schedule.

    Args:
        recorder: The record of the run.
        schedule: The schedule that was meant: a `Schedule`, a live `LambdaLR` (Accelerate's
            wrapper around it too), any function from step to factor, or one function per param group.
        tolerance: Largest relative difference that counts as equal. Default: 1e-9, or 4 units in the last place of a
            rate that is a tensor.
        raise_on_difference: Raise instead of returning a `Verification` with differences.

    Returns:
        The data, and a sentence that names the mistake if one explains all differences: a scheduler that is stepped
        before the optimizer, several times per step, once per micro-batch or epoch, or not at all; one that goes on
        over skipped steps, counts twice or starts anew on resume; a record without its `first_step`. If the optimizer
        itself skipped a step because of an overflow, the scheduler may have waited or not.

    Raises:
        ValueError: Nothing was recorded, the tolerance is not a number >= 0, or the schedule is not a function of the
            step, nor one per param group.
        RuntimeError: Rates differ, and `raise_on_difference` is set.

    Example:
        >>> import torch
        >>> from fusedopt.schedules import get_linear_schedule_with_warmup
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> recorder = LRRecorder(optimizer)
        >>> scheduler = get_linear_schedule_with_warmup(optimizer, 2, 10)
        >>> for _ in range(5):
        ...     optimizer.step()
        ...     scheduler.step()
        ...     scheduler.step()
        >>> verification = verify_schedule(recorder, scheduler)
        >>> verification.wrong_steps.tolist()
        [1, 2, 3, 4]
        >>> print(verification.finding)
        4 of 5 steps used another rate: the scheduler is stepped 2 times per optimizer step; step it once
    """
    if len(recorder) == 0:
        raise ValueError("no step was recorded; make the LRRecorder before training, and call optimizer.step()")
    relative = max(1e-9, 4 * recorder.precision) if tolerance is None else non_negative("tolerance", tolerance)
    run = Run(recorder.steps, recorder.rates, _rates_of(schedule, recorder), relative, recorder.initial_rates)
    expected = run.meant(run.steps)
    differs = run.differs(run.recorded, expected)
    skipped, explained = recorder.skipped, run
    if skipped.any():
        # The scheduler may have waited, and then counts only the applied steps.
        applied = run.steps[0] + np.cumsum(~skipped) - ~skipped
        waiting = run.meant(applied)
        if (differs_waiting := run.differs(run.recorded, waiting)).any(axis=1).sum() < differs.any(axis=1).sum():
            expected, differs = waiting, differs_waiting
            explained = replace(run, steps=applied[~skipped], recorded=run.recorded[~skipped])
    wrong = np.asarray(differs.any(axis=1))
    finding = f"all {len(run.steps)} steps used the rate of the schedule"
    if wrong.any():
        first = int(wrong.argmax())
        used, meant = ([float(f"{lr:.6g}") for lr in rates[first]] for rates in (run.recorded, expected))
        cause = explain(explained) or f"first at step {run.steps[first]}, {used} instead of {meant}"
        finding = f"{wrong.sum()} of {len(wrong)} steps used another rate: {cause}"
    verification = Verification(run.steps, run.recorded, expected, differs, finding)
    return verification.raise_on_difference() if raise_on_difference else verification


def functions_of(schedule: Any, num_groups: int = 1) -> Sequence[Any]:
    """Returns the functions of a schedule as `verify_schedule` takes it, one per param group."""
    schedule = unwrapped_scheduler(schedule)
    if isinstance(schedule, (list, tuple)):
        return schedule
    functions: Sequence[Any] = getattr(schedule, "lr_lambdas", [schedule] * num_groups)
    return functions


def _rates_of(schedule: Any, recorder: LRRecorder) -> Callable[[np.ndarray], np.ndarray]:
    initial, num_groups = recorder.initial_rates, len(recorder.initial_rates)
    schedule = unwrapped_scheduler(schedule)
    functions = functions_of(schedule, num_groups)
    if isinstance(schedule, LambdaLR):
        initial = np.array([float(lr) for lr in schedule.base_lrs])
    if not all(callable(function) for function in functions):
        raise ValueError(
            f"{type(schedule).__name__} gives no rate for a step; verify against a schedule, a LambdaLR, or a function "
            "of the step (metric-driven schedulers have none)"
        )
    if len(functions) != num_groups:
        raise ValueError(
            f"{num_groups} param groups were recorded, but {len(functions)} schedules given: give "
            "one per group, or a scheduler that was made after the last group was added"
        )
    gives_rate = [isinstance(function, StepFunction) and function.is_rate for function in functions]
    initial = np.where(gives_rate, 1.0, initial)
    different = {id(function): function for function in functions}

    def rates(steps: np.ndarray) -> np.ndarray:
        values = {key: values_at(function, steps) for key, function in different.items()}
        return np.stack([values[id(function)] * lr for function, lr in zip(functions, initial)], axis=1)

    return rates
