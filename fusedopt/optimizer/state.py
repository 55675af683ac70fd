"""The state of parameters is made, moved, completed, converted and saved here, and nowhere else.

`loading` reads checkpoints; `state_check` checks that a state fits its parameter. `FusedOptimizer.state_specs` declares
which tensors a state has.
"""

import sys
import weakref
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from operator import attrgetter, is_, is_not
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import checks, sharding
from fusedopt.backends.graphs import capturing
from fusedopt.optimizer.state_check import Specs, all_fit
from fusedopt.precision import NUMBER, Precision, StateSpec
from fusedopt.warn import warn_once
from fusedopt.without_data import has_data, is_lazy
from fusedopt_kernels.memory import outside_inference_mode

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

_NONE: dict[str, Any] = {}


class States:
    """Brings the states of some groups to what the coming step needs: `check`, which may raise, then `settle`.

    Looks closely only at what is not as it was, since thousands are common.

    Attributes:
        regrouped: True if the groups hold other parameters than at the last check.
        missing: True if a parameter with a gradient has no state.
        devices: where the parameters are.
        some_without_data: True if there are parameters without data.
    """

    def __init__(self) -> None:
        self.regrouped = True
        self.missing = self.some_without_data = False
        self.devices: list[torch.device] = []
        self._in_inference_mode = self._settled = False
        self._params: list[list[int]] = []
        self._seen: tuple[Any, ...] | None = None  # what was found right
        # Weak references: deleting a state frees its memory at once, not after the next step.
        self._values: list[weakref.ref[Tensor]] = []
        self._sizes: list[int] = []

    def check(
        self,
        optimizer: "FusedOptimizer",
        groups: list[dict[str, Any]],
        grads: list[list[Tensor | None]],
        shapes: list[torch.Size] | None,
    ) -> None:
        """Looks at what the coming step works on; changes nothing.

        Args:
            optimizer: whose states they are.
            groups: the parameters.
            grads: one gradient, or None, per parameter of each group.
            shapes: of all parameters, if the caller has them.

        Raises:
            ValueError: a parameter comes twice.
            RuntimeError: a state that the step needs does not fit its parameter, or is broken; or a parameter can only
                be written to in inference mode, and this step is not.
        """
        params = [p for group in groups for p in group["params"]]
        self._look_at(params)
        states: list[dict[str, Any]] = list(map(optimizer.state.get, params, repeat(_NONE)))
        ids = [list(map(id, group["params"])) for group in groups]
        self.regrouped = ids != self._params
        self.missing = False
        if not all(states):
            shapes = None  # A lazy parameter has none yet, nor a state.
            params = [p for p, state in zip(params, states) if state]
            self.missing = any(g is not None and not s for g, s in zip(chain.from_iterable(grads), states))
        values = list(chain.from_iterable(map(dict.values, states)))
        options = [[group[name] for name in optimizer.state_options] for group in groups]
        if shapes is None:
            shapes = list(map(attrgetter("shape"), params))
        now = options, shapes, list(map(attrgetter("dtype"), params))
        if not self.regrouped and now == self._seen and self._are_the_same(values):
            return
        self._seen, self._settled = None, False
        if self.regrouped:
            checks.no_parameter_twice(groups)
        fit = all_fit(optimizer, groups, grads)
        self._params = ids
        if fit and all(isinstance(value, Tensor) for value in values):
            self._seen, self._values, self._sizes = now, list(map(weakref.ref, values)), list(map(Tensor.numel, values))

    def _are_the_same(self, values: list[Any]) -> bool:
        known = [value() for value in self._values]
        # A dead reference gives None, and a state may hold None too.
        same = len(values) == len(known) and all(map(is_, values, known)) and all(map(is_not, known, repeat(None)))
        return same and list(map(Tensor.numel, values)) == self._sizes

    def _look_at(self, params: list[Tensor]) -> None:
        devices = list(map(attrgetter("device"), params))
        mode = torch.is_inference_mode_enabled()
        if devices != self.devices or mode is not self._in_inference_mode or self._seen is None:
            for p in params:
                if not mode and not is_lazy(p) and p.is_inference():
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} was made in torch.inference_mode() and can only be "
                        "updated there: make the model outside of it, or step in it"
                    )
            self.devices, self._in_inference_mode, self._settled = devices, mode, False
        if not self._settled or self.some_without_data:
            self.some_without_data = not all(map(has_data, params))

    def settle(self, optimizer: "FusedOptimizer", groups: list[dict[str, Any]]) -> None:
        """Brings the states that there are to where and what their parameters and options are now."""
        if not self._settled:
            settle_states(optimizer, groups)
            self._settled = True


