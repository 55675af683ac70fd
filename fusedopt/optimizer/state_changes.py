"""What was done to groups and states since the last step: found, checked, and followed."""

import weakref
from itertools import chain, repeat
from operator import attrgetter, is_, is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.optimizer.state import settle_states
from fusedopt.optimizer.state_check import all_fit
from fusedopt.without_data import has_data, is_lazy

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
        # Of a tensor it matters that it is one.
        options = [
            [Tensor if isinstance(group[name], Tensor) else group[name] for name in optimizer.state_options]
            for group in groups
        ]
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
