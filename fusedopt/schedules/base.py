"""Learning-rate schedules as functions, from the step to the factor of the initial learning rate.

Every formula is written once, for Python numbers, numpy arrays and torch tensors alike: the functions in which these
differ (`cos`, `where`, ...) are passed to it. On Python numbers the arithmetic is that of transformers 4.34 and 5, in
the same order, so the values are the same float64 numbers.

Schedules are flat frozen dataclasses: `torch.optim.lr_scheduler.LambdaLR` saves the `__dict__` of a callable object,
and `torch.load(weights_only=True)` reads numbers and strings, but no nested object. What LambdaLR writes back when it
loads a state does not reach a schedule: see `Saved`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any, ClassVar, NamedTuple, overload

import numpy as np
import torch

from fusedopt.schedules.checks import count, number, refuse_other_schedule


class Functions(NamedTuple):
    """The functions in formulas besides `+ - * / % **`, for one kind of number. Bounds are plain Python numbers."""

    cos: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    at_most: Callable[[Any, float], Any]
    at_least: Callable[[Any, float], Any]
    where: Callable[[Any, Any, Any], Any]


PYTHON = Functions(math.cos, math.sqrt, min, max, lambda condition, yes, no: yes if condition else no)
NUMPY = Functions(np.cos, np.sqrt, np.minimum, np.maximum, np.where)
TORCH = Functions(
    torch.cos, torch.sqrt, lambda x, bound: x.clamp(max=bound), lambda x, bound: x.clamp(min=bound), torch.where
)


def _functions_for(step: Any) -> tuple[Functions, Any]:
    if isinstance(step, torch.Tensor):
        return TORCH, step.double()
    if isinstance(step, Real):
        return PYTHON, step.item() if isinstance(step, np.generic) else step
    return NUMPY, np.asarray(step, dtype=np.float64)


class StepFunction:
    """A function of the step whose parameters are the fields of a dataclass, as pictures and checks use it.

    Attributes:
        is_rate: True if the value is the learning rate itself, False if it is a factor of the initial one.
        label: Its name in a picture.
        length: Number of steps from the start to the end of the schedule, None if it has no end.
        pace: Number of steps in which it changes, of a schedule without an end.
        parameters: The fields that are numbers or words, by name.
    """

    is_rate: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return type(self).__name__

    @property
    def length(self) -> float | None:
        return getattr(self, "num_training_steps", None)

    @property
    def pace(self) -> float:
        return getattr(self, "num_warmup_steps", 0)

    @property
    def parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self._fields() if value is not None and not callable(value)}

    def _fields(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]

    def __call__(self, step: Any) -> Any:
        """Returns the value at a step, or an array of the values at an array of steps."""
        raise NotImplementedError


def values_at(function: Callable[[Any], Any], steps: np.ndarray) -> np.ndarray:
    """Returns the values of a function at `steps`, float64; a function of the user is called with one int at a time."""
    values = function(steps) if isinstance(function, StepFunction) else [float(function(int(step))) for step in steps]
    return np.asarray(values, dtype=np.float64)


class Saved(dict[str, Any]):
    """A copy of a schedule's name and fields, which `LambdaLR` saves, and updates when it loads a state.

    The update leaves the schedule as it is, so a run that goes on follows the arguments that it was given now.
    """

    def update(self, state: Any = (), /, **kwargs: Any) -> None:
        refuse_other_schedule(self, dict(state, **kwargs))


class Schedule(StepFunction):
    """A learning rate that depends only on the step: `schedule(step)` is the factor of the initial rate.

    Subclasses are frozen dataclasses that define the warm-up, if it is not a straight line from 0 to 1 (`_warm_up`),
    and the part after it, if the rate does not stay there (`_after`). Counts are optimizer steps, integers or floats.

    Attributes:
        name: The name that `get_scheduler` knows the schedule by.
        num_warmup_steps: Length of the warm-up.
        length: Number of steps from the start to the end of the schedule, None if it has no end.

    Raises:
        ValueError: A count is missing or negative, or a parameter is not a finite number.

    Example:
        >>> import numpy as np
        >>> from fusedopt.schedules import LinearSchedule
        >>> schedule = LinearSchedule(num_warmup_steps=2, num_training_steps=6)
        >>> schedule
        LinearSchedule(num_warmup_steps=2, num_training_steps=6)
        >>> schedule(1), schedule(4.5)
        (0.5, 0.375)
        >>> schedule(np.arange(7)).tolist()
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    name: str
    num_warmup_steps: float

    @property
    def label(self) -> str:
        return self.name

    @overload
    def __call__(self, step: float) -> float: ...
    @overload
    def __call__(self, step: torch.Tensor) -> torch.Tensor: ...
    @overload
    def __call__(self, step: np.ndarray | Sequence[float]) -> np.ndarray: ...

    def __call__(self, step: Any) -> Any:
        """Returns the factor of the initial learning rate at `step`, the number of scheduler steps taken (>= 0).

        Args:
            step: A number, an array or sequence of numbers, or a tensor (which stays on its device).

        Returns:
            A float, or a float64 array or tensor of the same shape.
        """
        f, s = _functions_for(step)
        # Each side sees only steps of its own: elsewhere a formula may divide by zero or overflow.
        w = self.num_warmup_steps
        return f.where(s < w, self._warm_up(f.at_most(s, w), f), self._after(f.at_least(s, w), f))

    def _warm_up(self, s: Any, f: Functions) -> Any:
        return s / max(1, self.num_warmup_steps)

    def _after(self, s: Any, f: Functions) -> Any:
        return s * 0.0 + 1.0

    def _progress(self, s: Any) -> Any:
        """Returns the share of the time between the warm-up and the end that has passed at step s."""
        return (s - self.num_warmup_steps) / max(1, (self.length or 0) - self.num_warmup_steps)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return Saved(name=self.name, **self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._fields())

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if isinstance(field.default, str) or (value is None and field.default is None):
                continue
            check = count if field.name.endswith("_steps") else number
            object.__setattr__(self, field.name, check(field.name, value))
