"""Sums of squares of gradients on the eager backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt.backends.eager.norms import is_large, part_norms


class Squares:
    """Sums up the squares of the gradients on one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """float64 of any length; its sum is that of all squares."""
        norms = _norms(grads, torch.float32)
        if self._on_cpu and not (norms.isfinite().all() and norms.any()):
            # Squares of finite gradients beyond 1e19 overflow float32, those below 1e-23 vanish; this is seldom, so it
            # may take its time.
            norms = _norms(grads, torch.float64)
        return norms.square()


def _norms(grads: Sequence[Tensor], least: torch.dtype) -> Tensor:
    """Norms of disjoint parts, which are the gradients together; float64, worked out in `least` or wider."""
    parts: list[Tensor] = []
    small: list[Tensor] = []
    # From the last to the first, with which the step begins: it finds it in the cache.
    for g in reversed(grads):
        if is_large(g):
            parts.extend(part_norms(g, least))
        else:
            small.append(g)
    if small:
        widest = torch.float64 if any(g.dtype == torch.float64 for g in small) else least
        parts.append(torch.stack(torch._foreach_norm(small, 2, widest)))
    return torch.cat([part.double() for part in parts])
