"""Rounding to 16 bits: to nearest, or to one of the two neighbours by random bits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt.interface import ShardPosition
from fusedopt_kernels import rules


def round_into(target: Tensor, exact: Tensor, bits: Tensor | None = None) -> None:
    """Writes `exact`, of the same shape, into `target`; see `rounded`."""
    target.copy_(rounded(exact, target.dtype, bits))


def rounded(exact: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Tensor:
    """`exact` as it is to be copied into a tensor of this dtype.

    Args:
        exact: of any dtype.
        dtype: of the tensor.
        bits: int32 in [0, 2^16), of the same shape: numbers are rounded up in magnitude if the part that does not fit
            and these bits make a whole unit. None, or a dtype of more than 16 bits: rounds to nearest even.
    """
    if dtype.itemsize > 2:
        return exact
    if exact.dtype == torch.float64:
        # Through float32 a number may come to lie on a tie; for random bits, 2^-24 of it does not matter.
        exact = _to_odd(exact) if bits is None else _finite_float32(exact)
    if bits is None:
        return exact
    return (_stochastic_bfloat16 if dtype == torch.bfloat16 else _stochastic_float16)(exact, bits)


def is_finite(t: Tensor) -> bool:
    """False if there is an infinity or a NaN; of large numbers perhaps, too. In one pass, many times as fast as asking
    of each number."""
    return math.isfinite(t.sum())


def _to_odd(exact: Tensor) -> Tensor:
    """float32 from which 16 bits are rounded as from the float64 itself.

    Of the two float32 values around a number that is not one, it takes the one whose last bit is 1: that is on no tie
    of a shorter dtype, and on the side of every tie that the number was on.
    """
    nearest = exact.to(torch.float32)
    bits = nearest.view(torch.int32)
    inexact = (exact - nearest).abs() > 0.0
    toward_zero = bits - (nearest.double().abs() > exact.abs()).int()
    return torch.where(inexact, toward_zero | 1, bits).view(torch.float32)


def _finite_float32(exact: Tensor) -> Tensor:
    """float32 of float64; of what is too large, the largest number."""
    largest = torch.finfo(torch.float32).max
    return torch.where(exact.isinf(), exact, exact.clamp(-largest, largest)).to(torch.float32)


def _stochastic_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 that bfloat16 holds; what would round past the largest one becomes it."""
    largest = torch.finfo(torch.bfloat16).max
    rounded = (x.view(torch.int32) + bits).bitwise_and_(-0x10000).view(torch.float32).clamp_(-largest, largest)
    return rounded if is_finite(x) else torch.where(x.abs() < torch.inf, rounded, x)


_LEAST_NORMAL = 2.0**-14
"""The least number that float16 holds with all its bits; below it has units of 2^-24."""


def _stochastic_float16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 that float16 holds; what would round past the largest one becomes it.

    The 13 bits that do not fit are those behind the 10 of float16. Where float16 has fewer, a number gets them when the
    least normal one is added, which has the same unit.
    """
    magnitude = x.abs()
    added = torch.where(magnitude < _LEAST_NORMAL, _LEAST_NORMAL, 0.0)
    bits = (magnitude + added).view(torch.int32) + (bits & 0x1FFF) & -0x2000
    rounded = (bits.view(torch.float32) - added).clamp_(max=torch.finfo(torch.float16).max)
    return torch.where(magnitude < torch.inf, torch.copysign(rounded, x), x)


# Random bits. torch has no unsigned arithmetic, and its int32 wraps.


def _signed(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def _scramble(x: Tensor, shifted: Tensor) -> Tensor:
    """`rules.scramble` of int32, in place; with memory for as many."""
    for n, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        torch.bitwise_right_shift(x, n, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - n)) - 1))
        if factor != 1:
            x.mul_(_signed(factor))
    return x


def random_keys(seed: int, numbers: Sequence[int], step: float) -> np.ndarray:
    """`rules.rounding_keys` of some parameters at a step, uint32 [parameters, 2]."""

    def word(value: Any) -> np.ndarray:
        return np.asarray(value, np.int64).reshape(-1).astype(np.uint32)  # the lower half

    def scramble(x: np.ndarray) -> np.ndarray:
        scrambled: np.ndarray = rules.scramble(x, np.right_shift, np.multiply)
        return scrambled

    with np.errstate(over="ignore"):
        keys = rules.rounding_keys(
            word(seed),
            word(seed >> 32),
            word(numbers),
            word(int(step) & 0xFFFFFFFF),
            scramble,
            lambda x, c: x * np.uint32(c),
        )
    return np.stack(np.broadcast_arrays(*keys), axis=1)


_WHOLE = ShardPosition(1 << 62, 0, 0)
"""The position of all elements of a parameter."""


def random_words(
    keys: np.ndarray,
    sizes: Sequence[int],
    start: int,
    positions: Sequence[ShardPosition | None],
    device: torch.device,
) -> Tensor:
    """`rules.random_word` of consecutive elements of some parameters, int32 [elements].

    Args:
        keys: uint32 [parameters, 2].
        sizes: elements of each parameter.
        start: the first element, if there is one parameter; else 0.
        positions: where each is in its whole parameter, of which it is a shard; None for a whole one.
        device: of the result.
    """
    n = sum(sizes)
    sharded = any(position is not None for position in positions)
    columns = list(torch.from_numpy(keys.astype(np.int32)).to(device).unbind(1))
    if sharded:
        places = [position or _WHOLE for position in positions]
        columns += torch.tensor(places, dtype=torch.int64, device=device).unbind(1)
    wide = sharded or start + n > 1 << 31
    first = torch.arange(start, start + n, dtype=torch.int64 if wide else torch.int32, device=device)
    if len(sizes) > 1:
        counts = torch.tensor(sizes, dtype=torch.int64, device=device)
        columns.append((counts.cumsum(0) - counts).to(first.dtype))
        *columns, before = (column.repeat_interleave(counts, output_size=n) for column in columns)
        first -= before
    key0, key1, *place = columns
    if sharded:
        length, gap, offset = place
        first += (first // length).mul_(gap).add_(offset)
    word = first.to(torch.int32).bitwise_xor_(key0)
    shifted = torch.empty_like(word)
    _scramble(word, shifted).add_(key1)
    if wide:
        word += (first >> 32).to(torch.int32) * _signed(0x9E3779B9)
    return _scramble(word, shifted)
