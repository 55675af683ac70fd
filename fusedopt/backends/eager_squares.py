"""Sums of squares of gradients on the eager backend."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fusedopt.backends.scratch import Scratch
from fusedopt_kernels.layout import is_dense

ROW = 1 << 10
"""Elements whose squares are added up at a time. torch's norm of a whole tensor runs on one thread and adds up in
float32: of 25.7 M normal numbers it was off by 8e-4, the norm of such rows' norms by 3e-10. On 49.9 M elements in 90
tensors and two threads, rows of 128, 1,024 and 16,384 elements took 8.9, 8.5 and 8.1 ms, torch's norms 11.3."""

PIECE = 1 << 20
"""Elements that are read at a time: 16-bit gradients through a float32 copy of this size, 6 times as fast on two
threads as torch's norm of them."""

_SMALL = 1 << 14
"""Elements up to which a gradient is one of a list of whole tensors."""


class Squares:
    """Sums up the squares of the gradients on one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._scratch = Scratch(PIECE)

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """float64 of any length; its sum is that of all squares."""
        norms = self._norms(grads, torch.float32)
        if self._on_cpu and not norms.isfinite().all():
            # Squares of finite gradients beyond 1e19 overflow float32; this is seldom, so it may take its time.
            norms = self._norms(grads, torch.float64)
        return norms.square()

    def _norms(self, grads: Sequence[Tensor], least: torch.dtype) -> Tensor:
        """Norms of disjoint parts, which are the gradients together; float64, worked out in `least` or wider."""
        parts: list[Tensor] = []
        whole: list[Tensor] = []
        # From the last to the first, with which the step begins: it finds it in the cache.
        for g in reversed(grads):
            if self._on_cpu and g.numel() > _SMALL:
                g = g if is_dense(g) else g.contiguous()
                rows, rest = g.as_strided((g.numel(),), (1,)).tensor_split([g.numel() // ROW * ROW])
                parts.extend(self._row_norms(rows, torch.promote_types(g.dtype, least)))
                whole.append(rest)
            else:
                whole.append(g)
        if whole:
            widest = torch.float64 if any(g.dtype == torch.float64 for g in whole) else least
            parts.append(torch.stack(torch._foreach_norm(whole, 2, widest)))
        return torch.cat(parts).double()

    def _row_norms(self, flat: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        for piece in reversed(flat.split(PIECE)):
            if piece.dtype != dtype:
                piece = self._scratch.like(piece, "gradient", dtype).copy_(piece)
            yield torch.linalg.vector_norm(piece.view(-1, ROW), dim=1)
