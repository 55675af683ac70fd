"""Saving: states and groups as a checkpoint has them; `loading` reads it."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusedopt import checks, sharding
from fusedopt.optimizer.distributed_checkpoint import torch_gathers_state
from fusedopt.precision import NUMBER, name_of_dtype

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer


def packed(optimizer: "FusedOptimizer") -> dict[str, Any]:
    """The state dict in torch's layout: parameters are numbered, tensors but for counts are the optimizer's own.

    The states of tensors that are in no group any more are left out. Dtypes in the groups become names, and remainders
    that torch gathers int32.
    """
    numbers: dict[Any, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            numbers.setdefault(p, len(numbers))
        options = {
            name: name_of_dtype(checks.plain(value, tensors=False)) for name, value in group.items() if name != "params"
        }
        groups.append({**options, "params": [numbers[p] for p in group["params"]]})
    states = {}
    gathers = torch_gathers_state()
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            states[key] = state
        elif key in numbers:
            # Counts are views of one tensor, which would be saved whole with each; numbers, too.
            other = {name: state[name].clone() for name in ("step", NUMBER) if name in state}
            if gathers and sharding.is_sharded(state.get("remainder")):
                other["remainder"] = sharding.movable(state["remainder"])
            states[numbers[key]] = {**state, **other} if other else state
    return {"state": states, "param_groups": groups}


def through_hooks(hooks: Iterable[Callable[..., Any]], optimizer: Any, state_dict: Any) -> Any:
    """The state dict after all hooks: each may change it, or return another one."""
    for hook in hooks:
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict
