"""WarmUp and PolynomialDecay: learning rates as functions of the step, as in TensorFlow recipes.

They return the rate itself; the schedules of `fusedopt.schedules` return factors of the initial rate.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from torch import Tensor

from fusedopt import checks
from fusedopt.schedules import forms
from fusedopt.schedules.base import PYTHON, TORCH, Functions
from fusedopt.schedules.checks import non_negative, number
from fusedopt.schedules.followed import Followed

RateFunction = Callable[[Any], Any]
"""Takes the number of steps taken so far (0 at the first step), returns the learning rate."""


@dataclass(frozen=True)
class RateSchedule(Followed):
    """A learning rate as a function of the step: the base of `WarmUp` and `PolynomialDecay`.

    Numbers may be scalars of NumPy or torch. They are kept as Python's, so that a config can be written as JSON.
    """

    @overload
    def __call__(self, step: float) -> float: ...
    @overload
    def __call__(self, step: Tensor | np.ndarray | Sequence[float]) -> Any: ...

    def __call__(self, step: Any) -> Any:
        """Returns the learning rate after `step` steps.

        Args:
            step: a number or a tensor of one element (read on the host); an array or sequence gives a curve.

        Returns:
            A float, or a float64 array of the shape of `step`. Computed in float64; the original computes in float32.
        """
        if isinstance(step, Tensor):
            step = step.tolist() if step.dim() else step.item()
        values = np.asarray(step)
        if values.ndim:
            rates = [self._rate(s, PYTHON) for s in values.ravel().tolist()]
            return np.array(rates, dtype=np.float64).reshape(values.shape)
        return self._rate(values.item(), PYTHON)

    def _rate(self, s: Any, f: Functions) -> Any:
        """Returns the rate at step `s`, a Python number or a float64 tensor."""
        raise NotImplementedError

    def _is_sound(self) -> bool:
        """True if `_rate` takes tensors, and every rate is finite and >= 0."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("learning_rate"):
                value = number(field.name, value)
            elif field.name.endswith("_steps") or field.name == "power":
                value = non_negative(field.name, value)
            elif field.name == "cycle":
                value = checks.plain(value)
                checks.flag(field.name, value)
            object.__setattr__(self, field.name, value)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments; an inner schedule is the object itself."""
        return dict(self._fields())

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Returns the schedule that `get_config` described, here or in Keras; inner ones may be configs."""
        return cls(**{name: revive(value) for name, value in config.items()})


