"""Rounding to 16 bits: to nearest, or to one of the two neighbours by random bits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt.interface import ShardPosition
from fusedopt_kernels import rules


def round_into(target: Tensor, exact: Tensor, bits: Tensor | None = None) -> None:
    """Writes `exact` into `target`.

    Args:
        target: of any dtype.
        exact: of the same shape.
        bits: int32 in [0, 2^16), of the same shape: numbers are rounded up in magnitude if the part that does not fit
            and these bits make a whole unit. None, or a target of more than 16 bits: rounds to nearest even.
    """
    if exact.dtype == torch.float64 and target.dtype.itemsize == 2:
        # Through float32 a number may come to lie on a tie; for random bits, 2^-24 of it does not matter.
        exact = _to_odd(exact) if bits is None else exact.to(torch.float32)
    if bits is not None and target.dtype.itemsize == 2:
        exact = (_stochastic_bfloat16 if target.dtype == torch.bfloat16 else _stochastic_float16)(exact, bits)
    target.copy_(exact)


def _to_odd(exact: Tensor) -> Tensor:
    """float32 from which 16 bits are rounded as from the float64 itself.

    Of the two float32 around a number that is none, it takes the one whose last bit is 1: that is on no tie of a
    shorter dtype, and on the side of every tie that the number was on.
    """
    nearest = exact.to(torch.float32)
    bits = nearest.view(torch.int32)
    inexact = (exact - nearest).abs() > 0.0
    toward_zero = bits - (nearest.double().abs() > exact.abs()).int()
    return torch.where(inexact, toward_zero | 1, bits).view(torch.float32)


def _stochastic_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 that bfloat16 holds; what would round past the largest one becomes it."""
    rounded = ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    return torch.where(x.abs() < torch.inf, rounded.clamp_(-largest, largest), x)


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


def _shift(x: Any, n: int) -> Any:
    return (x >> n) & ((1 << (32 - n)) - 1)


def _times(x: Any, constant: int) -> Any:
    return x * _signed(constant)


def _signed(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def _scramble(x: Tensor) -> Tensor:
    """`rules.scramble` of int32, in place."""
    x.bitwise_xor_(_shift(x, 16)).mul_(_signed(0x7FEB352D))
    x.bitwise_xor_(_shift(x, 15)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_(_shift(x, 16))


def random_keys(seed: int, numbers: Sequence[int], step: float) -> np.ndarray:
    """`rules.rounding_keys` of some parameters at a step, uint32 [parameters, 2]."""

    def word(value: Any) -> np.ndarray:
        return np.asarray(value, np.int64).reshape(-1).astype(np.uint32)  # the lower half

    def scramble(x: np.ndarray) -> np.ndarray:
        scrambled: np.ndarray = rules.scramble(x, np.right_shift, np.multiply)
        return scrambled

    with np.errstate(over="ignore"):
        keys = rules.rounding_keys(
            word(seed), word(seed >> 32), word(numbers), word(int(step)), scramble, lambda x, c: x * np.uint32(c)
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
    first = torch.arange(start, start + sum(sizes), dtype=torch.int64, device=device)
    sharded = any(position is not None for position in positions)
    columns = list(torch.from_numpy(keys.astype(np.int32)).to(device).unbind(1))
    if sharded:
        places = [position or _WHOLE for position in positions]
        columns += torch.tensor(places, dtype=torch.int64, device=device).unbind(1)
    if len(sizes) > 1:
        counts = torch.tensor(sizes, device=device)
        first -= (counts.cumsum(0) - counts).repeat_interleave(counts)
        columns = [column.repeat_interleave(counts) for column in columns]
    key0, key1, *place = columns
    if sharded:
        length, gap, offset = place
        first += (first // length).mul_(gap).add_(offset)
    low, high = first.to(torch.int32), first >> 32
    word = _scramble(low.bitwise_xor_(key0)).add_(key1)
    if sharded or start + sum(sizes) > 1 << 32:
        word += _times(high.to(torch.int32), 0x9E3779B9)
    return _scramble(word)
