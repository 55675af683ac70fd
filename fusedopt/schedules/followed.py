"""The interface of a scheduler, as trainers use it, for a schedule that its optimizer follows by itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from fusedopt.schedules.base import StepFunction
from fusedopt.schedules.checks import refuse_other_kind
from fusedopt.wrappers import unwrapped_optimizer

_Schedule = TypeVar("_Schedule", bound="Followed")


class Followed(StepFunction):
    """A rate as a function of the step, which shows trainers and loggers the rate that its optimizer takes from it.

    The transformers Trainer and Accelerate step it, log `get_last_lr()` and save it, as they do with a torch scheduler.
    It sets nothing: the steps are counted by the optimizer, in its state.
    """

    is_rate = True

    def belonging_to(self: _Schedule, optimizer: Any) -> _Schedule:
        """Returns a copy that shows the rate of an optimizer that follows it, as `create_optimizer` does.

        Raises:
            ValueError: the optimizer follows another schedule, or none.
        """
        optimizer = unwrapped_optimizer(optimizer)
        if getattr(optimizer, "schedule", None) != self:
            raise ValueError(
                f"{type(optimizer).__name__} does not follow {self!r}: pass it as learning_rate to AdamWeightDecay, "
                "then show that optimizer's rate"
            )
        shown = copy.copy(self)
        object.__setattr__(shown, "optimizer", optimizer)
        return shown

    def step(self, *_: Any) -> None:
        """Does nothing: the optimizer asks for its rate itself."""

    def get_last_lr(self) -> list[Any]:
        """Returns the rate of each param group in the last step.

        Raises:
            ValueError: the schedule belongs to no optimizer.
        """
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                f"{self!r} belongs to no optimizer, so there is no rate in use to show: take it from create_optimizer, "
                "or pass on schedule.belonging_to(optimizer)"
            )
        rates = (group["lr"] for group in optimizer.param_groups)
        return [rate.detach().clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """Returns the name of the class; a run that goes on follows the arguments given now."""
        return {"class_name": type(self).__name__}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes nothing from the state: the step that was reached is in the state of the optimizer.

        Raises:
            ValueError: the state is that of a scheduler of another kind.
        """
        refuse_other_kind(self, state_dict, "class_name")