def make_states(optimizer: "FusedOptimizer", groups: list[dict[str, Any]], wanted: list[list[Tensor | None]]) -> None:
    """Makes missing states where `wanted` is not None; new counts on one device are views of one tensor."""
    missing: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
    for group, row in zip(groups, wanted):
        for p, want in zip(group["params"], row):
            if want is not None and not optimizer.state.get(p):
                missing.setdefault(p.device, []).append((p, group))
    if not missing:
        return
    if any(map(capturing, missing)):
        raise RuntimeError(
            "a CUDA graph is being captured before the optimizer has state, which every replay would set to zero "
            "again: take one step, which compiles the kernels as well, before the capture"
        )
    counts = (state["step"] for state in optimizer.state.values() if state)
    begun = next((count for count in counts if not count.is_meta), None) if optimizer.shares_steps() else None
    specs = Specs(optimizer)
    with outside_inference_mode():
        for device, entries in missing.items():
            _warn_of_frozen_moments(optimizer, entries)
            steps = torch.zeros(len(entries), dtype=torch.float32, device=device)
            if begun is not None:
                steps += begun.to(device, non_blocking=True)
            for (p, group), step in zip(entries, steps.unbind()):
                optimizer.state[p] = {"step": step, **new_state(p, specs(p, group))}
            optimizer.numbers.give(optimizer, [p for p, _ in entries])


_LONG_MEMORY = 0.99
"""From this beta2 on, steps of an average of squares are so small that bfloat16 loses most of them."""


def _warn_of_frozen_moments(optimizer: "FusedOptimizer", entries: list[tuple[Tensor, dict[str, Any]]]) -> None:
    """Warns once of moments that stay too large for a long time after gradients fall."""
    for p, group in entries:
        if p.dtype is torch.bfloat16 and Precision.of(group, 0).is_plain:
            beta2 = group.get("betas", (0.0, 0.0))[1]
            if beta2 >= _LONG_MEMORY and "exp_avg_sq" in optimizer.state_specs(p, group):
                warn_once(
                    f"bfloat16 parameters and moments are rounded to nearest: with beta2={beta2!r}, exp_avg_sq hardly "
                    "follows gradients that become smaller, and small updates and weight decay are lost. Pass "
                    "master_weights=True (float32 weights in 2 more bytes per parameter, float32 moments) or "
                    "stochastic_rounding=True (no more memory)"
                )
                return


def new_state(p: Tensor, specs: dict[str, StateSpec]) -> dict[str, Tensor]:
    """The state of a parameter before its first update, without its `step`; -1 where it needs a number."""
    new = {name: new_tensor(spec, p) for name, spec in specs.items()}
    if "master_weight" in new:
        new["master_weight"].copy_(p.detach())
    return new


def new_tensor(spec: StateSpec, p: Tensor) -> Tensor:
    """A new tensor of the state of a parameter: on its device, laid out and sharded as it is; zeros, or no number."""
    if spec.without is None:
        return torch.zeros_like(p, dtype=spec.dtype, memory_format=torch.preserve_format)
    if isinstance(spec.without, int):
        return sharding.zeros_without_dim(p, p.dim() + spec.without, spec.dtype)
    return torch.full((), -1 if spec.dtype is torch.int64 else 0, dtype=spec.dtype, device=p.device)


class Numbers:
    """Gives the parameters of one optimizer the numbers that their random bits depend on; none is given twice.

    A parameter's number is its place among all parameters when it gets its state, the same in every process, or
    else, if another parameter has that number by then, the next free one.
    """

    def __init__(self) -> None:
        self._places: dict[Tensor, int] | None = None
        self._used: set[int] = set()

    def give(self, optimizer: "FusedOptimizer", params: list[Tensor]) -> None:
        """Gives a number to those of these parameters, all on one device, that need one and have none yet."""
        params = [p for p in params if NUMBER in optimizer.state[p] and has_data(optimizer.state[p][NUMBER])]
        have = _numbers([optimizer.state[p][NUMBER] for p in params])
        params = [p for p, number in zip(params, have) if number < 0]
        if not params:
            return
        if self._places is None:
            everything = (p for group in optimizer.param_groups for p in group["params"])
            self._places = {p: i for i, p in enumerate(everything)}
            states = [
                state[NUMBER] for state in optimizer.state.values() if isinstance(state, dict) and NUMBER in state
            ]
            self._used = set(_numbers(list(filter(has_data, states))))
        new = []
        for p in params:
            place = self._places.get(p, -1)
            new.append(place if place >= 0 and place not in self._used else max(self._used, default=-1) + 1)
            self._used.add(new[-1])
        for p, number in zip(params, torch.tensor(new, dtype=torch.int64, device=params[0].device).unbind()):
            optimizer.state[p][NUMBER] = number


