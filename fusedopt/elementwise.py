"""Optimizers whose state is of the shape, the dtype and the layout of its parameter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt.optimizer.base import FusedOptimizer


class ElementwiseOptimizer(FusedOptimizer):
    """Base of such optimizers. A subclass declares `rule`, `checks`, `hyper` and `state_names`."""

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        """Returns the names of the tensors in the state of a parameter, without `step`."""
        raise NotImplementedError

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in self.state_names(group)}

    def state_shapes(self, p: Tensor, group: dict[str, Any]) -> dict[str, torch.Size]:
        return dict.fromkeys(self.state_names(group), p.shape)
