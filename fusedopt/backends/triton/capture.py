"""Steps inside a CUDA graph.

A graph copies its tables from the host again whenever it is replayed, so each captured step gets tables of its own, out
of pinned memory that is used for nothing else, and both are kept. That memory has to exist before the capture, during
which none can be had: eager steps see to it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.graphs import capturing
from fusedopt_kernels.memory import lasting
from fusedopt_kernels.table import LaunchTable

_CAPTURES = 16
"""Captured steps in a row that there is memory for, at least: a table takes some 100 kB per thousand parameters."""


_reserves: dict[torch.device, Tensor] = {}
"""Pinned memory for the captured steps to come, int64: one block per device, of which each capture takes a piece."""


def _reserve(device: torch.device) -> Tensor:
    return _reserves.get(device, lasting((0,), torch.int64, "cpu"))


class Tables:
    """The launch tables of one optimizer on one device: one for all eager steps, one for each captured step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._eager = LaunchTable(device)
        self._kept: list[object] = []

    @property
    def captured(self) -> bool:
        """True if there may be a graph that reads these tables."""
        return bool(self._kept)

    @property
    def workspace(self) -> int:
        """Bytes on the device that eager steps hold, besides the tables."""
        return self._eager.workspace

    def for_step(self, rows: np.ndarray, hyper: np.ndarray | None, keep: Callable[[], object]) -> LaunchTable:
        """The table for this step, with these contents; `keep` says what must live as long as a captured step.

        Raises:
            RuntimeError: during a capture, if the eager steps before it have not made room.
        """
        if capturing(self._device):
            table = self._eager.for_capture(self._copy_at_every_replay)
            table.update(rows, hyper)
            self._kept.append((table, keep()))
            return table
        self._eager.update(rows, hyper)
        # Twice the table, since a captured step may have to bring chunks of its own.
        size = 2 * _CAPTURES * (self._eager.hyper.numel() + self._eager.rows.numel())
        if self._device not in _reserves or 2 * _reserves[self._device].numel() < size:
            _reserves[self._device] = lasting((size,), torch.int64, "cpu", pinned=self._device.type == "cuda")
        return self._eager

    def _copy_at_every_replay(self, host: np.ndarray, device: torch.device) -> Tensor:
        reserve = _reserve(self._device)
        if host.size > len(reserve):
            raise RuntimeError(
                "there is no pinned memory for another captured step, and none can be had during a capture: take one "
                "step outside of a graph before this one is captured"
            )
        staging, _reserves[self._device] = reserve[: host.size].view(host.shape), reserve[host.size :]
        self._kept.append(staging)
        staging.numpy()[...] = host
        return lasting(host.shape, torch.int64, device).copy_(staging, non_blocking=True)
