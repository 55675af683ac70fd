"""Comparisons that say which tensor, which element and which two values differ.

`assert_same` wants equal bits, `assert_near` allows a tolerance. Both walk through lists, tuples, dicts and models, so
that a test compares all weights, or a whole checkpoint, in one line.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tolerance:
    """How far from what is expected a value may be, and why that far. The parts add up."""

    reason: str
    rtol: float = 0.0
    """Times the expected element."""
    atol: float = 0.0
    of_largest: float = 0.0
    """Times the largest finite element of the expected tensor."""
    ulps: int = 0
    """Units in the last place of the expected element, in the expected dtype."""

    def allowed(self, expected: Tensor) -> Tensor:
        """Largest admissible difference for each element of `expected`, in float64."""
        exact = expected.double()
        size = torch.nan_to_num(exact.abs(), nan=0.0, posinf=0.0)
        largest = size.max() if size.numel() else size.sum()
        allowed = self.rtol * size + self.atol + self.of_largest * largest
        return allowed + self.ulps * unit_in_last_place(expected) if self.ulps else allowed


def unit_in_last_place(x: Tensor) -> Tensor:
    """Distance in float64 from |x| to the next larger number of x's dtype.

    Example: 1 + 2^-7 follows 1 in bfloat16.
        >>> unit_in_last_place(torch.tensor([1.0], dtype=torch.bfloat16)).item() == 2**-7
        True
    """
    limits = torch.finfo(x.dtype)
    _, exponent = torch.frexp(torch.nan_to_num(x.double(), nan=1.0, posinf=1.0, neginf=1.0))
    return (limits.eps * torch.exp2(exponent.double() - 1)).clamp_min(limits.smallest_normal * limits.eps)


def assert_same(actual: Any, expected: Any, name: str = "", *, equal_nan: bool = False) -> None:
    """Asserts that two values are equal to the bit: tensors, models, and lists, tuples and dicts of them.

    Tensors must agree in shape, dtype and every element, zeros in their sign too; tensors of different devices are
    compared on the CPU. What is neither a tensor nor contains one is compared with `==`.

    Args:
        name: of the value, for the message; elements of a list, dict or model are named by index, key and parameter.
        equal_nan: True if NaN equals NaN, of any sign and payload.

    Example:
        >>> assert_same({"p": [torch.ones(2, 2)]}, {"p": [torch.eye(2)]}, "weights")
        Traceback (most recent call last):
        AssertionError: weights['p'][0][0, 1] is 1.0, expected 0.0 (2 of 4 elements differ)
    """
    for path, a, e in _pairs(actual, expected, name):
        if (message := _difference(path, a, e, None, equal_nan, True)) is not None:
            raise AssertionError(message)


def same(a: Any, b: Any) -> bool:
    """Returns whether `assert_same` passes; for values that are to differ."""
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


def assert_near(
    actual: Any,
    expected: Any,
    tolerance: Tolerance | None = None,
    *,
    name: str = "",
    rtol: float = 0.0,
    atol: float = 0.0,
    equal_nan: bool = False,
    check_dtype: bool = True,
) -> None:
    """Asserts that two values are as close as `tolerance`, or `rtol` and `atol`, say; otherwise as `assert_same`.

    Infinities must agree. The difference is taken in float64.

    Example:
        >>> assert_near([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])], rtol=0.1, name="weights")
        Traceback (most recent call last):
        AssertionError: weights[0][1] is 2.0, expected 2.5: 0.5 apart, 2 times what is allowed (1 of 2 elements differ)
    """
    if tolerance is not None and (rtol or atol):
        raise TypeError("either a Tolerance, or rtol and atol")
    tolerance = tolerance or Tolerance("", rtol, atol)
    for path, a, e in _pairs(actual, expected, name):
        if (message := _difference(path, a, e, tolerance, equal_nan, check_dtype)) is not None:
            raise AssertionError(message)


def _pairs(actual: Any, expected: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields what is to be compared, with its name; raises where the structures differ."""
    if isinstance(expected, nn.Module) and isinstance(actual, nn.Module):
        names, expected = zip(*expected.named_parameters())
        yield from _pairs(dict(zip(names, actual.parameters(), strict=True)), dict(zip(names, expected)), name)
    elif isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if actual.keys() != expected.keys():
            missing, more = (
                sorted(map(repr, a.keys() - b.keys())) for a, b in ((expected, actual), (actual, expected))
            )
            raise AssertionError(f"{name or 'the dict'} lacks {missing} and has {more} besides")
        for key in expected:
            yield from _pairs(actual[key], expected[key], f"{name}[{key!r}]")
    elif isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        if len(actual) != len(expected):
            raise AssertionError(f"{name or 'the list'} has {len(actual)} elements, expected {len(expected)}")
        for i, (a, e) in enumerate(zip(actual, expected)):
            yield from _pairs(a, e, f"{name}[{i}]")
    else:
        yield name or "the value", actual, expected


def _difference(
    name: str, actual: Any, expected: Any, tolerance: Tolerance | None, equal_nan: bool, check_dtype: bool
) -> str | None:
    """Returns how two values differ, None if they do not differ by more than is allowed."""
    if tolerance is not None and isinstance(expected, float):
        actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    if isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray):
        actual, expected = torch.from_numpy(actual), torch.from_numpy(expected)
    if not (isinstance(actual, Tensor) and isinstance(expected, Tensor)):
        equal = type(actual) is type(expected) or (not isinstance(actual, Tensor) and not isinstance(expected, Tensor))
        return None if equal and bool(actual == expected) else f"{name} is {actual!r}, expected {expected!r}"
    if actual.shape != expected.shape:
        return f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if check_dtype and actual.dtype != expected.dtype:
        return f"{name} is of {actual.dtype}, expected {expected.dtype}"
    actual, expected = (t.detach().cpu().resolve_neg().resolve_conj() for t in (actual, expected))
    nan = actual.isnan() & expected.isnan()
    if tolerance is None:
        equal = (actual == expected) & (actual.signbit() == expected.signbit())
    else:
        error = (actual.double() - expected.double()).abs()
        equal = (actual == expected) | (error <= tolerance.allowed(expected))
    if bool((equal | nan if equal_nan else equal).all()):
        return None
    differ = ~(equal | nan if equal_nan else equal)
    number = f"{int(differ.sum())} of {differ.numel()} elements differ"
    if tolerance is None:
        at = int(differ.flatten().to(torch.uint8).argmax())
    else:
        excess = (error / tolerance.allowed(expected)).nan_to_num(nan=torch.inf, posinf=torch.inf)
        at = int(torch.where(differ, excess, -1.0).argmax())
    index = ", ".join(str(int(i)) for i in np.unravel_index(at, tuple(differ.shape)))
    a, e = actual.flatten()[at].item(), expected.flatten()[at].item()
    message = f"{name}{f'[{index}]' if index else ''} is {a!r}, expected {e!r}"
    if a != a and e != e:
        message += ", where no NaN may be"
    elif tolerance is not None:
        apart, excessive = float(error.flatten()[at]), float(excess.flatten()[at])
        message += f": {apart:.3g} apart, {excessive:.3g} times what is allowed"
        message += f" for {tolerance.reason!r}" if tolerance.reason else ""
    return f"{message} ({number})"