@dataclass(frozen=True)
class PolynomialDecay(RateSchedule):
    """`(initial - end) * (1 - step / decay_steps)^power + end`, and `end` from `decay_steps` on.

    Args:
        initial_learning_rate: the rate at step 0.
        decay_steps: number of steps until the end. With 0 the rate is NaN, as in Keras.
        end_learning_rate: the rate at the end.
        power: exponent; 1 is a straight line.
        cycle: stretch `decay_steps` to its next multiple whenever the end is reached, so that the rate rises again.
        name: an entry of the config.

    Raises:
        ValueError: a value is not a finite number, or `decay_steps` or `power` is negative.

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

    @property
    def length(self) -> float | None:
        return None if self.cycle else self.decay_steps

    def _rate(self, s: Any, f: Functions) -> Any:
        total = self.decay_steps
        if not total:
            return s * math.nan
        if self.cycle:
            total = total * f.at_least(-(-s // total), 1)  # rounded up
        return forms.polynomial(self.initial_learning_rate, self.end_learning_rate, self.power, 1.0 - s / total, f)

    def _is_sound(self) -> bool:
        return self.decay_steps > 0 and self.initial_learning_rate >= 0 and self.end_learning_rate >= 0


@dataclass(frozen=True)
class WarmUp(RateSchedule):
    """`initial * (step / warmup_steps)^power` up to `warmup_steps`, then `decay_schedule_fn(step - warmup_steps)`.

    Args:
        initial_learning_rate: the rate that the warm-up rises to.
        decay_schedule_fn: the schedule after the warm-up, any callable from a number of steps to a rate.
        warmup_steps: length of the warm-up; 0 for none.
        power: exponent; 1 is a straight line, 0 starts at the full rate.
        name: an entry of the config.

    Raises:
        ValueError: `decay_schedule_fn` is not callable, a value is not a finite number, or `warmup_steps` or `power` is
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
        check_function("decay_schedule_fn", self.decay_schedule_fn)
        super().__post_init__()

    @property
    def num_warmup_steps(self) -> float:
        """Length of the warm-up; the schedules of `fusedopt.schedules` have it under this name."""
        return self.warmup_steps

    @property
    def length(self) -> float | None:
        rest = getattr(self.decay_schedule_fn, "length", None)
        return None if rest is None else self.warmup_steps + rest

    def _rate(self, s: Any, f: Functions) -> Any:
        w = self.warmup_steps
        if f is PYTHON:
            # A user's function gets no step before its own first.
            return self._rise(s) if s < w else as_rate("decay_schedule_fn", self.decay_schedule_fn, s - w)
        after = rate_on_device(self.decay_schedule_fn, f.at_least(s - w, 0.0))
        return f.where(s < w, self._rise(f.at_most(s, w)), after) if w else after

    def _rise(self, s: Any) -> Any:
        return self.initial_learning_rate * (s / self.warmup_steps) ** self.power

    def _is_sound(self) -> bool:
        return self.initial_learning_rate >= 0 and takes_tensors(self.decay_schedule_fn)


def check_function(name: str, function: Any) -> None:
    """Raises ValueError if `function` cannot be called with a step."""
    if not callable(function):
        raise ValueError(
            f"{name} must be a function of the step, got {function!r}; for a constant rate pass lambda step: rate"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(0)
    except TypeError:
        raise ValueError(
            f"{name} must be a function of the step, got {function!r}, which cannot be called with the step alone"
        ) from None


def as_rate(name: str, function: RateFunction, step: float) -> float:
    """Returns the rate at a step as a float; scalars of NumPy and tensors of one element are numbers too.

    Raises:
        ValueError: the function does not return one real number.
    """
    rate = function(step)
    try:
        return checks.number(name, checks.plain(rate))
    except ValueError:
        raise ValueError(f"{name} gives {rate!r} at step {step}: a rate must be one real number") from None


def takes_tensors(rate: Any) -> bool:
    """True if `rate_on_device` can evaluate this function of the step, and all its rates are finite and >= 0.

    It is for schedules of this package, unless their rates go below 0 or a user's function is inside.
    """
    if type(rate) in (WarmUp, PolynomialDecay):
        return bool(rate._is_sound())
    if isinstance(rate, forms.PolynomialSchedule) and rate.lr_end < 0:
        return False
    return type(rate).__module__ == forms.__name__  # A user's subclass is like any other function.


def rate_on_device(rate: Any, steps: Tensor) -> Tensor:
    """Returns the rate after `steps` steps, a float64 tensor on their device; nothing waits for it."""
    result: Tensor = rate._rate(steps.double(), TORCH) if isinstance(rate, RateSchedule) else rate(steps)
    return result


def describe(rate: Any) -> Any:
    """Returns a rate for a config: schedules of this module as `{"class_name", "config"}`, anything else as it is.

    Example:
        >>> describe(PolynomialDecay(0.1, 10))["class_name"]
        'PolynomialDecay'
    """
    if not isinstance(rate, RateSchedule):
        return rate
    config = {name: describe(value) for name, value in rate.get_config().items()}
    return {"class_name": type(rate).__name__, "config": config}


def revive(described: Any) -> Any:
    """Returns the schedule of a config, made by `describe` or by Keras; anything but a dict is returned as it is.

    Raises:
        ValueError: the schedule is not known here.
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
