"""Sums of squares of gradients on the Triton backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt.backends.graphs import on_device
from fusedopt.backends.triton.capture import Tables
from fusedopt_kernels import norm as kernels
from fusedopt_kernels.layout import is_dense
from fusedopt_kernels.record import cells
from fusedopt_kernels.table import addresses, are_aligned, dtype_codes, launch_keys


class GradNorm:
    """Sums up the squares of the gradients on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables = Tables(device)

    @property
    def captured(self) -> bool:
        """True if there may be a CUDA graph that goes on reading what this holds."""
        return self._tables.captured

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """float64 of any length; its sum is that of all squares."""
        with on_device(self._device):
            # The order of elements does not matter, only gaps between them do.
            dense = [g if g.is_contiguous() or is_dense(g) else g.contiguous() for g in grads]
            rows = kernels.ROW.rows(len(dense))
            rows["grad"] = addresses(dense)
            rows["numel"] = [g.numel() for g in dense]
            keys = launch_keys([dtype_codes([g.dtype for g in dense])], are_aligned(cells(rows)))
            table = self._tables.for_step(rows, None, keep=lambda: dense)
            return kernels.squares(table, keys, rows["numel"])
