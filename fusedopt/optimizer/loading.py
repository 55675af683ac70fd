"""Loading: a checkpoint is checked, and laid out like the parameters it belongs to, before anything changes."""

import copy
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusedopt import checks, sharding
from fusedopt.backends.eager.storage import remainder_beside
from fusedopt.checks import FLOATS
from fusedopt.optimizer import whose
from fusedopt.optimizer.clipping import AVERAGE
from fusedopt.optimizer.state import new_tensor
from fusedopt.out_of_memory import is_out_of_memory
from fusedopt.precision import COUNTS, FLOAT32_COPIES, WEIGHT_STATES, StateSpec, master_state, named_dtype
from fusedopt.without_data import is_lazy

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

# Group keys of other implementations that choose how a step runs; none of them means anything here.
_FOREIGN_GROUP_KEYS = ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay")

_LARGEST_COUNT = 2.0**53

_DEEPEST = 32
"""Lists in lists that an option may be made of: reading, copying and showing it goes down so far."""

_MOST = 1 << 20
"""Values that an option may have, in all its lists together. A few lists in each other hold billions, with each list
there once, and a walk through them would not end."""

_Place = tuple[Any, Tensor, dict[str, Any]]


def loaded(optimizer: "FusedOptimizer", state_dict: Any) -> dict[str, Any]:
    """The state and the param groups that a checkpoint gives this optimizer, which stays as it is.

    They share no memory with the checkpoint, except for entries of the state that belong to no parameter, which are
    handed on as they are.

    Raises:
        ValueError: the checkpoint does not fit.
    """
    saved_groups, saved_states, others = _parts(state_dict)
    own = set(optimizer.defaults).union(*optimizer.param_groups)
    known = whose.by_options({name for group in saved_groups for name in group}, own)
    if known is not None:
        raise ValueError(_is_of(optimizer, known[0], f"its param groups have {known[1]!r}"))
    # What is made in these modes could not be updated outside of them.
    with torch.inference_mode(False), torch.no_grad():
        places = _places(optimizer, saved_groups)
        for index, p, group in places:
            if index in saved_states:
                _check_names(optimizer, index, p, group, saved_states[index])
        groups = [
            _merged(optimizer, number, group, saved)
            for number, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups))
        ]
        states: defaultdict[Any, Any] = defaultdict(dict)
        counts: dict[Tensor, float] = {}
        merged = [group for group in groups for _ in group["params"]]
        for (index, p, _), group in zip(places, merged):
            if index in saved_states:
                who = _who(index, p)
                counts[p] = _count(who, p, saved_states[index]["step"])
                states[p] = _laid_out(optimizer, who, p, group, saved_states[index])
        if optimizer.shares_steps():
            # Other conventions count the updates of each parameter; here all go on from the most.
            counts = dict.fromkeys(counts, max(counts.values(), default=0.0))
        for device in dict.fromkeys(p.device for p in counts):
            here = [p for p in counts if p.device == device]
            steps = torch.tensor([counts[p] for p in here], dtype=COUNTS, device=device)
            for p, step in zip(here, steps.unbind()):
                states[p]["step"] = step
    states.update(others)
    return {"state": states, "param_groups": groups}


