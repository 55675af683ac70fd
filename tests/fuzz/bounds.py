"""Numbers that carry a bound on their error: what arithmetic in float32, or float64, may make of a formula.

Running error analysis (Higham, "Accuracy and Stability of Numerical Algorithms", 3.3): each operation takes the errors
of its operands along and adds its own rounding. So a tolerance is nobody's choice: it follows from the formula, grows
where terms cancel and is nothing where nothing is rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Exact = np.longdouble


class Arithmetic(NamedTuple):
    """The arithmetic that is allowed for.

    Attributes:
        unit: half the distance from 1 to the next number.
        least: the smallest number above 0.
        largest: what is larger may overflow.
    """

    unit: float
    least: float
    largest: float


FLOAT32 = Arithmetic(2.0**-24, 2.0**-149, 1e38)
FLOAT64 = Arithmetic(2.0**-53, 2.0**-1074, 1e308)

LARGEST_NORM = np.sqrt(Exact(np.finfo(np.float64).max))
"""Of what float64 can hold the square of: 1.34e154."""

SLACK = 4.0
"""Roundings per operation here: an implementation may do more of them, in another order, as when it multiplies by
factors that were worked out before, or by 1 - decay instead of subtracting."""


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    """What weights of this dtype are updated in."""
    return FLOAT64 if dtype == torch.float64 else FLOAT32


@dataclass(frozen=True, eq=False)
class Bound:
    """Exact numbers, and how far from them the same formula in some arithmetic may be; inf where anything may come out.

    Example:
        >>> x = Bound.of(3.0, FLOAT32) * 0.1 - 0.3
        >>> abs(float(x.value)) < 1e-16, 0.0 < float(x.error) < 1e-6
        (True, True)
    """

    value: Any
    error: Any
    kind: Arithmetic

    @classmethod
    def of(cls, value: Any, kind: Arithmetic, error: Any = 0.0) -> "Bound":
        """What is known exactly, or up to `error`."""
        value = np.asarray(exact(value))
        return cls(value, np.broadcast_to(np.asarray(error, Exact), value.shape), kind)

    def __add__(self, other: Any) -> "Bound":
        other = self._like(other)
        return self._rounded(other, self.value + other.value, self.error + other.error)

    def __mul__(self, other: Any) -> "Bound":
        other = self._like(other)
        error = _times(abs(self.value) + self.error, other.error) + _times(abs(other.value), self.error)
        return self._rounded(other, self.value * other.value, error)

    def __truediv__(self, other: Any) -> "Bound":
        other = self._like(other)
        value = self.value / other.value
        margin = abs(other.value) - other.error
        error = np.where(margin > 0.0, (self.error + _times(abs(value), other.error)) / margin, np.inf)
        certain = (self.error == 0.0) & (other.error == 0.0)
        return self._rounded(other, value, np.where(certain, 0.0, error))

    def __abs__(self) -> "Bound":
        return Bound(abs(self.value), self.error, self.kind)

    def __neg__(self) -> "Bound":
        return Bound(-self.value, self.error, self.kind)

    def __sub__(self, other: Any) -> "Bound":
        return self + -self._like(other)

    def __rsub__(self, other: Any) -> "Bound":
        return self._like(other) - self

    def __rtruediv__(self, other: Any) -> "Bound":
        return self._like(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> "Bound":
        return Bound(self.value[index], self.error[index], self.kind)

    def sqrt(self) -> "Bound":
        root = np.sqrt(self.value)
        below = root - np.sqrt(np.maximum(self.value - self.error, 0.0))
        above = np.sqrt(np.maximum(self.value, 0.0) + self.error) - root
        return self._rounded(self, root, np.maximum(below, above))

    def power(self, exponent: Any) -> "Bound":
        """To a power, as arithmetic does it by exponential and logarithm."""
        value = self.value**exponent
        steps = abs(exponent) * abs(np.log(np.where(self.value > 0.0, self.value, 1.0)))
        return self._rounded(self, value, abs(value) * (steps + 1.0) * self.kind.unit * SLACK)

    def maximum(self, other: Any) -> "Bound":
        """NaN where one of them is."""
        other = self._like(other)
        return Bound(np.maximum(self.value, other.value), np.maximum(self.error, other.error), self.kind)

    def minimum(self, other: Any) -> "Bound":
        return -(-self).maximum(-self._like(other))

    def at_least(self, floor: Any) -> "Bound":
        """`floor` where this is smaller or NaN."""
        floor = self._like(floor)
        value = np.where(self.value > floor.value, self.value, floor.value)
        return Bound(value, np.where(np.isnan(self.value), floor.error, np.maximum(self.error, floor.error)), self.kind)

    def sign(self) -> "Bound":
        unsure = (abs(self.value) <= self.error) & (self.error > 0.0)
        return Bound(np.sign(self.value), np.where(unsure, 2.0, 0.0), self.kind)

    def mean(self, *axis: int) -> "Bound":
        """Over these dimensions, or all, which stay with size 1; added up in any order."""
        axes = axis or tuple(range(self.value.ndim))
        number = Exact(np.prod([self.value.shape[a] for a in axes], dtype=np.int64))
        total, error, size = (x.sum(axis=axes, keepdims=True) for x in (self.value, self.error, abs(self.value)))
        return self._rounded(self, total / number, (error + SLACK * number * self.kind.unit * size) / number)

    def norm(self) -> "Bound":
        """Of all elements together, added up in at least 8 sums, of rows of a thousand where there are many."""
        root, own = (np.sqrt(np.square(x).sum()) for x in (self.value, self.error))
        rounding = root * self.kind.unit * (SLACK + min(self.value.size, 1 << 14) / 8.0)
        error = own + np.where(np.isfinite(root), rounding, 0.0)  # an infinity is not rounded
        return self._rounded(self, root, error).kept_as_square(self.value.size)

    def kept_as_square(self, terms: int = 1) -> "Bound":
        """A norm that was a float64 sum of so many squares: inf where that overflows, without what underflows."""
        lost = np.where(self.value > 0.0, terms * FLOAT64.least, 0.0)
        square = np.square(self.value)
        below, above = np.sqrt(np.maximum(square - lost, 0.0)), np.sqrt(square + lost)
        with np.errstate(invalid="ignore"):
            error = self.error + np.where(np.isfinite(square), np.maximum(self.value - below, above - self.value), 0.0)
            certain = self.value - error > LARGEST_NORM
        error = np.where(self.value + error > LARGEST_NORM, np.inf, error)
        return Bound(np.where(certain, np.inf, self.value), np.where(certain, 0.0, error), self.kind)

    def reshape(self, *shape: Any) -> "Bound":
        return Bound(self.value.reshape(*shape), self.error.reshape(*shape), self.kind)

    def squeeze(self, axis: int) -> "Bound":
        return Bound(self.value.squeeze(axis), self.error.squeeze(axis), self.kind)

    def read_in(self, kind: Arithmetic) -> "Bound":
        """The same numbers as they are read in another arithmetic, rounded if that is shorter."""
        own = Bound(self.value, self.error, kind)
        return own * 1.0 if kind > self.kind else own

    def _like(self, other: Any) -> "Bound":
        return other if isinstance(other, Bound) else Bound.of(other, self.kind)

    def _rounded(self, other: "Bound", value: Any, error: Any) -> "Bound":
        kind = max(self.kind, other.kind)
        unsure = np.isinf(error)
        if np.broadcast_shapes(self.error.shape, other.error.shape) == np.shape(value):  # else these are sums
            unsure = unsure | np.isinf(self.error) | np.isinf(other.error)
        size = abs(value)
        tiny = (size > 0.0) & (size < 2.0 * kind.least / kind.unit)
        error = error + SLACK * kind.unit * size + np.where(tiny, kind.least, 0.0)
        error = np.where(np.isnan(error) | (size + error > kind.largest), np.inf, error)
        # An infinity or a NaN that comes from one is certain; one of a result that may have overflowed is not.
        return Bound(value, np.where(unsure, np.inf, np.where(np.isfinite(value), error, 0.0)), kind)


def exact(x: Any) -> Any:
    """A tensor or a number as longdouble."""
    if isinstance(x, Tensor):
        x = x.detach().cpu().resolve_neg().to(torch.float64).numpy()
    return np.asarray(x, Exact)


def _times(x: Any, error: Any) -> Any:
    """A size times an error; no error stays none, however large the size."""
    return np.where(error == 0.0, 0.0, x * np.where(error == 0.0, 1.0, error))


# Storing.


def stored(x: Any, dtype: torch.dtype, towards: Callable[[Any], Any] = np.rint) -> Any:
    """Exact numbers as `dtype` holds them: to nearest even, or as `towards` rounds whole numbers.

    Example:
        >>> x = Exact(1.0 + 2**-8)
        >>> float(stored(x, torch.bfloat16)), float(stored(x, torch.bfloat16, np.ceil))
        (1.0, 1.0078125)
    """
    limits = torch.finfo(dtype)
    rounded = towards(x / unit_of(x, dtype)) * unit_of(x, dtype)
    return np.where(np.isfinite(x), np.where(abs(rounded) > limits.max, np.sign(x) * np.inf, rounded), x)


def unit_of(x: Any, dtype: torch.dtype) -> Any:
    """The distance between the numbers of `dtype` that are next to `x`."""
    limits = torch.finfo(dtype)
    _, exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))
    return np.maximum(np.ldexp(Exact(limits.eps), exponent - 1), Exact(limits.smallest_normal) * limits.eps)


def stochastic(x: Any, dtype: torch.dtype, bits: Any, number_of_bits: int) -> Any:
    """Exact numbers rounded up in magnitude where what does not fit and the random bits make a whole unit."""
    share = bits.astype(Exact) / Exact(2**number_of_bits)
    size = stored(abs(x), dtype, lambda whole: np.floor(whole + share))
    largest = torch.finfo(dtype).max
    return np.where(np.isfinite(x), np.sign(x) * np.minimum(size, largest), x)


def misfit(
    actual: Tensor, bound: Bound, bits: Any = None, name: str = "", *, allowed: Callable[[Any], Any] | None = None
) -> str | None:
    """What is wrong with numbers that were stored, None if they may be what arithmetic made of the formula.

    Args:
        actual: the tensor.
        bound: what it should be.
        bits: random ones that round it, uint32 of its shape; None where it is rounded to nearest.
        name: of the tensor.
        allowed: how an exact number is rounded where there is more to it.
    """
    got, value, dtype = exact(actual), bound.value, actual.dtype
    if got.shape != value.shape:
        return f"{name} has shape {got.shape}, expected {value.shape}"
    error = bound.error
    with np.errstate(all="ignore"):
        if bits is not None:
            number_of_bits = 16 if dtype == torch.bfloat16 else 13
            error = error + unit_of(value, dtype) / 2**number_of_bits
            low, high = (stochastic(x, dtype, bits, number_of_bits) for x in (value - error, value + error))
        else:
            low, high = ((allowed or (lambda x: stored(x, dtype)))(x) for x in (value - error, value + error))
        fits = (got >= low) & (got <= high) | (np.isnan(got) & np.isnan(value)) | np.isinf(bound.error)
    if fits.all():
        return None
    at = int(np.argmin(fits))
    index = tuple(map(int, np.unravel_index(at, fits.shape)))
    wrong = f"{name}{list(index) if index else ''} is {got.flat[at]!r}, expected {value.flat[at]!r}"
    return f"{wrong} up to {error.flat[at]:.3g} ({int((~fits).sum())} of {fits.size} elements, {dtype})"
