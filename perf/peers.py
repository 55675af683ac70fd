"""What is done today with torch's fused AdamW where ours has an option."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Float32Copy(torch.optim.AdamW):
    """On a float32 copy of the weights: gradients are copied there, weights are copied back."""

    def __init__(self, params: Sequence[Tensor], **options: Any) -> None:
        self._params: Any = params
        super().__init__([p.detach().float().requires_grad_() for p in params], **options, fused=True)
        self._copies: Any = self.param_groups[0]["params"]
        for copy in self._copies:
            copy.grad = torch.empty_like(copy)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch._foreach_copy_([copy.grad for copy in self._copies], [p.grad for p in self._params])
        super().step()
        torch._foreach_copy_(self._params, self._copies)


class FusedWithStatistics(torch.optim.AdamW):
    """With the numbers of `track_statistics`: a copy of the weights before the step, norms, differences."""

    def __init__(self, params: Sequence[Tensor], **options: Any) -> None:
        super().__init__(params, **options, fused=True)
        self._params: Any = params
        self._old = [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        torch._foreach_copy_(self._old, self._params)
        gradients = torch._foreach_norm([p.grad for p in self._params])
        weights = torch._foreach_norm(self._old)
        super().step()
        torch._foreach_sub_(self._old, self._params)  # the updates, but for their sign
        updates = torch._foreach_norm(self._old)
        # Of all ways to the largest magnitude the fastest here; the norm of order inf takes eight times as long.
        largest = [torch.maximum(-low, high) for low, high in map(torch.aminmax, self._old)]
        return torch.stack([torch.stack(list(column)) for column in (gradients, weights, updates, largest)])
