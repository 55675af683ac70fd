"""The state of parameters is made, moved, completed and converted here, and nowhere else.

`FusedOptimizer.state_specs` declares which tensors a state has; `state_check` checks that a state fits its parameter;
`state_changes` knows when there is something to do.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import checks, sharding
from fusedopt.backends.graphs import capturing
from fusedopt.optimizer.numbering import Numbers
from fusedopt.optimizer.state_check import Specs
from fusedopt.precision import COUNTS, NUMBER, Precision, StateSpec
from fusedopt.warn import warn_once
from fusedopt.without_data import has_data
from fusedopt_kernels.memory import outside_inference_mode

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

_COUNT = StateSpec(COUNTS, without="all")


def make_states(
    optimizer: "FusedOptimizer", groups: list[dict[str, Any]], wanted: list[list[Tensor | None]]
) -> list[Tensor]:
    """Makes missing states where `wanted` is not None; new counts on one device are views of one tensor.

    Returns the parameters that got one: all or, after an error, none.
    """
    missing: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
    for group, row in zip(groups, wanted):
        for p, want in zip(group["params"], row):
            if want is not None and not optimizer.state.get(p):
                missing.setdefault(p.device, []).append((p, group))
    if not missing:
        return []
    if any(map(capturing, missing)):
        raise RuntimeError(
            "a CUDA graph is being captured before the optimizer has state, which every replay would set to zero "
            "again: take one step, which compiles the kernels as well, before the capture"
        )
    # Those of parameters that are in no group any more have stopped; other keys of the state are no parameters.
    states = (optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"])
    counts = (state["step"] for state in states if state)
    begun = next((count for count in counts if not count.is_meta), None) if optimizer.shares_steps() else None
    specs = Specs(optimizer)
    made: dict[Tensor, dict[str, Tensor]] = {}
    with outside_inference_mode():
        for device, entries in missing.items():
            _warn_of_frozen_moments(optimizer, entries)
            steps = torch.zeros(len(entries), dtype=COUNTS, device=device)
            if begun is not None:
                steps += begun.to(device, non_blocking=True)
            for (p, group), step in zip(entries, steps.unbind()):
                made[p] = {"step": step, **new_state(p, specs(p, group))}
        optimizer.state.update(made)
        try:
            for entries in missing.values():
                optimizer.numbers.give(optimizer, [p for p, _ in entries], new=True)
        except BaseException:
            forget_states(optimizer, made)
            raise
    return list(made)


def forget_states(optimizer: "FusedOptimizer", made: Iterable[Tensor]) -> None:
    """Takes back what `make_states` has made."""
    for p in made:
        optimizer.state.pop(p, None)
    optimizer.numbers = Numbers()


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
        settled: list[dict[str, Any]] = []
        for (p, group, state), new in zip(entries, added):
            specs = specs_of(p, group)
            dtypes = {name: spec.dtype for name, spec in specs.items() if not spec.keeps_loaded_dtype}
            dtypes.setdefault("step", COUNTS)
            settled.append({name: _settled(t, p, dtypes.get(name)) for name, t in {**new, **state}.items()})
            if NUMBER in specs:
                incomplete.setdefault(p.device, []).append(p)
        for (_, _, state), complete_state in zip(entries, settled):
            state.update(complete_state)
        for params in incomplete.values():
            optimizer.numbers.give(optimizer, params)


def _settled(t: Any, p: Tensor, dtype: torch.dtype | None) -> Any:
    """A tensor of a state, on the device of `p`, as this step can write to it, and in this dtype.

    With a dtype, it is contiguous too, unless it has the shape of `p` and can have its layout.
    """
    if not isinstance(t, Tensor):
        return t
    moves = t.device != p.device or (t.is_inference() and not torch.is_inference_mode_enabled())
    if capturing(p.device) and (moves or _is_converted(t, p, dtype)):
        raise RuntimeError(
            f"a state of a parameter of shape {tuple(p.shape)} is {t.dtype} on {t.device}, and every replay of a CUDA "
            "graph would convert or move it again from what it is now: take a step before the capture"
        )
    if moves:
        t = t.to(p.device, copy=True)
    if not _is_converted(t, p, dtype):
        return t
    converted = sharding.shard(t).to(dtype)
    return sharding.with_shard(t, converted if t.shape == p.shape else converted.contiguous())


def _is_converted(t: Tensor, p: Tensor, dtype: torch.dtype | None) -> bool:
    fits = t.dtype == dtype and (t.shape == p.shape or sharding.shard(t).is_contiguous())
    return dtype is not None and t.layout is torch.strided and not fits


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


_LONG_MEMORY = 0.99
"""From this beta2 on, steps of an average of squares are so small that bfloat16 loses most of them."""


def _warn_of_frozen_moments(optimizer: "FusedOptimizer", entries: list[tuple[Tensor, dict[str, Any]]]) -> None:
    """Warns once of moments that stay too large for a long time after gradients fall."""
    for p, group in entries:
        if p.dtype is torch.bfloat16 and has_data(p) and Precision.of(group, 0).is_plain:
            beta2 = checks.in_use(group.get("betas", (0.0, 0.0))[1])
            if beta2 >= _LONG_MEMORY and "exp_avg_sq" in optimizer.state_specs(p, group):
                warn_once(
                    f"bfloat16 parameters and moments are rounded to nearest: with beta2={beta2!r}, exp_avg_sq hardly "
                    "follows gradients that become smaller, and small updates and weight decay are lost. Pass "
                    "master_weights=True (float32 weights in 2 more bytes per parameter, float32 moments) or "
                    "stochastic_rounding=True (no more memory)"
                )
                return
