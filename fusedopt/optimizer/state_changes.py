"""What was done to groups and states since the last step: found, checked, and followed."""

import weakref
from itertools import chain, repeat
from operator import attrgetter, is_, is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.optimizer.looks import Looks, are_plain
from fusedopt.optimizer.state import settle_states
from fusedopt.optimizer.state_check import all_fit
from fusedopt.without_data import has_data, is_lazy

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

_NONE: dict[str, Any] = {}


def states_of(optimizer: "FusedOptimizer", params: list[Tensor]) -> list[dict[str, Any]]:
    """Returns the state of each parameter, {} for none."""
    state = optimizer.state
    # To look a tensor up takes long. Mostly, states are those of all parameters in their order.
    if len(state) == len(params) and all(map(is_, state, params)):
        return list(state.values())
    return list(map(state.get, params, repeat(_NONE)))


def _state_options(optimizer: "FusedOptimizer", groups: list[dict[str, Any]]) -> list[list[Any]]:
    """Returns the options that decide which states there are; of a tensor it matters that it is one."""
    return [
        [Tensor if isinstance(group[name], Tensor) else group[name] for name in optimizer.state_options]
        for group in groups
    ]


def _kinds_of(values: list[Tensor]) -> list[list[Any]]:
    """Returns what `t.data = ...` may change of tensors that stay the same."""
    dense = [t.layout is torch.strided and t.is_contiguous() for t in values]
    return [dense, *(list(map(read, values)) for read in (Tensor.numel, attrgetter("dtype"), attrgetter("device")))]


class States:
    """Brings the states of some groups to what the coming step needs: `check`, which may raise, then `settle`.

    Looks closely only at what is not as it was, since thousands are common. Where `recognised` finds all of it as it
    was, there is nothing to check or to settle.

    Attributes:
        regrouped: True if the groups hold other parameters than at the last check.
        missing: True if a parameter with a gradient has no state.
        devices: those of the parameters, in the order of the first on each.
        some_without_data: True if there are parameters without data.
        tensors: stands for the tensors of this step: the same object as at an earlier step if parameters and states
            are the same tensors, and they and the gradients look as they did then. None if that is not known.
    """

    def __init__(self) -> None:
        self.regrouped = True
        self.missing = self.some_without_data = False
        self.devices: list[torch.device] = []
        self.tensors: object | None = None
        self._looks = Looks()
        self._recognised: tuple[Any, ...] | None = None
        self._all_devices: list[torch.device] = []
        self._in_inference_mode = self._settled = self._as_before = self._plain = False
        self._params: list[list[int]] = []
        self._seen: tuple[Any, ...] | None = None  # what was found right
        # Weak references: deleting a state frees its memory at once, not after the next step.
        self._values: list[weakref.ref[Tensor]] = []
        self._kinds: list[list[Any]] = []

    def recognised(
        self,
        optimizer: "FusedOptimizer",
        groups: list[dict[str, Any]],
        grads: list[list[Tensor | None]],
    ) -> list[dict[str, Any]] | None:
        """Returns the states of all parameters if the coming step has the tensors of the last one, else None.

        These are the parameters, which of them have a gradient, the names and the tensors of all states, and the
        options that decide which these are; and all tensors, gradients included, look as they did. Then checks of them
        would find what they found, which was nothing, and what was derived from them holds. Only addresses may have
        changed, and what tensors hold.
        """
        if not self._looks:
            self.tensors = None
            return None
        now, tensors, states = self._all_of(optimizer, groups, grads)
        values = tensors[len(tensors) - len(self._values) :]
        if now == self._recognised and all(map(is_, values, self._known())) and self._looks.same(tensors):
            return states
        self._looks.miss()
        self.tensors = None
        return None

    def learn(
        self, optimizer: "FusedOptimizer", groups: list[dict[str, Any]], grads: list[list[Tensor | None]]
    ) -> None:
        """Remembers what a step has that was checked, to recognise it. Not while states are still to be made or moved.

        Sharded and lazy parameters are not recognised: they are of types that `Looks` does not remember.
        """
        fit = self._plain and self._as_before and self._settled and not self.missing and not self.some_without_data
        if fit and self._looks.due():
            self._recognised, tensors, _ = self._all_of(optimizer, groups, grads)
            self.tensors = object() if self._looks.learn(tensors) else None

    def _all_of(
        self, optimizer: "FusedOptimizer", groups: list[dict[str, Any]], grads: list[list[Tensor | None]]
    ) -> tuple[tuple[Any, ...], list[Any], list[dict[str, Any]]]:
        """Returns what else there is to compare, all tensors, those of states last, and the states."""
        params = [p for group in groups for p in group["params"]]
        ids = [list(map(id, group["params"])) for group in groups]
        states = states_of(optimizer, params)
        flat = [g for row in grads for g in row if g is not None]
        without = None if len(flat) == len(params) else [[g is None for g in row] for row in grads]
        values = chain.from_iterable(map(dict.values, states))
        tensors = [*params, *flat, *values]
        names = list(chain.from_iterable(states)), list(map(len, states))
        return (ids, without, names, _state_options(optimizer, groups)), tensors, states

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
        states = states_of(optimizer, params)
        ids = [list(map(id, group["params"])) for group in groups]
        self.regrouped = ids != self._params
        self.missing = False
        if not all(states):
            shapes = None  # A lazy parameter has none yet, nor a state.
            params = [p for p, state in zip(params, states) if state]
            self.missing = any(g is not None and not s for g, s in zip(chain.from_iterable(grads), states))
        values = list(chain.from_iterable(map(dict.values, states)))
        if shapes is None:
            shapes = list(map(attrgetter("shape"), params))
        now = _state_options(optimizer, groups), shapes, list(map(attrgetter("dtype"), params))
        self._as_before = not self.regrouped and now == self._seen and self._are_the_same(values)
        if self._as_before:
            return
        self._seen, self._settled, self._plain = None, False, are_plain(params)
        if self.regrouped:
            checks.no_parameter_twice(groups)
        fit = all_fit(optimizer, groups, grads)
        self._params = ids
        if fit and all(isinstance(value, Tensor) for value in values):
            self._seen, self._values, self._kinds = now, list(map(weakref.ref, values)), _kinds_of(values)

    def _are_the_same(self, values: list[Any]) -> bool:
        known = self._known()
        # A dead reference gives None, and a state may hold None too.
        same = len(values) == len(known) and all(map(is_, values, known)) and all(map(is_not, known, repeat(None)))
        return same and _kinds_of(values) == self._kinds

    def _known(self) -> list[Tensor | None]:
        return [value() for value in self._values]

    def _look_at(self, params: list[Tensor]) -> None:
        devices = list(map(attrgetter("device"), params))
        mode = torch.is_inference_mode_enabled()
        if devices != self._all_devices or mode is not self._in_inference_mode or self._seen is None:
            for p in params:
                if not mode and not is_lazy(p) and p.is_inference():
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} was made in torch.inference_mode() and can only be "
                        "updated there: make the model outside of it, or step in it"
                    )
            self._all_devices, self._in_inference_mode, self._settled = devices, mode, False
            self.devices = list(dict.fromkeys(devices))
        if not self._settled or self.some_without_data:
            self.some_without_data = not all(map(has_data, params))

    def settle(self, optimizer: "FusedOptimizer", groups: list[dict[str, Any]]) -> None:
        """Brings the states that there are to where and what their parameters and options are now."""
        if not self._settled:
            settle_states(optimizer, groups)
            self._settled = True
