"""Checks that states fit their parameters, whatever was done to either since the last step."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import sharding
from fusedopt.checks import FLOATS
from fusedopt.precision import COUNTS, StateSpec
from fusedopt.without_data import has_data
from fusedopt_kernels.layout import overlaps_itself

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

_WAY_OUT = (
    "nothing was changed: delete optimizer.state[parameter] to begin with a new state, or load a checkpoint that fits"
)

_COUNTS = {COUNTS, torch.float32}
"""Counts of float32 are those of other optimizers and of older pickles; a step makes them float64."""


class Specs:
    """`state_specs` of many parameters: declared once for those of one group, dtype and number of dimensions.

    Args:
        optimizer: whose states they are.
        options: in place of the groups'.
    """

    def __init__(self, optimizer: "FusedOptimizer", options: dict[str, Any] | None = None) -> None:
        self._optimizer, self._options = optimizer, options or {}
        self._known: dict[tuple[int, torch.dtype, int], dict[str, StateSpec]] = {}

    def __call__(self, p: Tensor, group: dict[str, Any]) -> dict[str, StateSpec]:
        key = id(group), p.dtype, p.dim()
        if key not in self._known:
            self._known[key] = self._optimizer.state_specs(p, {**group, **self._options})
        return self._known[key]


def all_fit(optimizer: "FusedOptimizer", groups: list[dict[str, Any]], grads: list[list[Tensor | None]]) -> bool:
    """True if all states fit, those that this step skips included; raises RuntimeError for one that it needs."""
    counts_all = optimizer.shares_steps()
    specs = Specs(optimizer)
    needed = Specs(optimizer, {name: off for name, (off, _) in optimizer.state_options.items()})
    fit = True
    for group, row in zip(groups, grads):
        for p, g in zip(group["params"], row):
            state = optimizer.state.get(p)
            if not state:
                continue
            miscounted, misfit = _wrong_count(p, state), _misfit(p, specs(p, group), needed(p, group), state)
            wrong = misfit or miscounted
            if wrong and g is not None:
                raise RuntimeError(f"{wrong}; {_WAY_OUT}")
            if miscounted and counts_all:
                raise RuntimeError(f"{miscounted}; {_WAY_OUT}")
            fit = fit and not wrong
    return fit


def _wrong_count(p: Tensor, state: dict[str, Any]) -> str | None:
    step = state.get("step")
    if isinstance(step, Tensor) and step.dim() == 0 and step.dtype in _COUNTS and _has_data(step, p):
        if step.device.type == "cpu" and has_data(step) and not step >= 0.0:  # Other devices are not waited for.
            return f"the state step of a parameter of shape {tuple(p.shape)} is {step.item()}: a count must be >= 0"
        return None
    return (
        f"the state step of a parameter of shape {tuple(p.shape)} is {_described(step)}: it must be a 0-d float64 "
        f"tensor on {p.device}, as init_state() and load_state_dict() make it"
    )


def _misfit(p: Tensor, specs: dict[str, StateSpec], needed: dict[str, StateSpec], state: dict[str, Any]) -> str | None:
    """A sentence on what does not fit, None if all does. Extra tensors that the user keeps in the state are ignored."""
    made_for = _made_for(state)
    if made_for is not None and made_for != p.shape:
        return f"a parameter is of shape {tuple(p.shape)} now, and its state was made for one of {tuple(made_for)}"
    mine = sharding.shard(p)
    for name, spec in specs.items():
        t, shape = state.get(name), spec.shape(p)
        if t is None and name not in needed:
            continue  # The option was switched on after the state was made: the step adds it.
        dtypes = FLOATS if spec.dtype.is_floating_point else {spec.dtype}
        if not isinstance(t, Tensor) or t.shape != shape or t.dtype not in dtypes or t.layout is not torch.strided:
            wanted = f"of shape {tuple(shape)} in {'a floating dtype' if dtypes is FLOATS else str(spec.dtype)}"
        elif not _has_data(t, p):
            wanted = f"on {p.device}"
        elif sharding.shard(t).shape != spec.shape(mine) or (sharding.is_sharded(t) and mine is p):
            wanted = f"sharded as its parameter is, which has {tuple(mine.shape)} of it here"
        elif overlaps_itself(sharding.shard(t)):
            wanted = f"without two elements in one place of memory; its strides are {t.stride()}"
        else:
            continue
        return f"the state {name} of a parameter of shape {tuple(p.shape)} is {_described(t)}, expected one {wanted}"
    return None


def _has_data(t: Tensor, p: Tensor) -> bool:
    return p.is_meta or not t.is_meta


def _made_for(state: dict[str, Any]) -> torch.Size | None:
    """The shape of the parameter that a state was made for; None if it does not say."""
    row, column = state.get("exp_avg_sq_row"), state.get("exp_avg_sq_col")
    if isinstance(row, Tensor) and isinstance(column, Tensor):
        return torch.Size([*row.shape, *column.shape[-1:]])
    like_p = state.get("exp_avg_sq", state.get("exp_avg"))
    return like_p.shape if isinstance(like_p, Tensor) else None


def _described(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r}"
