"""Every schedule by its name: `SchedulerType` is the only list of them, and `get_scheduler` makes any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from enum import Enum
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fusedopt.schedules import forms, functions, metric

__all__ = ["SchedulerType", "example_arguments", "get_scheduler", "needs_metric"]


class _Row(NamedTuple):
    """One schedule; `example` gives `example_arguments` for `n` steps and the initial learning rate `lr`."""

    name: str
    function: Callable[..., LambdaLR | metric.ReduceLROnPlateau | metric.GreedyLR]
    needs_metric: bool = False
    example: Callable[[int, float], dict[str, Any]] = lambda n, lr: {}


class SchedulerType(str, Enum):
    """The names that `get_scheduler` knows, as in transformers.

    Example:
        >>> SchedulerType("linear") is SchedulerType.LINEAR
        True
    """

    _row: _Row

    def __new__(cls, *row: Any) -> SchedulerType:
        member = str.__new__(cls, row[0])
        member._value_, member._row = row[0], _Row(*row)
        return member

    LINEAR = _Row(forms.LinearSchedule.name, functions.get_linear_schedule_with_warmup)
    COSINE = _Row(forms.CosineSchedule.name, functions.get_cosine_schedule_with_warmup)
    COSINE_WITH_RESTARTS = _Row(
        forms.CosineWithRestartsSchedule.name,
        functions.get_cosine_with_hard_restarts_schedule_with_warmup,
        example=lambda n, lr: {"num_cycles": 3},
    )
    POLYNOMIAL = _Row(
        forms.PolynomialSchedule.name,
        functions.get_polynomial_decay_schedule_with_warmup,
        example=lambda n, lr: {"power": 2.0, "lr_end": lr / 100},
    )
    CONSTANT = _Row(forms.ConstantSchedule.name, functions.get_constant_schedule)
    CONSTANT_WITH_WARMUP = _Row(forms.ConstantWithWarmupSchedule.name, functions.get_constant_schedule_with_warmup)
    INVERSE_SQRT = _Row(forms.InverseSqrtSchedule.name, functions.get_inverse_sqrt_schedule)
    REDUCE_ON_PLATEAU = _Row(
        "reduce_lr_on_plateau",
        metric.get_reduce_on_plateau_schedule,
        needs_metric=True,
        example=lambda n, lr: {"factor": 0.5, "patience": max(1, n // 20)},
    )
    COSINE_WITH_MIN_LR = _Row(
        forms.CosineWithMinLRSchedule.name,
        functions.get_cosine_with_min_lr_schedule_with_warmup,
        example=lambda n, lr: {"min_lr_rate": 0.1},
    )
    COSINE_WARMUP_WITH_MIN_LR = _Row(
        forms.CosineWarmupWithMinLRSchedule.name,
        functions.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
        example=lambda n, lr: {"min_lr_rate": 0.1, "warmup_lr_rate": 0.1},
    )
    WARMUP_STABLE_DECAY = _Row(
        forms.WarmupStableDecaySchedule.name,
        functions.get_wsd_schedule,
        example=lambda n, lr: {"num_decay_steps": max(1, n // 5)},
    )
    GREEDY = _Row(
        "greedy",
        metric.get_greedy_schedule,
        needs_metric=True,
        example=lambda n, lr: {"factor": 0.8, "patience": max(1, n // 20), "min_lr": lr / 10, "max_lr": 2 * lr},
    )

    @classmethod
    def _missing_(cls, value: object) -> SchedulerType:
        names = [member.value for member in cls]
        near = get_close_matches(value, names, n=1) if isinstance(value, str) else []
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown schedule {value!r}{hint} choose one of {', '.join(names)}")


def needs_metric(name: str | SchedulerType) -> bool:
    """Returns True if the scheduler of that name is stepped with a metric: `scheduler.step(loss)`.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> [needs_metric(name) for name in ("greedy", "reduce_lr_on_plateau", "linear")]
        [True, True, False]
    """
    return SchedulerType(name)._row.needs_metric


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    num_warmup_steps: float | None = None,
    num_training_steps: float | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LambdaLR | metric.ReduceLROnPlateau | metric.GreedyLR:
    """Any scheduler by its name.

    Args:
        name: A `SchedulerType` or its value.
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up. "constant" and the metric-driven ones ignore it.
        num_training_steps: Length of the whole training. "constant_with_warmup" and "inverse_sqrt" ignore it too.
        scheduler_specific_kwargs: Further arguments of that scheduler's function, say `{"num_cycles": 3}`. "constant"
            and "constant_with_warmup" ignore them, as in the original.

    Returns:
        A `LambdaLR`; for "reduce_lr_on_plateau" a `ReduceLROnPlateau`, for "greedy" a `GreedyLR` (see `needs_metric`).

    Raises:
        ValueError: The name is unknown, a count is missing, negative or given twice, or the function refuses a value.
        TypeError: A specific argument is missing, or unknown to the function.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=10).get_last_lr()
        [0.0]
    """
    kind, specific = SchedulerType(name), scheduler_specific_kwargs or {}
    if not isinstance(specific, Mapping):
        raise ValueError(f"scheduler_specific_kwargs must be a dict of arguments, got {specific!r}")
    counts = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    for argument in counts:
        if argument in specific:
            raise ValueError(
                f"scheduler_specific_kwargs has {argument}={specific[argument]!r}, an argument of get_scheduler "
                "itself: give it there alone"
            )
    parameters = signature(kind._row.function).parameters
    counts = {argument: value for argument, value in counts.items() if argument in parameters}
    hints = {"num_warmup_steps": "it, 0 for no warm-up", "num_training_steps": "the length of the whole training"}
    for argument, value in counts.items():
        if value is None and parameters[argument].default is Parameter.empty:
            raise ValueError(f"schedule {kind.value!r} needs {argument}; give {hints[argument]}")
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        specific = {}
    return kind._row.function(optimizer, **counts, **specific)


def example_arguments(name: str | SchedulerType, num_training_steps: int, lr: float = 1e-3) -> dict[str, Any]:
    """Specific arguments that show a schedule at its best, if its defaults do not or it has none.

    Args:
        name: A `SchedulerType` or its value.
        num_training_steps: Length of the training that they are for, in steps (metric-driven: in metrics).
        lr: The initial learning rate that they are for.

    Returns:
        The `scheduler_specific_kwargs` for `get_scheduler`, a new dict at every call.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> example_arguments("warmup_stable_decay", 100)
        {'num_decay_steps': 20}
        >>> example_arguments("linear", 100)
        {}
    """
    return SchedulerType(name)._row.example(num_training_steps, lr)
