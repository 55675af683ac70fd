"""Whether a step is skipped, on the eager backend, whose steps have to know it in any case."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusedopt_kernels import rules


class Verdict:
    """Judges the gradient norms of the steps on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, norm: Tensor, found_inf: Tensor | None, ledger: Tensor, limits: rules.Limits) -> Tensor:
        """Returns the flag of `fusedopt_kernels.verdict`, and brings the ledger up to date. Waits for the device."""
        flag, write = self.prepare(norm, found_inf, ledger, limits)
        write()
        return flag

    def prepare(
        self, norm: Tensor, found_inf: Tensor | None, ledger: Tensor, limits: rules.Limits
    ) -> tuple[Tensor, Callable[[], object]]:
        """Returns the flag, and what brings the ledger up to date, which takes no memory."""
        found = 0.0 if found_inf is None else float(found_inf)
        *skipped, count, mean, variance = ledger.tolist()
        reason, *moments = rules.skip_verdict(
            float(norm),
            found == 0.0,
            count,
            mean,
            variance,
            *limits,
            where=lambda condition, x, y: x if condition else y,
            sqrt=math.sqrt,
            minimum=min,
            maximum=max,
        )
        if reason:
            skipped[int(reason) - 1] += 1.0
        new = torch.tensor([*skipped, *moments], dtype=torch.float64, device="cpu")
        return torch.tensor(reason or found, dtype=torch.float32, device=self._device), lambda: ledger.copy_(new)
