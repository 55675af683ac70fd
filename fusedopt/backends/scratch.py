"""Memory that a step on the CPU uses again and again, so that it stays in the cache."""

import torch
from torch import Tensor


class Scratch:
    """Room for tensors of up to some elements, the same at every step; grows where one is larger."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.Size], Tensor] = {}

    def like(self, t: Tensor, use: str, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the shape of `t`; another one for another `use`."""
        view = self._views.get((use, dtype, t.shape))
        if view is None:
            flat = self._flat.get((use, dtype))
            if flat is None or flat.numel() < t.numel():
                flat = self._flat[use, dtype] = torch.empty(max(self._elements, t.numel()), dtype=dtype)
            view = self._views[use, dtype, t.shape] = flat[: t.numel()].view(t.shape)
        return view
