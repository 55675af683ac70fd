"""Optimizers on the Triton backend that update parameters and states of their shape element by element."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.triton.rounding import Rounding
from fusedopt.backends.triton.rows import Rows, without_gaps
from fusedopt.backends.triton.stepper import States, TritonStepper, gradients, masters
from fusedopt.interface import ParamSet, ReduceDims
from fusedopt_kernels.elementwise import Elementwise, pieces_of
from fusedopt_kernels.table import LaunchTable


class ElementwiseStepper(TritonStepper):
    """The stepper of such an optimizer for one device."""

    def __init__(self, kernels: Elementwise, device: torch.device) -> None:
        super().__init__(device)
        self.row, self.hyper, self._kernels = kernels.row, kernels.hyper, kernels

    def refresh(
        self, rows: Rows, param_sets: Sequence[ParamSet], params: list[Tensor], states: States, rounding: Rounding
    ) -> None:
        names = self.row.tensors[2:-1]
        columns: list[list[Tensor | None]] = [[] for _ in names]
        for param_set in param_sets:
            used = self.used_states(param_set.hyper)
            for name, column in zip(names, columns):
                if name in used:
                    # Parameters that never had a gradient stand in for states that they do not have: no kernel touches
                    # them.
                    column += [s[name] if s else p for s, p in zip(param_set.states, param_set.params)]
                else:
                    column += [None] * len(param_set.params)

        def like(i: int) -> Tensor:
            p = params[i]
            # For random bits, elements are numbered in the order of contiguous tensors.
            return torch.empty(p.shape, dtype=p.dtype, device=p.device) if rounding.kinds[i] else without_gaps(p)

        grads, master = gradients(param_sets), masters(param_sets)
        rows.refresh(params, grads, *columns, master, like=like, rounding=rounding)
        self._missing = [] if all(states) else [i for i, state in enumerate(states) if not state]

    def used_states(self, hyper: Any) -> Collection[str]:
        """Names of the states that updates with these hyper-parameters read."""
        return self.row.tensors[2:-1]

    def hyper_values(self, hyper: Any) -> dict[str, float | Tensor]:
        return {name: value for name, value in hyper._asdict().items() if name in self.hyper.fields and name != "lr"}

    def fill_rows(self, rows: np.ndarray, param_sets: Sequence[ParamSet], params: list[Tensor]) -> None:
        self._pieces = pieces_of(self._rows.numel)
        self._pieces[self._missing] = 0
        rows["pieces"] = self._pieces

    def make_room(self, table: LaunchTable, measured: bool) -> list[tuple[Tensor, ReduceDims]]:
        self._launches = self._kernels.make_room(table, self._rows.keys, self._pieces, measured)
        return []

    def launch(self, table: LaunchTable, partials: Tensor | None = None) -> None:
        self._kernels.step(table, self._launches, partials)
