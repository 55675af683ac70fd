"""Sums of squares of gradients on the eager backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt.backends.eager.norms import are_kept, is_large, part_norms, small_norms


class GradNorm:
    """Sums up the squares of the gradients on one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """float64 of any length; its sum is that of all squares."""
        squares = _squares(grads, torch.float32)
        if self._on_cpu and not are_kept(float(squares.sum()), sum(map(Tensor.numel, grads))):
            squares = _squares(grads, torch.float64)
        return squares


def _squares(grads: Sequence[Tensor], least: torch.dtype) -> Tensor:
    """Sums of squares of disjoint parts, which are the gradients together; float64, worked out in `least` or wider."""
    parts: list[Tensor] = []
    small: list[Tensor] = []
    # From the last to the first, with which the step begins: it finds it in the cache.
    for g in reversed(grads):
        if is_large(g):
            parts.extend(part_norms(g, least))
        else:
            small.append(g)
    if small:
        parts.append(torch.stack(list(small_norms(small, least))))
    return torch.cat([part.double() for part in parts]).square_()
