"""Checkpoints as they are saved, and states that have to be made or moved because others look at them.

What is loaded is the subject of `loading`.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fusedopt_kernels.memory import outside_inference_mode

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer


def packed(optimizer: "FusedOptimizer") -> dict[str, Any]:
    """The state dict in torch's layout: parameters are numbered, tensors but for counts are the optimizer's own.

    The states of tensors that are in no group any more are left out.
    """
    numbers: dict[Any, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            numbers.setdefault(p, len(numbers))
        options = {name: plain(value) for name, value in group.items() if name != "params"}
        groups.append({**options, "params": [numbers[p] for p in group["params"]]})
    states = {}
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            states[key] = state
        elif key in numbers:
            # Counts are views of one tensor, which would be saved whole with each.
            states[numbers[key]] = {**state, "step": state["step"].clone()} if "step" in state else state
    return {"state": states, "param_groups": groups}


def plain(value: Any) -> Any:
    """The same with Python's numbers for NumPy's, at any depth: `torch.load(weights_only=True)` reads no others."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(inner) for key, inner in value.items()}
    return value


def through_hooks(hooks: Iterable[Callable[..., Any]], optimizer: Any, state_dict: Any) -> Any:
    """What hooks make of a state dict: each may change it, or return another one."""
    for hook in hooks:
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def separate_rates(groups: list[dict[str, Any]]) -> None:
    """Gives a group whose rate is a tensor that an earlier group has, too, a tensor of its own."""
    seen = set()
    for group in groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor):
            # Two tensors may be views of one number.
            where = lr.untyped_storage()._cdata, lr.storage_offset()
            if where in seen:
                group["lr"] = lr.detach().clone()
            seen.add(where)


def follow_parameters(optimizer: "FusedOptimizer") -> None:
    """Moves states to the device of their parameter, which `model.to(device)` may have taken elsewhere."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.device != p.device:
                    with outside_inference_mode():
                        optimizer.state[p][name] = value.to(p.device)


def torch_looks_at_state() -> bool:
    """Whether the step that is going on is one of torch.distributed.checkpoint, which only wants to see the state.

    Where an optimizer has no state, it calls `step()` with zero gradients and rates of 0, which would still count, and
    move the weights of optimizers that make their own rate. A first step of a warm-up on gradients that happen to be
    zero looks the same, so the caller tells them apart.
    """
    module = "torch.distributed.checkpoint.state_dict"
    frame = sys._getframe(1) if module in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None
