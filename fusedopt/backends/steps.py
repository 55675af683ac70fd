"""Step counts on the host: many 0-d tensors advanced and read as one."""

import torch
from torch import Tensor


class StepCounts:
    """Keeps the `step` of many states as views of one flat tensor, so that thousands are advanced in one operation."""

    def __init__(self) -> None:
        self._views: list[Tensor] = []
        self._flat = torch.empty(0)

    def advance(self, states: list[dict[str, Tensor]]) -> list[float]:
        """Adds one to every count and returns the new counts. On a device other than the CPU this synchronises."""
        if len(states) != len(self._views) or any(s["step"] is not view for s, view in zip(states, self._views)):
            self._flat = torch.stack([s["step"] for s in states])
            self._views = list(self._flat.unbind())
            for s, view in zip(states, self._views):
                s["step"] = view
        self._flat += 1
        return self._flat.tolist()
