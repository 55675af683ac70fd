"""Sums of squares of gradients on the Triton backend."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.capture import Tables, on_device
from fusedopt_kernels import norm as kernels
from fusedopt_kernels.layout import is_dense
from fusedopt_kernels.table import addresses, are_even, dtype_codes, launch_keys


class Squares:
    """Sums up the squares of the gradients on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables = Tables(device)

    @property
    def captured(self) -> bool:
        """Whether there may be a CUDA graph that goes on reading what this holds."""
        return self._tables.captured

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """float64 of any length; its sum is that of all squares."""
        with on_device(self._device):
            # The order of elements does not matter, only gaps between them do.
            dense = [g if g.is_contiguous() or is_dense(g) else g.contiguous() for g in grads]
            rows = np.array([addresses(dense), [g.numel() for g in dense]], np.int64).T
            keys = launch_keys([dtype_codes([g.dtype for g in dense])], are_even(rows))
            table = self._tables.filled(rows, np.zeros((1, 2), np.int64), keep=lambda: dense)
            return kernels.squares(table, keys, rows[:, 1])
