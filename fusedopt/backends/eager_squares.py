"""Sums of squares of gradients on the eager backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Squares:
    """Sums up the squares of the gradients on one device."""

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """float64 of any length; its sum is that of all squares."""
        wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        norms = torch.stack(list(torch._foreach_norm(list(grads), 2, wide)))
        if norms.device.type == "cpu" and not norms.isfinite().all():
            # Squares of finite gradients beyond 1e19 overflow float32; this is seldom, so it may take its time.
            norms = torch.stack(list(torch._foreach_norm([g.double() for g in grads], 2)))
        return norms.double().square()
