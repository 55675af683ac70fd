"""Sums of gradients on the Triton backend."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.capture import capturing, on_device
from fusedopt.backends.numbers import DeviceNumbers
from fusedopt.backends.rows import Rows
from fusedopt_kernels import accumulate as kernels
from fusedopt_kernels.table import LaunchTable, float_bits


class Adder:
    """Adds gradients to their sums, for the tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._table = LaunchTable(device)

    def __call__(
        self,
        sums: Sequence[Tensor],
        grads: Sequence[Tensor],
        previous: Sequence[Tensor | None],
        weight: float | Tensor,
    ) -> None:
        """As `eager_accumulate.Adder`."""
        if capturing(self._device):
            raise RuntimeError(
                "a GradientAccumulator cannot run inside a CUDA graph, whose replays would not move its counts: "
                "capture the backward passes without it, or let torch add the gradients up in .grad"
            )
        with on_device(self._device):
            rows = Rows()  # a new one each time: it would hold on to sums that nobody else needs any more
            rows.look(sums, grads, previous)
            numbers = DeviceNumbers(self._device)
            value, at32, at64 = numbers.number("weight", weight)
            hyper = np.array([[*float_bits([value]), at32, at64, 0]], np.int64)
            self._table.update(np.column_stack([rows.addresses, rows.numel]), hyper)
            kernels.accumulate(self._table, rows.keys, rows.numel)
            rows.copy_back()
