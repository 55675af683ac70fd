"""The parameters of a history: each keeps its row, whatever happens to the groups of the optimizer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from fusedopt.statistics.findings import kinds_of, numel_of
from fusedopt.statistics.values import distinct, names_of

if TYPE_CHECKING:
    from torch import Tensor

    from fusedopt.optimizer.base import FusedOptimizer


class MeasuredParameters:
    """All parameters that an optimizer had while it was watched, in the order in which it got them.

    A tensor that takes the place of another under the same given name, as after `model.to()`, continues its row.

    Attributes:
        names: of the parameters, all different. "group.index" is the place of a parameter when it came.
        kinds: see `kinds_of`.
        numel: how many elements each has.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.names: list[str] = []
        self.kinds: list[tuple[int, str]] = []
        self.numel: list[int] = []
        self._optimizer = optimizer
        self._tensors: list[weakref.ref[Tensor]] = []
        self.rows()

    def rows(self) -> list[int]:
        """Returns the rows of the optimizer's parameters, in the order of its groups; new ones get rows."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        present = set(map(id, params))
        known = {id(p): row for row, tensor in enumerate(self._tensors) if (p := tensor()) is not None}
        left = {name: row for row, name in enumerate(self.names) if id(self._tensors[row]()) not in present}
        rows = []
        for p, name, kind, numel in zip(
            params, names_of(self._optimizer), kinds_of(self._optimizer), numel_of(self._optimizer).tolist()
        ):
            row = known.get(id(p))
            if row is None and kind[1]:  # only a name that was given says that it is the same parameter
                row = left.pop(name, None)
            if row is None:
                row = len(self.names)
                self.names.append(distinct(name, self.names))
                self.kinds.append(kind)
                self.numel.append(numel)
                self._tensors.append(weakref.ref(p))
            elif kind[1] and name not in self.names:
                self.names[row] = name
            self._tensors[row], self.kinds[row], self.numel[row] = weakref.ref(p), kind, numel
            rows.append(row)
        return rows
