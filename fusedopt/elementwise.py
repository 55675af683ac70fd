"""Optimizers whose states have the shape and the layout of their parameter."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fusedopt.optimizer.base import FusedOptimizer
from fusedopt.precision import FREEZING, Precision, StateSpec


class ElementwiseOptimizer(FusedOptimizer):
    """Base of such optimizers. A subclass declares `rule`, `checks`, `hyper` and `state_names`."""

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        """Returns the names of the tensors in the state of a parameter, without `step`."""
        raise NotImplementedError

    def moments(self, p: Tensor, group: dict[str, Any]) -> dict[str, StateSpec]:
        precision = Precision.of(group, self.seed)
        return {name: precision.moment(p.dtype, stochastic=name in FREEZING) for name in self.state_names(group)}
