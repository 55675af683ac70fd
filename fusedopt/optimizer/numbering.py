"""The numbers that tell parameters apart where their random bits are made."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
