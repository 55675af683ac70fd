"""Loading: a checkpoint is checked before anything changes, and laid out like the parameters it belongs to.

Also where state has to be made, or moved, because others look at it or move what it belongs to.
"""

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import sharding
from fusedopt.without_data import is_lazy
from fusedopt_kernels.memory import outside_inference_mode

if TYPE_CHECKING:
    from fusedopt.base import FusedOptimizer

# Group keys of other implementations that choose how a step runs; none of them means anything here.
_FOREIGN_GROUP_KEYS = ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay")


class _Saved:
    """A saved value on its way through torch's load_state_dict, which would cast it to the dtype of its parameter."""

    def __init__(self, value: Any) -> None:
        self.value = value


def prepare(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Turns a checkpoint into one of this optimizer, or raises ValueError; a pre-hook of load_state_dict."""
    for part, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(part), kind):
            raise ValueError(f"this is no optimizer's checkpoint: {part!r} is {type(state_dict.get(part)).__name__}")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"the checkpoint has {len(saved_groups)} param groups, this optimizer {len(groups)}")
    loaded_groups, state = [], {}
    for number, (group, saved) in enumerate(zip(groups, saved_groups)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"param group {number} of the checkpoint has {len(saved['params'])} parameters, "
                f"here it has {len(group['params'])}"
            )
        merged = {**group, **{key: value for key, value in saved.items() if key not in _FOREIGN_GROUP_KEYS}}
        merged["params"] = saved["params"]
        if "param_names" in group:  # Those of the model that is here, which may have been renamed or wrapped.
            merged["param_names"] = group["param_names"]
        if saved.get("decoupled_weight_decay") is False and saved.get("weight_decay"):
            raise ValueError(
                f"the checkpoint is of an Adam with weight_decay={saved['weight_decay']!r} added to the gradients, "
                "which is another update: set weight_decay to 0 in its groups to go on with decoupled decay"
            )
        lr = merged.get("lr")
        # A schedule may have brought the rate below 0; what it was made with has been checked.
        optimizer.check_group({**merged, "lr": abs(lr)} if isinstance(lr, (int, float)) else merged)
        loaded_groups.append(merged)
        for index, p in zip(saved["params"], group["params"]):
            if state_dict["state"].get(index):
                state[index] = _fit(optimizer, p, merged, index, state_dict["state"][index])
    of_parameters = {index for group in loaded_groups for index in group["params"]}
    state.update({key: value for key, value in state_dict["state"].items() if key not in of_parameters})
    return {**state_dict, "param_groups": loaded_groups, "state": state}


def _fit(
    optimizer: "FusedOptimizer", p: Tensor, group: dict[str, Any], index: int, saved: dict[str, Any]
) -> dict[str, Any]:
    if is_lazy(p):
        raise ValueError(f"parameter {index} is lazy and has no shape yet: run a forward pass before loading its state")
    saved = optimizer.foreign_state(dict(saved))
    expected = optimizer.new_state(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"), group)
    who = f"the checkpoint's state of parameter {index} (shape {tuple(p.shape)})"
    missing = sorted({"step", *expected} - saved.keys())
    unknown = sorted(saved.keys() - {"step", *expected})
    if missing or unknown:
        raise ValueError(
            f"{who} does not fit {type(optimizer).__name__}: "
            f"missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        )
    for name, like in expected.items():
        if not isinstance(saved[name], Tensor) or saved[name].shape != like.shape:
            shape = getattr(saved[name], "shape", None)
            got = f"shape {tuple(shape)}" if shape is not None else repr(saved[name])
            raise ValueError(f"{who} has {name} of {got}, expected shape {tuple(like.shape)}")
        if sharding.is_sharded(saved[name]) and not sharding.is_sharded(p):
            raise ValueError(
                f"{who} has {name} as a DTensor, of a sharded run, and the parameter is not sharded: gather the state "
                "with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(..., full_state_dict=True)"
            )
        if not saved[name].is_floating_point():
            raise ValueError(f"{who} has {name} of dtype {saved[name].dtype}, expected a real floating dtype")
    if not _is_count(saved["step"]):
        raise ValueError(f"{who} has step={saved['step']!r}, expected a whole number >= 0")
    return {name: _Saved(value) for name, value in saved.items()}


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        step = step.item() if step.numel() == 1 else None
    return isinstance(step, (int, float)) and step >= 0 and step == int(step)


def lay_out(optimizer: "FusedOptimizer") -> None:
    """Puts loaded values on their parameter's device, in its layout and in the dtype they were saved in."""
    with outside_inference_mode():
        _lay_out(optimizer)


def _lay_out(optimizer: "FusedOptimizer") -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or not any(isinstance(value, _Saved) for value in state.values()):
                continue
            values = {name: value.value for name, value in state.items()}
            step = torch.as_tensor(values.pop("step"), dtype=torch.float32, device=p.device)
            state["step"] = step.reshape(()).clone()
            fresh = optimizer.new_state(p, group) if sharding.is_sharded(p) else {}
            for name, value in values.items():
                value = sharding.sharded_like(value, fresh.get(name))
                like = fresh.get(name, p if value.shape == p.shape else value)
                state[name] = torch.empty_like(like, dtype=value.dtype, device=p.device).copy_(value)
    if optimizer.shares_steps():
        # Other conventions count the updates of each parameter; here all go on from the most.
        counts = [state["step"] for state in optimizer.state.values() if state]
        most = max((float(count) for count in counts), default=0.0)
        for count in counts:
            count.fill_(most)


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
