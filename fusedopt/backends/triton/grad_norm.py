"""Sums of squares of gradients on the Triton backend."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.graphs import on_device
from fusedopt.backends.triton.capture import Tables
from fusedopt_kernels import norm as kernels
from fusedopt_kernels.layout import is_dense
from fusedopt_kernels.record import cells
from fusedopt_kernels.table import LaunchTable, address_column, are_aligned, dtype_codes, launch_keys


class GradNorm:
    """Sums up the squares of the gradients on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables = Tables(device)

    @property
    def captured(self) -> bool:
        """True if there may be a CUDA graph that goes on reading what this holds."""
        return self._tables.captured

    def workspace_bytes(self) -> int:
        """Returns the memory on the device that lists of pieces take; 0 before the first step."""
        return self._tables.workspace

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """float64 of any length; its sum is that of all squares."""
        with on_device(self._device):
            # The order of elements does not matter, only gaps between them do.
            dense = [g if g.is_contiguous() or is_dense(g) else g.contiguous() for g in grads]
            rows, keys = _rows_of(dense)
            table = self._tables.for_step(rows, None, keep=lambda: dense)
            return kernels.squares(table, keys, rows["numel"])

    def reserve(self, grads: Sequence[Tensor]) -> int:
        """Returns what `workspace_bytes` would be after a step with such gradients, which may be on "meta"."""
        rows, keys = _rows_of(grads)
        table = LaunchTable(self._device)
        kernels.pieces(table, keys, rows["numel"])
        return table.workspace


def _rows_of(grads: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of dense gradients, and their launch classes."""
    rows = kernels.ROW.rows(len(grads))
    rows["grad"] = address_column(grads)
    rows["numel"] = list(map(Tensor.numel, grads))
    return rows, launch_keys([dtype_codes([g.dtype for g in grads])], are_aligned(cells(rows)))