def _numbers(tensors: list[Tensor]) -> list[int]:
    numbers: list[int] = torch.stack([t.cpu() for t in tensors]).tolist() if tensors else []
    return numbers


def settle_states(optimizer: "FusedOptimizer", groups: list[dict[str, Any]]) -> None:
    """Moves states to their parameters, adds what an option asks for that was switched on, converts what was loaded."""
    entries = [(p, group, optimizer.state[p]) for group in groups for p in group["params"] if optimizer.state.get(p)]
    _warn_of_frozen_moments(optimizer, [(p, group) for p, group, _ in entries])
    specs_of = Specs(optimizer)
    with outside_inference_mode():
        added = []
        for p, group, state in entries:
            complete = specs_of(p, group).keys() <= state.keys()
            if not complete and capturing(p.device):
                raise RuntimeError("an option that needs more state was set before a capture: take a step first")
            added.append({} if complete else new_state(p, specs_of(p, group)))
        incomplete: dict[torch.device, list[Tensor]] = {}
        for (p, group, state), new in zip(entries, added):
            specs = specs_of(p, group)
            for name, t in {**new, **state}.items():
                spec = specs.get(name)
                state[name] = _settled(t, p, None if spec is None or spec.keeps_loaded_dtype else spec.dtype)
            if NUMBER in specs:
                incomplete.setdefault(p.device, []).append(p)
        for params in incomplete.values():
            optimizer.numbers.give(optimizer, params)


def _settled(t: Any, p: Tensor, dtype: torch.dtype | None) -> Any:
    """A tensor of a state, on the device of `p`, as this step can write to it, and in this dtype.

    With a dtype, it is contiguous too, unless it has the shape of `p` and can have its layout.
    """
    if not isinstance(t, Tensor):
        return t
    if t.device != p.device or (t.is_inference() and not torch.is_inference_mode_enabled()):
        t = t.to(p.device, copy=True)
    mine = sharding.shard(t)
    if dtype is None or t.layout is not torch.strided or (t.dtype == dtype and mine.is_contiguous()):
        return t
    converted = mine.to(dtype)
    converted = converted if t.shape == p.shape else converted.contiguous()
    return t if converted is mine else sharding.with_shard(t, converted)


def packed(optimizer: "FusedOptimizer") -> dict[str, Any]:
    """The state dict in torch's layout: parameters are numbered, tensors but for counts are the optimizer's own.

    The states of tensors that are in no group any more are left out. Remainders that torch gathers are int32.
    """
    numbers: dict[Any, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            numbers.setdefault(p, len(numbers))
        options = {name: checks.plain(value, tensors=False) for name, value in group.items() if name != "params"}
        groups.append({**options, "params": [numbers[p] for p in group["params"]]})
    states = {}
    gathers = _torch_gathers_state()
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


def torch_looks_at_state() -> bool:
    """True if the current step is one of torch.distributed.checkpoint, which only wants to see the state.

    Where an optimizer has no state, it calls `step()` with zero gradients and rates of 0, which would still count, and
    move the weights of optimizers that make their own rate. A first step of a warm-up on gradients that happen to be
    zero looks the same, so the caller tells them apart.
    """
    return _checkpointing() is not None


def _checkpointing() -> FrameType | None:
    """The function of torch.distributed.checkpoint that called, if one did."""
    module = "torch.distributed.checkpoint.state_dict"
    frame = sys._getframe(1) if module in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame


def _torch_gathers_state() -> bool:
    """True if torch.distributed.checkpoint asks for whole tensors of a sharded state (`full_state_dict=True`)."""
    frame = _checkpointing()
    return frame is not None and getattr(frame.f_locals.get("info"), "full_state_dict", False) is True
