"""States as a step finds them: each must fit its parameter, whatever was done to either since the last step."""

import weakref
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import checks, sharding
from fusedopt.checks import FLOATS

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

_NONE: dict[str, Any] = {}
_WAY_OUT = (
    "nothing was changed: delete optimizer.state[parameter] to begin with a new state, or load a checkpoint that fits"
)


class _Seen(NamedTuple):
    """What was found right. Weak references: whoever deletes a state wants its memory now, not after the next step."""

    options: list[list[Any]]
    shapes: list[torch.Size]
    values: list["weakref.ref[Tensor]"]
    sizes: list[int]


class StateCheck:
    """Looks at parameters and states before a step; only at what is not as it was, since thousands are common.

    Attributes:
        regrouped: whether the groups do not hold the parameters that they held at the last look.
        missing: whether a parameter with a gradient has no state.
        moved: whether a state is not on the device of its parameter.
        incomplete: whether a state lacks what an option of its group asks for.
    """

    def __init__(self) -> None:
        self.missing = self.moved = self.incomplete = False
        self.regrouped = True
        self._params: list[list[int]] = []
        self._seen: _Seen | None = None

    def __call__(
        self, optimizer: "FusedOptimizer", grads: list[list[Tensor | None]], shapes: list[torch.Size] | None
    ) -> None:
        """Looks at what the coming step works on.

        Args:
            optimizer: whose groups and states they are.
            grads: one gradient, or None, per parameter of each group.
            shapes: of all parameters, if the caller has them.

        Raises:
            ValueError: a parameter comes twice.
            RuntimeError: a state that the step needs does not fit its parameter, or is broken.
        """
        groups = optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        states: list[dict[str, Any]] = list(map(optimizer.state.get, params, repeat(_NONE)))
        ids = [list(map(id, group["params"])) for group in groups]
        self.regrouped = ids != self._params
        self.missing = self.moved = self.incomplete = False
        if not all(states):
            shapes = None  # A lazy parameter has none yet, nor a state.
            params = [p for p, state in zip(params, states) if state]
            self.missing = any(g is not None and not s for g, s in zip(chain.from_iterable(grads), states))
        values = list(chain.from_iterable(map(dict.values, states)))
        options = [[group[name] for name in optimizer.state_options] for group in groups]
        if shapes is None:
            shapes = list(map(attrgetter("shape"), params))
        if not self.regrouped and self._are_as_before(options, shapes, values):
            return
        self._seen = None
        if self.regrouped:
            checks.no_parameter_twice(groups)
            self._params = ids
        if self._all_fit(optimizer, grads) and all(isinstance(value, Tensor) for value in values):
            sizes = list(map(Tensor.numel, values))
            self._seen = _Seen(options, shapes, list(map(weakref.ref, values)), sizes)

    def _are_as_before(self, options: list[list[Any]], shapes: list[torch.Size], values: list[Any]) -> bool:
        seen = self._seen
        return (
            seen is not None
            and options == seen.options
            and shapes == seen.shapes
            and len(values) == len(seen.values)
            and all(map(is_, values, [value() for value in seen.values]))
            and list(map(Tensor.numel, values)) == seen.sizes
        )

    def _all_fit(self, optimizer: "FusedOptimizer", grads: list[list[Tensor | None]]) -> bool:
        """Whether all states fit, those that this step leaves alone too; raises for one that it needs."""
        counts_all = optimizer.shares_steps()
        fit = True
        for group, row in zip(optimizer.param_groups, grads):
            for p, g in zip(group["params"], row):
                state = optimizer.state.get(p)
                if not state:
                    continue
                miscounted, misfit = _wrong_count(p, state), _misfit(optimizer, p, group, state)
                wrong = misfit or miscounted
                if wrong and g is not None:
                    raise RuntimeError(f"{wrong}; {_WAY_OUT}")
                if miscounted and counts_all:
                    raise RuntimeError(f"{miscounted}; {_WAY_OUT}")
                fit = fit and not wrong
                self.moved |= any(isinstance(t, Tensor) and t.device != p.device for t in state.values())
                self.incomplete |= not optimizer.state_shapes(p, group).keys() <= state.keys()
        return fit


def _wrong_count(p: Tensor, state: dict[str, Any]) -> str | None:
    step = state.get("step")
    if isinstance(step, Tensor) and step.dim() == 0 and step.dtype is torch.float32 and _has_data(step, p):
        return None
    return (
        f"the state step of a parameter of shape {tuple(p.shape)} is {_described(step)}: it must be a 0-d float32 "
        f"tensor on {p.device}, as init_state() and load_state_dict() make it"
    )


def _misfit(optimizer: "FusedOptimizer", p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> str | None:
    """What does not fit, as a sentence. Whether tensors of the user's own are beside the state does not matter."""
    made_for = _made_for(state)
    if made_for is not None and made_for != p.shape:
        return f"a parameter is of shape {tuple(p.shape)} now, and its state was made for one of {tuple(made_for)}"
    mine = sharding.shard(p)
    of_shard = optimizer.state_shapes(mine, group)
    for name, shape in optimizer.state_shapes(p, group).items():
        t = state.get(name)
        if t is None and name in optimizer.optional_states:
            continue  # The option was switched on after the state was made: the step adds it.
        if not isinstance(t, Tensor) or t.shape != shape or t.dtype not in FLOATS or t.layout is not torch.strided:
            wanted = f"of shape {tuple(shape)} in a floating dtype"
        elif not _has_data(t, p):
            wanted = f"on {p.device}"
        elif sharding.shard(t).shape != of_shard[name] or (sharding.is_sharded(t) and mine is p):
            wanted = f"sharded as its parameter is, which has {tuple(mine.shape)} of it here"
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
    squares = state.get("exp_avg_sq")
    return squares.shape if isinstance(squares, Tensor) else None


def _described(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r}"
