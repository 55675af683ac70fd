"""Whether a step is skipped, on the Triton backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from fusedopt.backends.graphs import capturing, on_device
from fusedopt_kernels import verdict as kernels
from fusedopt_kernels.rules import Limits


class Verdict:
    """Judges the gradient norms of the steps on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ran: set[tuple[bool, Limits]] = set()
        self._kept: list[object] = []

    @property
    def captured(self) -> bool:
        """True if there may be a CUDA graph that goes on reading what this holds."""
        return bool(self._kept)

    def __call__(self, norm: Tensor, found_inf: Tensor | None, ledger: Tensor, limits: Limits) -> Tensor:
        """See `fusedopt_kernels.verdict`. Waits for nothing; raises as `prepare` does."""
        flag, write = self.prepare(norm, found_inf, ledger, limits)
        write()
        return flag

    def prepare(
        self, norm: Tensor, found_inf: Tensor | None, ledger: Tensor, limits: Limits
    ) -> tuple[Tensor, Callable[[], object]]:
        """Returns the memory of the flag, and what launches the kernel, which takes none.

        Raises:
            RuntimeError: during a capture, limits that no step before it had: the kernel may not be compiled yet.
        """
        variant = found_inf is None, limits
        if capturing(self._device) and variant not in self._ran:
            raise RuntimeError(
                "a CUDA graph is being captured, and no step before it had these limits for norms: take one step like "
                "the captured one before the capture, so that its kernels are compiled"
            )
        flag = torch.empty((), dtype=torch.float32, device=self._device)

        def write() -> None:
            self._ran.add(variant)
            with on_device(self._device):
                kernels.verdict(norm, found_inf, ledger, limits, flag)
            if capturing(self._device):
                self._kept.append((norm, found_inf, ledger, flag))

        return flag, write
