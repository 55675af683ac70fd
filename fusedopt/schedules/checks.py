"""Checks of schedules and schedulers, which raise ValueError: of numbers and counts, of a state that may be that of
another scheduler, and of an optimizer whose param groups may have changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fusedopt import checks


def number(name: str, value: Any) -> float:
    """Returns a finite number as a plain Python number, so that checkpoints hold nothing else."""
    value = checks.plain(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(checks.number(name, value)):
        raise ValueError(f"{name} must be a finite number, got {value!r}{checks.hint(value)}")
    plain: float = value
    return plain


def non_negative(name: str, value: Any, way_out: str = "") -> float:
    """Returns a finite number >= 0 as a plain Python number; `way_out` ends the message for a negative one."""
    plain = number(name, value)
    if plain < 0:
        raise ValueError(f"{name} must be >= 0, got {plain}{way_out}")
    return plain


def count(name: str, value: Any) -> float:
    """Returns a number of optimizer steps, a finite number >= 0, as a plain Python number."""
    if value is None:
        raise ValueError(f"{name} is missing; give it as a number of optimizer steps")
    return non_negative(name, value, "; it counts optimizer steps, 0 leaves the phase out")


def is_above(bound: float, rate: Any) -> bool:
    """True if `bound` is above `rate`, where a rate that is a tensor is compared with the bound in its dtype."""
    if isinstance(rate, torch.Tensor):
        bound = torch.tensor(bound, dtype=rate.dtype, device="cpu").item()
    return bound > float(rate)


def refuse_changed_groups(num_groups: int, optimizer: Any, way_out: str) -> None:
    """Refuses an optimizer that no longer has the `num_groups` param groups that its scheduler was made for."""
    now = len(optimizer.param_groups)
    if now != num_groups:
        what = "added" if now > num_groups else "removed"
        raise ValueError(
            f"a param group was {what} after the scheduler was made: it was made for {_groups(num_groups)}, and the "
            f"optimizer has {now}; {way_out}"
        )


def refuse_other_groups(num_groups: int, rates: Any) -> None:
    """Refuses a state with rates for another number of param groups than `num_groups`."""
    if len(rates) != num_groups:
        raise ValueError(
            f"the state is that of a scheduler for {_groups(len(rates))}, and this one is for {num_groups}: give the "
            "optimizer the param groups that it had, then make the scheduler"
        )


def refuse_other_kind(scheduler: Any, state: Mapping[str, Any], key: str, *, without: tuple[str, ...] = ()) -> None:
    """Refuses the state of another kind of scheduler: one that lacks `key`, or has one of `without`."""
    if key not in state or any(other in state for other in without):
        own = type(scheduler).__name__
        article = "an" if own[0] in "AEIOU" else "a"
        raise ValueError(
            f"the state is that of {_owner(state)}, and this is {article} {own}: make the scheduler that "
            "was saved, or leave its state out and start this one anew"
        )


def refuse_other_schedule(own: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuses the state of a schedule of another kind than `own`.

    An old state has no name, only fields; that of a function is empty, and fits any schedule.
    """
    same = state["name"] == own["name"] if "name" in state else {"name", *state} == own.keys()
    if same or not state:
        return
    whose = repr(state["name"]) if "name" in state else f"a schedule with {', '.join(state)}"
    raise ValueError(
        f"the state is that of {whose}, and this schedule is {own['name']!r}: make the schedule that was saved, with "
        "whatever arguments, or start this one at the step reached, with last_epoch"
    )


def _owner(state: Mapping[str, Any]) -> str:
    if "lr_lambdas" in state:
        names = {saved["name"] for saved in state["lr_lambdas"] if saved and "name" in saved}
        return "an AdafactorSchedule" if "initial_lr" in state else f"a LambdaLR {' '.join(sorted(names))}".rstrip()
    if "num_bad_epochs" in state:
        return "a GreedyLR" if "num_good_epochs" in state else "a ReduceLROnPlateau"
    if "class_name" in state:
        return f"a {state['class_name']}"
    own = [str(key) for key in state if not str(key).startswith("_") and key not in ("base_lrs", "last_epoch")]
    return f"a scheduler with {', '.join(own) or 'nothing of its own'}"


def _groups(number: int) -> str:
    return "1 param group" if number == 1 else f"{number} param groups"
