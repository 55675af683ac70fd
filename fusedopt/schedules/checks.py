"""What every scheduler here refuses: another scheduler's state, and an optimizer whose param groups have changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedopt.schedules.base import refuse_other_schedule


def refuse_changed_groups(num_groups: int, optimizer: Any, way_out: str) -> None:
    """Refuses an optimizer that has no longer the `num_groups` param groups that its scheduler was made for.

    Raises:
        ValueError: a group was added, or taken away.
    """
    now = len(optimizer.param_groups)
    if now != num_groups:
        what = "added" if now > num_groups else "removed"
        raise ValueError(
            f"a param group was {what} after the scheduler was made: it was made for {_groups(num_groups)}, and the "
            f"optimizer has {now}; {way_out}"
        )


def refuse_other_groups(num_groups: int, rates: Any) -> None:
    """Refuses a state with another number of rates.

    Raises:
        ValueError: the number is not `num_groups`.
    """
    if len(rates) != num_groups:
        raise ValueError(
            f"the state is that of a scheduler for {_groups(len(rates))}, and this one is for {num_groups}: give the "
            "optimizer the param groups that it had, then make the scheduler"
        )


def refuse_other_kind(scheduler: Any, state: Mapping[str, Any], key: str, *, without: tuple[str, ...] = ()) -> None:
    """Refuses a state of another kind of scheduler: one that lacks `key`, or has one of `without`.

    Raises:
        ValueError: says whose state it is, as far as that can be seen.
    """
    if key not in state or any(other in state for other in without):
        own = type(scheduler).__name__
        article = "an" if own[0] in "AEIOU" else "a"
        raise ValueError(
            f"the state is that of {_owner(state)}, and this is {article} {own}: make the scheduler that "
            "was saved, or leave its state out and start this one anew"
        )


def refuse_other_lambdas(own: list[Any], saved: list[Any]) -> None:
    """Refuses what a `LambdaLR` has saved of its functions, where they were other schedules than `own`.

    Raises:
        ValueError: the number differs, or the kind of one.
    """
    refuse_other_groups(len(own), saved)
    for function, state in zip(own, saved):
        refuse_other_schedule(vars(function), state or {})


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
