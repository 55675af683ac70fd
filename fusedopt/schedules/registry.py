"""The learning-rate schedules of transformers 4.34 and 5, by name or by function, for any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from enum import Enum
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fusedopt.schedules.base import Schedule
from fusedopt.schedules.forms import (
    ConstantSchedule,
    ConstantWithWarmupSchedule,
    CosineSchedule,
    CosineWarmupWithMinLRSchedule,
    CosineWithMinLRSchedule,
    CosineWithRestartsSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    PolynomialSchedule,
    WarmupStableDecaySchedule,
)
from fusedopt.schedules.functions import (
    ScheduleLR,
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)
from fusedopt.schedules.metric import GreedyLR, ReduceLROnPlateau, get_greedy_schedule, get_reduce_on_plateau_schedule

__all__ = [
    "ConstantSchedule",
    "ConstantWithWarmupSchedule",
    "CosineSchedule",
    "CosineWarmupWithMinLRSchedule",
    "CosineWithMinLRSchedule",
    "CosineWithRestartsSchedule",
    "GreedyLR",
    "InverseSqrtSchedule",
    "LinearSchedule",
    "PolynomialSchedule",
    "ReduceLROnPlateau",
    "Schedule",
    "ScheduleLR",
    "SchedulerType",
    "WarmupStableDecaySchedule",
    "example_arguments",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_greedy_schedule",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_reduce_on_plateau_schedule",
    "get_scheduler",
    "get_wsd_schedule",
    "needs_metric",
]


class SchedulerType(str, Enum):
    """The names that `get_scheduler` knows, as in transformers.

    Example:
        >>> SchedulerType("linear") is SchedulerType.LINEAR
        True
    """

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    INVERSE_SQRT = "inverse_sqrt"
    REDUCE_ON_PLATEAU = "reduce_lr_on_plateau"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WARMUP_WITH_MIN_LR = "cosine_warmup_with_min_lr"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"
    GREEDY = "greedy"

    @classmethod
    def _missing_(cls, value: object) -> SchedulerType:
        names = [member.value for member in cls]
        near = get_close_matches(value, names, n=1) if isinstance(value, str) else []
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown schedule {value!r}{hint} choose one of {', '.join(names)}")


_FUNCTIONS: dict[SchedulerType, Callable[..., LambdaLR | ReduceLROnPlateau | GreedyLR]] = {
    SchedulerType.LINEAR: get_linear_schedule_with_warmup,
    SchedulerType.COSINE: get_cosine_schedule_with_warmup,
    SchedulerType.COSINE_WITH_RESTARTS: get_cosine_with_hard_restarts_schedule_with_warmup,
    SchedulerType.POLYNOMIAL: get_polynomial_decay_schedule_with_warmup,
    SchedulerType.CONSTANT: get_constant_schedule,
    SchedulerType.CONSTANT_WITH_WARMUP: get_constant_schedule_with_warmup,
    SchedulerType.INVERSE_SQRT: get_inverse_sqrt_schedule,
    SchedulerType.REDUCE_ON_PLATEAU: get_reduce_on_plateau_schedule,
    SchedulerType.COSINE_WITH_MIN_LR: get_cosine_with_min_lr_schedule_with_warmup,
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    SchedulerType.WARMUP_STABLE_DECAY: get_wsd_schedule,
    SchedulerType.GREEDY: get_greedy_schedule,
}
_METRIC_DRIVEN = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_WITHOUT_TOTAL = (SchedulerType.CONSTANT_WITH_WARMUP, SchedulerType.INVERSE_SQRT)


def needs_metric(name: str | SchedulerType) -> bool:
    """Whether the scheduler of that name is stepped with a metric: `scheduler.step(loss)`.

    Raises:
        ValueError: On an unknown name.

    Example:
        >>> [needs_metric(name) for name in ("greedy", "reduce_lr_on_plateau", "linear")]
        [True, True, False]
    """
    return SchedulerType(name) in _METRIC_DRIVEN


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    num_warmup_steps: float | None = None,
    num_training_steps: float | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LambdaLR | ReduceLROnPlateau | GreedyLR:
    """Any scheduler by its name.

    Args:
        name: A `SchedulerType` or its value.
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up. "constant" and the metric-driven ones ignore it.
        num_training_steps: Length of the whole training. Also "constant_with_warmup" and "inverse_sqrt" ignore it.
        scheduler_specific_kwargs: Further arguments of that scheduler's function, say `{"num_cycles": 3}`. "constant"
            and "constant_with_warmup" ignore them, as in the original.

    Returns:
        A `LambdaLR`; for "reduce_lr_on_plateau" a `ReduceLROnPlateau`, for "greedy" a `GreedyLR` (see `needs_metric`).

    Raises:
        ValueError: On an unknown name, on a count that is missing, negative or given twice, and as the function.
        TypeError: On specific arguments that the function does not have, or lacks.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=10).get_last_lr()
        [0.0]
    """
    kind = SchedulerType(name)
    function, specific = _FUNCTIONS[kind], scheduler_specific_kwargs or {}
    if not isinstance(specific, Mapping):
        raise ValueError(f"scheduler_specific_kwargs must be a dict of arguments, got {specific!r}")
    for argument in ("num_warmup_steps", "num_training_steps"):
        if argument in specific:
            raise ValueError(
                f"scheduler_specific_kwargs has {argument}={specific[argument]!r}, an argument of get_scheduler "
                "itself: give it there alone"
            )
    if kind is SchedulerType.CONSTANT:
        return function(optimizer)
    if kind in _METRIC_DRIVEN:
        return function(optimizer, **specific)
    if num_warmup_steps is None:
        raise ValueError(f"schedule {kind.value!r} needs num_warmup_steps; give it, 0 for no warm-up")
    if kind is SchedulerType.CONSTANT_WITH_WARMUP:
        return function(optimizer, num_warmup_steps)
    if kind in _WITHOUT_TOTAL:
        return function(optimizer, num_warmup_steps, **specific)
    # The decay of "warmup_stable_decay" may be placed by num_stable_steps instead; its function asks for one of them.
    if num_training_steps is None and kind is not SchedulerType.WARMUP_STABLE_DECAY:
        raise ValueError(f"schedule {kind.value!r} needs num_training_steps; give the length of the whole training")
    return function(optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps, **specific)


def example_arguments(name: str | SchedulerType, num_training_steps: int, lr: float = 1e-3) -> dict[str, Any]:
    """Specific arguments that show what a schedule is good for, where its defaults do not or where it has none.

    Args:
        name: A `SchedulerType` or its value.
        num_training_steps: Length of the training they are for, in steps (metric-driven: in metrics).
        lr: The initial learning rate they are for.

    Returns:
        What to pass to `get_scheduler` as `scheduler_specific_kwargs`; a new dict at every call.

    Raises:
        ValueError: On an unknown name.

    Example:
        >>> example_arguments("warmup_stable_decay", 100)
        {'num_decay_steps': 20}
        >>> example_arguments("linear", 100)
        {}
    """
    fifth, twentieth = max(1, num_training_steps // 5), max(1, num_training_steps // 20)
    arguments: dict[SchedulerType, dict[str, Any]] = {
        SchedulerType.COSINE_WITH_RESTARTS: {"num_cycles": 3},
        SchedulerType.POLYNOMIAL: {"power": 2.0, "lr_end": lr / 100},
        SchedulerType.COSINE_WITH_MIN_LR: {"min_lr_rate": 0.1},
        SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr_rate": 0.1, "warmup_lr_rate": 0.1},
        SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": fifth},
        SchedulerType.REDUCE_ON_PLATEAU: {"factor": 0.5, "patience": twentieth},
        SchedulerType.GREEDY: {"factor": 0.8, "patience": twentieth, "min_lr": lr / 10, "max_lr": 2 * lr},
    }
    return arguments.get(SchedulerType(name), {})
