"""Sets the rate of an optimizer that is a function of the step."""

from typing import Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.keras.schedules import RateFunction, as_rate, rate_on_device
from fusedopt_kernels.memory import lasting


class ScheduledRate:
    """Sets the rate of all param groups, once per step, and notices if something else has changed it.

    A new object accepts whatever rates it finds.
    """

    def __init__(self) -> None:
        self._rate: float | Tensor | None = None
        self._version = 0
        self._step: Any = None
        self._tensor: Tensor | None = None

    def is_set_for(self, step: Any) -> bool:
        """True if the groups already have the rate of this step."""
        return self._rate is not None and self._step == step

    def set(self, groups: list[dict[str, Any]], rate: float | Tensor, step: Any) -> None:
        """Sets the rate of all groups for a step; a tensor is copied into one that lasts, which graphs can fill."""
        if isinstance(rate, Tensor):
            if self._tensor is None or self._tensor.device != rate.device:
                self._tensor = lasting((), torch.float64, rate.device)
            rate = self._tensor.copy_(rate)
            self._version = rate._version
        self._rate, self._step = rate, step
        for group in groups:
            group["lr"] = rate

    def close_step(self) -> None:
        """Makes the next step set its rate anew, even if it has the same number."""
        self._step = None

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Raises ValueError if the rate of a group has changed since it was set."""
        for group in groups:
            lr = group["lr"]
            if isinstance(self._rate, Tensor):
                is_ours = lr is self._rate and lr._version == self._version
            else:
                is_ours = self._rate is None or bool(lr == self._rate)
            if not is_ours:
                raise ValueError(
                    f"the rate of a param group was set to {lr!r}, by a torch scheduler or by hand, but "
                    "learning_rate is a function of the step, which sets it: pass a number as learning_rate"
                )


def rate_after(schedule: RateFunction, steps: int | Tensor) -> float | Tensor:
    """Returns the rate after a number of steps; for a tensor, on its device and without waiting for it.

    Raises:
        ValueError: the function returns no rate.
    """
    if isinstance(steps, Tensor):
        return rate_on_device(schedule, steps)
    rate = as_rate("learning_rate", schedule, steps)
    try:
        checks.learning_rate("learning_rate", rate)
    except ValueError:
        raise ValueError(f"learning_rate gives {rate} at step {steps}: a rate must be finite and >= 0") from None
    return rate