def _parts(state_dict: Any) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]], dict[Any, Any]]:
    """Groups, the states that belong to their parameters, and what else there is in the state."""
    found = state_dict if isinstance(state_dict, dict) else {}
    for part, kinds in (("state", dict), ("param_groups", (list, tuple))):
        if not isinstance(found.get(part), kinds):
            raise ValueError(f"this is no optimizer's checkpoint: {part!r} is {type(found.get(part)).__name__}")
    for number, group in enumerate(found["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"this is no optimizer's checkpoint: param group {number} has no list of 'params'")
    others = dict(found["state"])
    states: dict[Any, dict[str, Any]] = {}
    seen: set[Any] = set()
    for number, group in enumerate(found["param_groups"]):
        for index in group["params"]:
            if not isinstance(index, (int, str, np.integer)) or isinstance(index, bool):
                raise ValueError(
                    f"param group {number} of the checkpoint has a parameter whose key is {type(index).__name__}, "
                    "expected its number or its name"
                )
            if index in seen:
                raise ValueError(f"parameter {index} comes twice in the checkpoint, and has one state: list it once")
            seen.add(index)
            # JSON makes a string of a number that is a key.
            for key in (index, str(index)):
                state = None if index in states else others.pop(key, None)
                if not isinstance(state, (dict, type(None))):
                    raise ValueError(f"the checkpoint's state of parameter {index} is {type(state).__name__}, no dict")
                if state:
                    states[index] = state
    return list(found["param_groups"]), states, others


def _is_of(optimizer: "FusedOptimizer", whom: str, evidence: str) -> str:
    return (
        f"this is a checkpoint of {whom}, from which {type(optimizer).__name__} cannot go on ({evidence}): load the "
        "model's weights alone, and let the optimizer start anew"
    )


def _places(optimizer: "FusedOptimizer", saved_groups: list[dict[str, Any]]) -> list[_Place]:
    """For each parameter the key of its saved state, itself, and its present group."""
    groups = optimizer.param_groups
    if len(groups) != len(saved_groups):
        raise ValueError(f"the checkpoint has {len(saved_groups)} param groups, this optimizer {len(groups)}")
    for number, (group, saved) in enumerate(zip(groups, saved_groups)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"param group {number} of the checkpoint has {len(saved['params'])} parameters, "
                f"here it has {len(group['params'])}"
            )
    return [
        (index, p, group)
        for group, saved in zip(groups, saved_groups)
        for index, p in zip(saved["params"], group["params"])
    ]


def _merged(optimizer: "FusedOptimizer", number: int, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A param group with the saved options, as far as there are any; those of the whole optimizer stay its own."""
    left_out = {"params", *_FOREIGN_GROUP_KEYS, *optimizer.whole_options()}
    if optimizer.guard.skip_outliers is None:
        left_out.add(AVERAGE)
    what = f"param group {number} of the checkpoint has"
    options = {name: _copied(f"{what} {name!r:.80}", v) for name, v in saved.items() if name not in left_out}
    known = (optimizer.defaults.keys() | optimizer.counters | {AVERAGE}) - {"lr"}
    options.update({name: named_dtype(_option(options[name], group.get(name))) for name in known & options.keys()})
    if isinstance(options.get("lr"), np.ndarray):
        options["lr"] = _number(options["lr"])
    if saved.get("decoupled_weight_decay") is False and options.get("weight_decay"):
        raise ValueError(
            f"the checkpoint is of an Adam with weight_decay={options['weight_decay']!r} added to the gradients, "
            "which is another update: set weight_decay to 0 in its groups to go on with decoupled decay"
        )
    names = options.get("param_names")
    if names is not None and (
        not isinstance(names, (list, tuple)) or [type(n) for n in names] != [str] * len(group["params"])
    ):
        raise ValueError(
            f"param group {number} of the checkpoint has param_names={names!r:.200}, "
            f"expected {len(group['params'])} strings"
        )
    if "param_names" in group:  # Those of the model that is here, which may have been renamed or wrapped.
        options.pop("param_names", None)
    merged = {**group, **options}
    lr: Any = merged.get("lr")
    # A schedule may have brought the rate below 0; what it was made with has been checked.
    is_number = (isinstance(lr, (int, float)) and not isinstance(lr, bool)) or _is_one_number(lr)
    optimizer.check_group({**merged, "lr": abs(lr)} if is_number else merged)
    return merged


def _copied(what: str, value: Any) -> Any:
    """A copy of an option, with numpy's numbers as Python's own; raises ValueError where there can be none."""
    _refuse_endless(what, value, _MOST)
    try:
        return copy.deepcopy(checks.plain(value, tensors=False))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what} as {type(value).__name__}, which cannot be copied: {error}") from error


def _refuse_endless(what: str, value: Any, most: int) -> None:
    """Raises ValueError for lists or dicts that are too deep, too many, or in themselves."""
    level, left = [value], most
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, (list, tuple, dict, set, frozenset)):
                left -= len(one)
                if left < 0:
                    raise ValueError(f"{what} with more than {most:,} values in it")
                inner += [*one.keys(), *one.values()] if isinstance(one, dict) else one
        if not inner:
            return
        level = inner
    raise ValueError(f"{what} with lists in each other, {_DEEPEST} deep or more")


def _option(value: Any, present: Any) -> Any:
    """A saved option: a tensor where this optimizer has one, on its device, else a number."""
    if isinstance(present, (tuple, list)) and isinstance(value, (tuple, list)) and len(present) == len(value):
        return type(value)(map(_option, value, present))
    if _is_one_number(value) and value.is_floating_point() and isinstance(present, Tensor):
        return value.to(present.device)
    number = _number(value)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return torch.full_like(present, number) if is_number and isinstance(present, Tensor) else number


def _is_one_number(value: Any) -> bool:
    """True for a tensor of one element that can be read."""
    return (
        isinstance(value, Tensor)
        and not is_lazy(value)
        and value.layout is torch.strided
        and value.numel() == 1
        and not value.is_meta
    )


def _number(value: Any) -> Any:
    """An option, for which other tools may write a tensor or an array of one element, as a number.

    It is the shortest decimal that rounds to this element: 0.999 that was put into a float32 is 0.999 again, while
    1 - 0.99900001287 would be another weight by 1e-5.
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1 and 1 != len(value) <= _DEEPEST:
        value = tuple(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_number, value))
    if _is_one_number(value):
        value = value.item() if value.dtype not in (torch.float16, torch.float32) else value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.size == 1:
        one = value.reshape(())[()]
        return float(str(one)) if isinstance(one, np.floating) else value.item()
    return value


def _who(index: Any, p: Tensor) -> str:
    return f"the checkpoint's state of parameter {index} (shape {tuple(p.shape)})"


def _specs(optimizer: "FusedOptimizer", p: Tensor, group: dict[str, Any]) -> tuple[dict[str, StateSpec], ...]:
    """Returns the specs of the tensors that a state must have, and may have: options may have changed since then."""
    off, on = ({name: pair[i] for name, pair in optimizer.state_options.items()} for i in (0, 1))
    least = optimizer.state_specs(p, {**group, **off})
    return least, {**optimizer.state_specs(p, {**group, **on}), **least, **optimizer.state_specs(p, group)}


def _check_names(
    optimizer: "FusedOptimizer", index: Any, p: Tensor, group: dict[str, Any], saved: dict[str, Any]
) -> None:
    if is_lazy(p):
        raise ValueError(f"parameter {index} is lazy and has no shape yet: run a forward pass before loading its state")
    least, most = _specs(optimizer, p, group)
    missing = sorted({"step", *least} - saved.keys())
    # A parameter of another dtype may have no use for what completes its weight.
    unknown = sorted(map(str, saved.keys() - {"step", *most, *WEIGHT_STATES}))
    whom = whose.by_state(saved.keys()) if missing else None
    if whom:
        raise ValueError(_is_of(optimizer, whom, f"its state of parameter {index} has {', '.join(map(str, saved))}"))
    if missing or unknown:
        raise ValueError(
            f"{_who(index, p)} does not fit {type(optimizer).__name__}: "
            f"missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        )


def _laid_out(
    optimizer: "FusedOptimizer", who: str, p: Tensor, group: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Tensor]:
    """A saved state, without its step, on its parameter's device, in its layout, in the dtype that serves."""
    _, most = _specs(optimizer, p, group)
    values = {name: _tensor(f"{who} has {name}", saved[name], most[name], p) for name in most if name in saved}
    for name, value in values.items():
        _check_value(f"{who} has {name}", value, most[name], p)
    state = {}
    for name, value in values.items():
        spec = most[name]
        like = new_tensor(spec, p) if sharding.is_sharded(p) else p if value.shape == p.shape else value
        value = sharding.sharded_like(value.detach(), like)
        dtype = value.dtype if spec.keeps_loaded_dtype else spec.dtype
        state[name] = torch.empty_like(like, dtype=dtype, device=p.device).copy_(value)
    completing = master_state(p.dtype)
    if completing and completing in optimizer.state_specs(p, group) and completing not in saved:
        copies = [saved[name] for name in FLOAT32_COPIES if name in saved]
        if copies and isinstance(copies[0], Tensor) and copies[0].shape == p.shape:
            copy = sharding.shard(sharding.sharded_like(copies[0].detach().to(p.device, torch.float32, copy=True), p))
            mine = copy if p.dtype is torch.float16 else remainder_beside(sharding.shard(p.detach()), copy)
            state[completing] = sharding.with_shard(p.detach(), mine)
    return state


def _tensor(what: str, value: Any, spec: StateSpec, p: Tensor) -> Any:
    """Returns arrays, and the lists and numbers that JSON makes of them, as tensors; anything else as it is."""
    shape = spec.shape(p)
    _refuse_endless(what, value, (len(shape) + 1) * shape.numel() + _DEEPEST)
    try:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value))
        if isinstance(value, (list, tuple, int, float, np.generic)):
            return torch.tensor(value, dtype=spec.dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # It is refused with its name.
    return value


def _check_value(what: str, value: Any, spec: StateSpec, p: Tensor) -> None:
    shape = tuple(spec.shape(p))
    if not isinstance(value, Tensor) or is_lazy(value):
        raise ValueError(f"{what} of type {type(value).__name__}, expected a tensor of shape {shape}")
    if value.shape != shape:
        raise ValueError(f"{what} of shape {tuple(value.shape)}, expected shape {shape}")
    if sharding.is_sharded(value) and not sharding.is_sharded(p):
        raise ValueError(
            f"{what} as a DTensor, of a sharded run, and the parameter is not sharded: gather the state "
            "with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(..., full_state_dict=True)"
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{what} in the layout {value.layout}, expected a dense tensor")
    if not spec.dtype.is_floating_point:
        if value.dtype is not spec.dtype and (spec.dtype, value.dtype) != (torch.int16, torch.int32):  # gathered
            raise ValueError(f"{what} of dtype {value.dtype}, expected {spec.dtype}")
    elif value.dtype not in FLOATS:
        raise ValueError(f"{what} of dtype {value.dtype}, expected a real floating dtype of 16 bits or more")
    if value.is_meta and not p.is_meta:
        raise ValueError(f"{what} on the meta device, where tensors have no values: load the checkpoint to the CPU")


def _count(who: str, p: Tensor, step: Any) -> float:
    _refuse_endless(f"{who} has step", step, _DEEPEST)
    count = step
    step = step.full_tensor() if sharding.is_sharded(step) else step
    if isinstance(step, Tensor):
        if step.is_meta and p.is_meta:
            return 0.0
        if _is_one_number(step):
            count = step.item()
    else:
        count = _number(checks.plain(step, tensors=False))
    if isinstance(count, bool) or not isinstance(count, (int, float)):
        raise ValueError(f"{who} has step={step!r:.80}, expected a whole number >= 0")
    if not (0 <= count <= _LARGEST_COUNT and count == int(count)):
        raise ValueError(f"{who} has step={step!r:.80}, expected a whole number from 0 to 2**53")
    return float(count)
