"""Norms of tensors: of large ones on the CPU as exact as of small ones, and on all threads; right at all magnitudes."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.scratch import scratch
from fusedopt_kernels.layout import is_dense

_ROW = 1 << 10
"""Elements whose squares are added up at a time. torch's norm of a whole tensor runs on one thread and adds up in
float32: of 25.7 M normal numbers it was off by 8e-4, the norm of such rows' norms by 3e-10. On 49.9 M elements in 90
tensors and two threads, rows of 128, 1,024 and 16,384 elements took 8.9, 8.5 and 8.1 ms, torch's norms 11.3."""

_PIECE = 1 << 20
"""Elements that are read at a time: 16-bit tensors through a float32 copy of this size, 6 times as fast on two threads
as torch's norm of them."""

_LARGE = 1 << 14
"""Elements beyond which a tensor on the CPU is cut."""

_LEAST_MEAN_SQUARE = 2.0**-100
"""Squares below 2^-126 vanish in float32, or are coarse. Where the mean of all squares is above this, what was lost is
less than 2^-26 of it; where it is not, they are worked out again in float64: gradients whose root mean square is below
1e-15 are seldom."""


def is_large(t: Tensor) -> bool:
    """True if `part_norms` is the better norm of `t` than torch's."""
    return t.device.type == "cpu" and t.numel() > _LARGE


def are_kept(squares: float, numel: int) -> bool:
    """True if a float32 sum of `numel` squares is right: nothing overflowed, and what underflowed does not matter."""
    return _LEAST_MEAN_SQUARE * numel < squares < math.inf


def part_norms(t: Tensor, least: torch.dtype) -> Iterator[Tensor]:
    """Norms of the parts of a large tensor from its last to its first, 1-d tensors, worked out in `least` or wider."""
    t = t if is_dense(t) else t.contiguous()
    rows, rest = t.as_strided((t.numel(),), (1,)).tensor_split([t.numel() // _ROW * _ROW])
    dtype = torch.promote_types(t.dtype, least)
    if len(rest):
        yield torch.linalg.vector_norm(rest, dtype=dtype).reshape(1)
    for piece in reversed(rows.split(_PIECE)):
        if piece.dtype != dtype:
            piece = scratch.like(piece, "gradient", dtype).copy_(piece)
        yield torch.linalg.vector_norm(piece.view(-1, _ROW), dim=1)


def sum_of_squares(t: Tensor) -> float:
    """The sum of the squares of a tensor on the CPU, in whatever order its elements lie in memory."""
    numel = t.numel()
    count = numel // _ROW
    t = t if is_dense(t) else t.contiguous()
    rows, total = t.as_strided((count, _ROW), (_ROW, 1)), 0.0
    rest = t.as_strided((numel - count * _ROW,), (1,), t.storage_offset() + count * _ROW) if numel % _ROW else None
    for least in (torch.float32, torch.float64):
        dtype = torch.promote_types(t.dtype, least)
        own = torch.linalg.vector_norm(rows if t.dtype == dtype else rows.to(dtype), dim=1).numpy().astype(np.float64)
        total = float(np.add.reduce(np.square(own, out=own)))
        if rest is not None:
            last = torch.linalg.vector_norm(rest, dtype=dtype).item()
            total += last * last  # ** would raise where this is inf
        if dtype == torch.float64 or are_kept(total, numel):
            break
    return total


def norm(t: Tensor) -> Tensor:
    """The norm of `t`, 0-d, at least in float32."""
    return norms([t])[0].to(torch.promote_types(t.dtype, torch.float32))


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, 0-d float64 on its device."""
    found = _norms(tensors, torch.float32)
    # Only the CPU can be asked without waiting.
    here = [i for i, t in enumerate(tensors) if t.device.type == "cpu"]
    if here:
        together = torch.stack([found[i] for i in here]).double()
        for i, of_t, value in zip(here, together.unbind(), together.tolist()):
            kept = tensors[i].dtype == torch.float64 or are_kept(value * value, tensors[i].numel())
            found[i] = of_t if kept else _norms([tensors[i]], torch.float64)[0]
    return found


def _norms(tensors: Sequence[Tensor], least: torch.dtype) -> list[Tensor]:
    """Worked out in `least` or wider, at least in float64 on a GPU."""
    small = [i for i, t in enumerate(tensors) if not is_large(t)]
    found = list(tensors)
    for i, of_small in zip(small, small_norms([tensors[i] for i in small], least)):
        found[i] = of_small
    for i in set(range(len(found))).difference(small):
        found[i] = torch.linalg.vector_norm(torch.cat(list(part_norms(tensors[i], least))).double())
    return found


def small_norms(tensors: Sequence[Tensor], least: torch.dtype) -> Sequence[Tensor]:
    """Norms of tensors that are not large, worked out in `least` or wider; on a GPU in float64: memory is the limit."""
    if not tensors:
        return ()
    if any(t.dtype == torch.float64 or t.device.type == "cuda" for t in tensors):
        return torch._foreach_norm(list(tensors), 2, torch.float64)
    return torch._foreach_norm(list(map(_as_float32, tensors)), 2, least)


def _as_float32(t: Tensor) -> Tensor:
    """A gradient whose norm has the same bits in 16 bits and in float32. torch adds up what has 16 bits, or gaps, in
    another order: the norm of 2,000 bfloat16 numbers is off by 4e-6."""
    if not t.is_contiguous() and not is_dense(t):
        t = t.contiguous()
    return t.to(torch.float32)
