"""What a learning-rate schedule is: a step goes in, the factor of the initial learning rate comes out.

Every formula is written once and serves Python numbers, numpy arrays and torch tensors alike: what differs between them
(`cos`, `where`, ...) is handed to it. On Python numbers the arithmetic is that of transformers 4.34 and 5, in the same
order, so the values are the same float64 numbers.

Schedules are flat frozen dataclasses: `torch.optim.lr_scheduler.LambdaLR` saves the `__dict__` of a callable object,
and `torch.load(weights_only=True)` reads numbers and strings but no nested object. What LambdaLR writes back when it
loads a state does not reach a schedule: see `Saved`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from fusedopt import checks


class Functions(NamedTuple):
    """What a formula needs beside `+ - * / % **`, for one kind of number. Bounds are plain Python numbers."""

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


def number(name: str, value: Any) -> float:
    """`value` as a plain Python number, so that checkpoints hold nothing else."""
    value = checks.plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}{checks.hint(value)}")
    return value


def count(name: str, value: Any) -> float:
    """`value` as a number of optimizer steps."""
    if value is None:
        raise ValueError(f"{name} is missing; give it as a number of optimizer steps")
    return non_negative(name, value, "; it counts optimizer steps, 0 leaves the phase out")


def non_negative(name: str, value: Any, way_out: str = "") -> float:
    """`value` as a plain Python number >= 0."""
    value = number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}{way_out}")
    return value


def is_above(bound: float, rate: Any) -> bool:
    """Whether `bound` is above the rate; for a rate that is a tensor, the bound as its dtype has it."""
    if isinstance(rate, torch.Tensor):
        bound = torch.tensor(bound, dtype=rate.dtype, device="cpu").item()
    return bound > float(rate)


class Saved(dict[str, Any]):
    """A copy of a schedule's name and fields, which `LambdaLR` saves, and updates when it loads a state.

    The update leaves the schedule as it is, so a run that goes on follows the arguments that it was given now.
    """

    def update(self, state: Any = (), /, **kwargs: Any) -> None:
        refuse_other_schedule(self, dict(state, **kwargs))


def refuse_other_schedule(own: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuses the state of a schedule of another kind than `own`.

    A state without name is an old one, with fields alone; an empty one is that of a function, which says nothing.

    Raises:
        ValueError: the kinds differ.
    """
    same = state["name"] == own["name"] if "name" in state else {"name", *state} == own.keys()
    if same or not state:
        return
    whose = repr(state["name"]) if "name" in state else f"a schedule with {', '.join(state)}"
    raise ValueError(
        f"the state is that of {whose}, and this schedule is {own['name']!r}: make the schedule that was saved, with "
        "whatever arguments, or start this one at the step reached, with last_epoch"
    )


class Schedule:
    """A learning rate that is a function of the step alone: `schedule(step)` is the factor of the initial rate.

    Subclasses are frozen dataclasses that state what comes after the warm-up (`_after`) and, where it is not a straight
    line from 0 to 1, the warm-up itself (`_warm_up`). Counts are optimizer steps, integers or floats.

    Attributes:
        name: The name that `get_scheduler` knows the schedule by.
        num_warmup_steps: Length of the warm-up.
        length: Number of steps from the start until the schedule has arrived, None if it never does.

    Raises:
        ValueError: On a missing or negative count and on parameters that are no finite numbers.

    Example:
        >>> import numpy as np
        >>> from fusedopt.schedules.forms import LinearSchedule
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
    def length(self) -> float | None:
        return getattr(self, "num_training_steps", None)

    @overload
    def __call__(self, step: float) -> float: ...
    @overload
    def __call__(self, step: torch.Tensor) -> torch.Tensor: ...
    @overload
    def __call__(self, step: np.ndarray | Sequence[float]) -> np.ndarray: ...

    def __call__(self, step: Any) -> Any:
        """The factor of the initial learning rate at `step` (>= 0, the number of scheduler steps taken).

        Args:
            step: A number, an array or sequence of numbers, or a tensor (which stays on its device).

        Returns:
            A float, or a float64 array or tensor of the same shape.
        """
        f, s = _functions_for(step)
        # Each side sees only steps of its own side: outside them a formula may divide by zero or overflow.
        w = self.num_warmup_steps
        return f.where(s < w, self._warm_up(f.at_most(s, w), f), self._after(f.at_least(s, w), f))

    def _warm_up(self, s: Any, f: Functions) -> Any:
        return s / max(1, self.num_warmup_steps)

    def _after(self, s: Any, f: Functions) -> Any:
        raise NotImplementedError

    def _progress(self, s: Any) -> Any:
        """How much of the time between the warm-up and the end has passed at step s."""
        return (s - self.num_warmup_steps) / max(1, (self.length or 0) - self.num_warmup_steps)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return Saved(name=self.name, **self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

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
