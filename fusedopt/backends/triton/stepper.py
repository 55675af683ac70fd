"""The step of a rule on one device: brings its launch table up to date, then launches the rule's kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.graphs import on_device
from fusedopt.backends.triton.capture import Tables
from fusedopt.backends.triton.rows import Column, Rows
from fusedopt.backends.triton.scalars import DeviceScalars
from fusedopt.batch import Batch, Control
from fusedopt_kernels.record import Record

States = Sequence[dict[str, Tensor]]


class TritonStepper:
    """What the steppers of all rules have in common. A subclass declares its records and fills in what is its own."""

    row: Record
    """Of the launch table; its tensors are gone through element by element."""

    hyper: Record
    """Of a set of hyper-parameters."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = Rows()
        self._tables = Tables(device)

    @property
    def captured(self) -> bool:
        """True if there may be a CUDA graph that goes on reading what this holds."""
        return self._tables.captured

    def workspace_bytes(self) -> int:
        """Returns the memory on the device that steps hand sums on in, and lists of pieces; 0 before the first step."""
        return self._tables.workspace

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        if not any(_has_work(batch) for batch in batches):
            return
        params = [p for batch in batches for p in batch.params]
        states = [s for batch in batches for s in batch.states]
        with on_device(self._device):
            self.refresh(self._rows, batches, params, states)
            rows = self.row.rows(len(params))
            for name, addresses in zip(self.row.tensors, self._rows.addresses.T):
                rows[name] = addresses
            rows["step"] = self._rows.counts([s.get("step") for s in states])
            rows["numel"] = self._rows.numel
            rows["hyper_index"] = np.repeat(np.arange(len(batches)), [len(batch.params) for batch in batches])
            self.fill_rows(rows, batches, params, states)
            scalars = DeviceScalars(self._device)
            hyper = self._hyper(batches, control, scalars)
            table = self._tables.for_step(rows, hyper, keep=lambda: [params, [dict(s) for s in states], scalars.kept])
            self.launch(table)
            self._rows.copy_back()

    def _hyper(self, batches: Sequence[Batch], control: Control, scalars: DeviceScalars) -> np.ndarray:
        hyper = self.hyper.rows(len(batches))
        hyper["scale"] = scalars.number("scale", control.scale)
        hyper["grad_scale"] = scalars.address(control.grad_scale)
        hyper["found_inf"] = scalars.address(control.found_inf)
        for i, batch in enumerate(batches):
            hyper["shared_steps"][i] = batch.shares_steps
            hyper["sign"][i] = -1.0 if batch.hyper.maximize else 1.0
            if batch.hyper.lr is not None:
                hyper["lr"][i] = scalars.number("lr", batch.hyper.lr)
            for name, value in self.hyper_values(batch.hyper).items():
                hyper[name][i] = value
        return hyper

    # What a subclass fills in.

    def refresh(self, rows: Rows, batches: Sequence[Batch], params: list[Tensor], states: States) -> None:
        """Hands the tensors of this step to `rows`, those of `row.tensors` in their order."""
        raise NotImplementedError

    def fill_rows(self, rows: np.ndarray, batches: Sequence[Batch], params: list[Tensor], states: States) -> None:
        """Fills in the fields of the rows that only this rule has."""

    def hyper_values(self, hyper: Any) -> dict[str, float]:
        """Returns the fields of a set of hyper-parameters that only this rule has."""
        raise NotImplementedError

    def launch(self, table: Any) -> None:
        """Launches the rule's kernels."""
        raise NotImplementedError


def gradients(batches: Sequence[Batch]) -> Column:
    """Returns the gradients of all batches, one per row."""
    return [g for batch in batches for g in batch.grads]


def _has_work(batch: Batch) -> bool:
    # Shared counts go on, although all gradients of this step may belong to parameters of another device.
    return batch.shares_steps or any(g is not None for g in batch.grads)
