"""The numbers that tell parameters apart where their random bits are made."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fusedopt import sharding
from fusedopt.backends.graphs import capturing
from fusedopt.precision import NUMBER
from fusedopt.without_data import has_data

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer


class Numbers:
    """Gives the parameters of one optimizer the numbers that their random bits depend on; none is given twice.

    A parameter's number is its place among all parameters when it gets its state, the same in every process, or
    else, if another parameter has that number by then, the next free one.
    """

    def __init__(self) -> None:
        # Not weak: `torch.utils.swap_tensors`, as `model.to()` may call it, takes no parameter with weak references.
        self._places: dict[Tensor, int] | None = None
        self._used: set[int] = set()
        self._known: Any = WeakIdKeyDictionary()  # what the host knows of tensors: version and number

    def give(self, optimizer: "FusedOptimizer", params: list[Tensor], new: bool = False) -> None:
        """Gives a number to those of these parameters, all on one device, that need one and have none yet.

        Waits for the device where it does not know which have one; `new`: none of them has.

        Raises:
            RuntimeError: it does not know, and a CUDA graph is being captured.
        """
        params = [p for p in params if NUMBER in optimizer.state[p] and has_data(optimizer.state[p][NUMBER])]
        if not new:
            have = self._numbers([optimizer.state[p][NUMBER] for p in params])
            params = [p for p, number in zip(params, have) if number < 0]
        if not params:
            return
        if self._places is None:
            everything = (p for group in optimizer.param_groups for p in group["params"])
            self._places = {p: i for i, p in enumerate(everything)}
            given = set(params) if new else set()
            states = [
                state[NUMBER]
                for p, state in optimizer.state.items()
                if isinstance(state, dict) and NUMBER in state and p not in given
            ]
            self._used = set(self._numbers(list(filter(has_data, states))))
        numbers: list[int] = []
        for p in params:
            place = self._places.get(p, -1)
            number = place if place >= 0 and place not in self._used else max(self._used, default=-1) + 1
            self._used.add(number)
            numbers.append(number)
        tensors = torch.tensor(numbers, dtype=torch.int64, device=params[0].device).unbind()
        for p, number, t in zip(params, numbers, tensors):
            optimizer.state[p][NUMBER] = t
            self._known[t] = sharding.version(t), number

    def _numbers(self, tensors: list[Tensor]) -> list[int]:
        """Returns the numbers in tensors, of which it remembers those that nothing has been written to since."""
        unknown: dict[torch.device, list[Tensor]] = {}
        for t in tensors:
            if self._known.get(t, (None, 0))[0] != sharding.version(t):
                unknown.setdefault(t.device, []).append(t)
        for device, own in unknown.items():
            if capturing(device):
                raise RuntimeError(
                    "a CUDA graph is being captured, and the states have numbers for random rounding that were loaded "
                    "or written since the last step: take a step before the capture, which may wait for the device"
                )
            for t, number in zip(own, torch.stack(own).tolist()):
                self._known[t] = sharding.version(t), number
        return [self._known[t][1] for t in tensors]
