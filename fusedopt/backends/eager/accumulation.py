"""Sums of gradients on the eager backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt.backends.eager.rounding import round_into


class Adder:
    """Adds gradients to their sums, for the tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(
        self,
        sums: Sequence[Tensor],
        grads: Sequence[Tensor],
        previous: Sequence[Tensor | None],
        weight: float | Tensor,
    ) -> None:
        """`sums[i] = previous[i] + weight * grads[i]`, without the first term where `previous[i]` is None.

        A weight of 0 adds nothing, whatever the gradients hold. `previous[i]` may be `sums[i]`.
        """
        # torch's own operations round a sum of 16 bits after each factor, and twice what is added to it in float64.
        narrow = any(s.dtype.itemsize < 4 for s in sums)
        if isinstance(weight, Tensor) or (narrow and (weight != 1.0 or any(g.dtype == torch.float64 for g in grads))):
            for s, g, before in zip(sums, grads, previous):
                _add_wide(s, g, before, weight)
            return
        for s, before in zip(sums, previous):
            if before is not None and before is not s:
                s.copy_(before)
        first = [(s, g) for s, g, before in zip(sums, grads, previous) if before is None]
        if first and weight == 0.0:
            torch._foreach_zero_([s for s, _ in first])
        elif first:
            torch._foreach_copy_([s for s, _ in first], [g for _, g in first])
            if weight != 1.0:
                torch._foreach_mul_([s for s, _ in first], weight)
        later = [(s, g) for s, g, before in zip(sums, grads, previous) if before is not None]
        if later and weight != 0.0:
            torch._foreach_add_([s for s, _ in later], [g for _, g in later], alpha=weight)


def _add_wide(s: Tensor, g: Tensor, before: Tensor | None, weight: float | Tensor) -> None:
    """In float32 at least, rounded once: bfloat16 cannot hold a weight of 1001. A tensor is not read on the host."""
    wide = torch.promote_types(torch.promote_types(s.dtype, g.dtype), torch.float32)
    if isinstance(weight, Tensor):
        weight = weight.to(g.device, wide, non_blocking=True)
        term = torch.where(weight == 0.0, 0.0, g.to(wide) * weight)
    else:
        term = g.to(wide) * weight if weight != 0.0 else torch.zeros_like(g, dtype=wide)
    round_into(s, term if before is None else before.to(wide) + term)
