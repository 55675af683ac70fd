"""Sums of gradients on the Triton backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt.backends.graphs import capturing, on_device
from fusedopt.backends.triton.rows import Rows
from fusedopt.backends.triton.scalars import DeviceScalars
from fusedopt_kernels import accumulate as kernels
from fusedopt_kernels.table import LaunchTable


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
        """As `backends.eager.accumulation.Adder`."""
        if capturing(self._device):
            raise RuntimeError(
                "a GradientAccumulator cannot run inside a CUDA graph, whose replays would not move its counts: "
                "capture the backward passes without it, or let torch add the gradients up in .grad"
            )
        with on_device(self._device):
            tensors = Rows()  # a new one each time: it would keep sums alive
            tensors.refresh(sums, grads, previous)
            scalars = DeviceScalars(self._device)
            hyper = kernels.HYPER.rows(1)
            hyper["weight"] = scalars.number("weight", weight)
            rows = kernels.ROW.rows(len(sums))
            for name, addresses in zip(kernels.ROW.tensors, tensors.addresses.T):
                rows[name] = addresses
            rows["numel"] = tensors.numel
            self._table.update(rows, hyper)
            kernels.accumulate(self._table, tensors.keys, tensors.numel)
            tensors.copy_back()
