"""Counts the steps that were not skipped, on the host or on the device that knows which were."""

from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels.memory import outside_inference_mode

Groups = list[dict[str, Any]]


class StepCount:
    """The number of an optimizer's steps without skipped ones: `iterations` of its param groups, and a tensor.

    A device decides if a step is skipped, and a CUDA graph is replayed without Python. From the first such step on,
    only the tensor is up to date, until `read` waits for it.

    `device` is always the one that counts; None: the host counts.

    Example:
        >>> groups, count, device = [{"iterations": 3}], StepCount(), torch.device("cpu")
        >>> count.tensor(groups, device)
        tensor(3., dtype=torch.float64)
        >>> count.advance(groups, device, skips=torch.tensor(1.0))
        >>> count.advance(groups, device, skips=torch.tensor(0.0))
        >>> groups[0]["iterations"], count.read(groups)
        (3, 4)
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._counts: Tensor | None = None  # memory for 1 or 0
        self._host_is_behind = False

    def read(self, groups: Groups) -> int:
        """Returns the number, and brings `iterations` up to date; waits for the device if it may know more."""
        if self._host_is_behind:
            assert self._tensor is not None
            taken = int(self._tensor)
            for group in groups:
                group["iterations"] = taken
        return int(groups[0]["iterations"]) if groups else 0

    def tensor(self, groups: Groups, device: torch.device) -> Tensor:
        """Returns the number as a 0-d float64 tensor, the same one at every call.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the tensor does not exist yet.
        """
        if self._tensor is None:
            if capturing():
                raise RuntimeError(
                    "a CUDA graph is being captured before the optimizer counts its steps on the device, which every "
                    "replay would start again: take one step before the capture"
                )
            with outside_inference_mode():
                self._counts = torch.empty((), dtype=torch.bool, device=device)
                self._tensor = torch.full((), float(groups[0]["iterations"]), dtype=torch.float64, device=device)
        elif self._tensor.device != device:
            self._counts = torch.empty((), dtype=torch.bool, device=device)
            self._tensor = self._tensor.to(device)
        return self._tensor

    def current(self, groups: Groups, device: torch.device | None) -> int | Tensor:
        """Returns the number as an int, or as a tensor where the host would have to wait for it."""
        if device is not None and (self._host_is_behind or capturing()):
            return self.tensor(groups, device)
        return self.read(groups)

    def advance(self, groups: Groups, device: torch.device | None, skips: Tensor | None) -> None:
        """Counts a step, unless `skips` is not 0."""
        if device is None:
            self.read(groups)
            self._tensor, self._host_is_behind = None, False
            if skips is not None and bool(skips):
                return
        else:
            taken = self.tensor(groups, device)
            if skips is None:
                taken += 1.0
            else:
                taken += torch.eq(skips.to(device, non_blocking=True).reshape(()), 0.0, out=self._counts)
            self._host_is_behind = self._host_is_behind or skips is not None or capturing()
            if self._host_is_behind:
                return
        for group in groups:
            group["iterations"] += 1


def capturing() -> bool:
    """True if a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
