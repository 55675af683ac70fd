"""WarmUp and PolynomialDecay: learning rates as functions of the step, as TensorFlow recipes have them.

Unlike the schedules of `fusedopt.schedules`, which are factors of an optimizer's rate, these return the rate itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
import torch

from fusedopt.followed import Followed

RateFunction = Callable[[Any], Any]
"""Takes the number of steps taken so far (0 at the first step), returns the learning rate."""


@dataclass(frozen=True)
class RateSchedule(Followed):
    """A learning rate as a function of the step: what `WarmUp` and `PolynomialDecay` share."""

    @overload
    def __call__(self, step: float) -> float: ...
    @overload
    def __call__(self, step: torch.Tensor | np.ndarray | Sequence[float]) -> Any: ...

    def __call__(self, step: Any) -> Any:
        """The learning rate after `step` steps.

        Args:
            step: a number or a tensor of one element (read on the host); an array or sequence gives a curve.

        Returns:
            A float, or a float64 array of the shape of `step`. Computed in float64; the original computes in float32.
        """
        if isinstance(step, torch.Tensor):
            step = step.tolist() if step.dim() else step.item()
        values = np.asarray(step)
        if values.ndim:
            return np.array([self._rate(s) for s in values.ravel().tolist()], dtype=np.float64).reshape(values.shape)
        return self._rate(values.item())

    def _rate(self, step: float) -> float:
        raise NotImplementedError

    @property
    def length(self) -> float | None:
        """Number of steps until the rate has arrived; None if it never does, or nothing is known of what follows."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; an inner schedule is the object itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The schedule that `get_config` described, here or in Keras; inner ones may be configs too."""
        return cls(**{name: revive(value) for name, value in config.items()})


@dataclass(frozen=True)
class PolynomialDecay(RateSchedule):
    """`(initial - end) * (1 - step / decay_steps)^power + end`, and `end` from `decay_steps` on.

    Args:
        initial_learning_rate: the rate at step 0.
        decay_steps: number of steps until the end. With 0 the rate is NaN, as in Keras.
        end_learning_rate: the rate at the end.
        power: exponent; 1 is a straight line.
        cycle: start over from above whenever the end is reached: `decay_steps` is stretched to its next multiple.
        name: for the config.

    Raises:
        ValueError: a value is no finite number, or `decay_steps` or `power` is negative.

    Source: Keras 2.14, `keras.optimizers.schedules.PolynomialDecay`.

    Example:
        >>> schedule = PolynomialDecay(0.5, decay_steps=4, end_learning_rate=0.1)
        >>> [round(schedule(step), 2) for step in (0, 1, 2, 4, 9)]
        [0.5, 0.4, 0.3, 0.1, 0.1]
        >>> schedule.get_config()["decay_steps"]
        4
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        _check_finite(self, "initial_learning_rate", "end_learning_rate")
        _check_finite_non_negative(self, "decay_steps", "power")

    @property
    def length(self) -> float | None:
        return None if self.cycle else self.decay_steps

    def _rate(self, step: float) -> float:
        total = self.decay_steps
        if not total:
            return math.nan
        if self.cycle:
            total *= max(1, math.ceil(step / total))
        left = 1.0 - min(step, total) / total
        return (self.initial_learning_rate - self.end_learning_rate) * left**self.power + self.end_learning_rate


@dataclass(frozen=True)
class WarmUp(RateSchedule):
    """`initial * (step / warmup_steps)^power` up to `warmup_steps`, then `decay_schedule_fn(step - warmup_steps)`.

    Args:
        initial_learning_rate: the rate that the warm-up rises to.
        decay_schedule_fn: what follows, any callable from a number of steps to a rate.
        warmup_steps: length of the warm-up; 0 for none.
        power: exponent; 1 is a straight line, 0 starts at the full rate.
        name: for the config.

    Raises:
        ValueError: `decay_schedule_fn` is not callable, a value is no finite number, or `warmup_steps` or `power` is
            negative.

    Source: transformers 4.34, `optimization_tf.py`.

    Example:
        >>> schedule = WarmUp(0.4, PolynomialDecay(0.4, decay_steps=4, end_learning_rate=0.0), warmup_steps=2)
        >>> [round(schedule(step), 2) for step in range(7)]
        [0.0, 0.2, 0.4, 0.3, 0.2, 0.1, 0.0]
    """

    initial_learning_rate: float
    decay_schedule_fn: RateFunction
    warmup_steps: float
    power: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.decay_schedule_fn):
            raise ValueError(
                f"decay_schedule_fn must be a function of the step, got {self.decay_schedule_fn!r}; "
                "for a constant rate pass lambda step: rate"
            )
        _check_finite(self, "initial_learning_rate")
        _check_finite_non_negative(self, "warmup_steps", "power")

    @property
    def num_warmup_steps(self) -> float:
        """Length of the warm-up under the name that torch's schedules give it."""
        return self.warmup_steps

    @property
    def length(self) -> float | None:
        rest = getattr(self.decay_schedule_fn, "length", None)
        return None if rest is None else self.warmup_steps + rest

    def _rate(self, step: float) -> float:
        if step < self.warmup_steps:
            return self.initial_learning_rate * (step / self.warmup_steps) ** self.power
        return float(self.decay_schedule_fn(step - self.warmup_steps))


def describe(rate: Any) -> Any:
    """A rate as a config holds it: our schedules as `{"class_name", "config"}`, anything else as it is.

    Example:
        >>> describe(PolynomialDecay(0.1, 10))["class_name"]
        'PolynomialDecay'
    """
    if not isinstance(rate, RateSchedule):
        return rate
    config = {name: describe(value) for name, value in rate.get_config().items()}
    return {"class_name": type(rate).__name__, "config": config}


def revive(described: Any) -> Any:
    """The rate that `describe`, or a config of Keras, stands for; what is no dict is returned as it is.

    Raises:
        ValueError: the config is of a schedule that is not known here.
    """
    if not isinstance(described, dict):
        return described
    known = {schedule.__name__: schedule for schedule in (WarmUp, PolynomialDecay)}
    schedule = known.get(described.get("class_name", ""))
    if schedule is None or "config" not in described:
        raise ValueError(
            f"no schedule can be made of {described!r}: configs of {' and '.join(known)} can; "
            "for another one put a callable from step to rate in its place"
        )
    return schedule.from_config(described["config"])


def _check_finite(schedule: RateSchedule, *names: str) -> None:
    for name in names:
        value = getattr(schedule, name)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def _check_finite_non_negative(schedule: RateSchedule, *names: str) -> None:
    _check_finite(schedule, *names)
    for name in names:
        if getattr(schedule, name) < 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(schedule, name)!r}")
