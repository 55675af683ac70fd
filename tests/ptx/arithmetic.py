"""What instructions compute: functions of arrays with an element per thread, exact to the bit.

A register holds raw bits, `uint16`, `uint32` or `uint64`, or `bool` for a predicate. Functions whose names say no type
take arrays of the type that the instruction names.
"""

import ctypes
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_libm = ctypes.CDLL(None)
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3

HIGH_BIT = np.uint32(0x80000000)
NAN16 = np.uint16(0x7FFF)
"""What conversions to 16 bits make of NaN."""


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded once."""
    a, b, c = np.broadcast_arrays(a, b, c)
    return np.array([_libm.fma(*xyz) for xyz in zip(a.tolist(), b.tolist(), c.tolist())], np.float64)


def quotient(a: Array, b: Array) -> Array:
    """Of integers, towards zero; all ones where b is 0."""
    zero = b == 0
    safe = np.where(zero, 1, b).astype(a.dtype)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, np.array(-1).astype(a.dtype), q)


def remainder(a: Array, b: Array) -> Array:
    return a - quotient(a, b) * b


def shift_left(a: Array, n: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(n >= bits, a.dtype.type(0), a << np.where(n >= bits, 0, n).astype(a.dtype))


def shift_right(a: Array, n: Array) -> Array:
    """Of a signed integer with its sign."""
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), a >> np.where(n >= bits, 0, n).astype(a.dtype))


def multiply_wide(a: Array, b: Array) -> Array:
    """The product of integers of 32 bits, in 64."""
    wide = np.dtype(f"{a.dtype.kind}8").type
    return a.astype(wide) * b.astype(wide)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of integers of 32 bits."""
    return (multiply_wide(a, b) >> multiply_wide(a, b).dtype.type(32)).astype(a.dtype)


def bit_field(a: Array, position: Array, length: Array) -> Array:
    position, length = (np.asarray(x).astype(np.uint64) & np.uint64(255) for x in (position, length))
    mask = (np.uint64(1) << np.minimum(length, np.uint64(32))) - np.uint64(1)
    return ((a.astype(np.uint64) >> np.minimum(position, np.uint64(63))) & mask).astype(np.uint32)


def population_count(a: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(a)[:, None].view(np.uint8), axis=1).sum(1, dtype=np.uint32)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, np.shape(selector)), np.uint64)
    for i in range(4):
        s = (np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((s & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        out |= np.where(s & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def float_max(a: Array, b: Array) -> Array:
    """The number where the other is NaN; +0 is larger than -0."""
    return np.where((a > b) | (b != b) | ((a == b) & ~np.signbit(a)), a, b)


def nan_max(a: Array, b: Array) -> Array:
    """NaN where one of them is."""
    return np.where(unordered(a, b), a.dtype.type(np.nan), float_max(a, b))


def nan_min(a: Array, b: Array) -> Array:
    return np.where(unordered(a, b), a.dtype.type(np.nan), float_min(a, b))


def float_min(a: Array, b: Array) -> Array:
    """The number where the other is NaN; -0 is smaller than +0."""
    return np.where((a < b) | (b != b) | ((a == b) & np.signbit(a)), a, b)


def xorsign_min(a: Array, b: Array) -> Array:
    """The smaller magnitude (the number where the other is NaN), with the product's sign."""
    a, b = np.broadcast_arrays(a, b)
    sign = (a.view(np.uint32) ^ b.view(np.uint32)) & HIGH_BIT
    return (float_min(np.abs(a), np.abs(b)).view(np.uint32) | sign).view(np.float32)


def flushed(x: Array) -> Array:
    """0 of the same sign in the place of subnormal numbers."""
    return np.where(np.abs(x) < np.finfo(x.dtype).smallest_normal, np.copysign(x.dtype.type(0), x), x)


def reciprocal(x: Array) -> Array:
    """`rcp.approx.ftz.f64`: from and to the upper half of a number. The last of those bits differ on a GPU."""
    high = np.uint64(0xFFFFFFFF00000000)
    cut = flushed((x.view(np.uint64) & high).view(np.float64))
    return (flushed(1.0 / cut).view(np.uint64) & high).view(np.float64)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """float32 or float64 -> the bits of bfloat16, to nearest even."""
    nearest = x.astype(np.float32)
    bits = nearest.view(np.uint32)
    if x.dtype == np.float64:  # First to odd: what float32 cannot hold must not become a tie of bfloat16.
        back = nearest.astype(np.float64)
        down = bits - (np.abs(back) > np.abs(x)).astype(np.uint32)
        bits = np.where((back != x) & np.isfinite(x), down | np.uint32(1), bits)
    wide = bits.astype(np.uint64)
    rounded = (wide + np.uint64(0x7FFF) + ((wide >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(x != x, NAN16, rounded.astype(np.uint16))


def to_f16(x: Array) -> Array:
    """float32 or float64 -> the bits of float16, to nearest even."""
    return np.where(x != x, NAN16, x.astype(np.float16).view(np.uint16))


def to_integer(x: Array, integer: type) -> Array:
    """Towards zero; NaN is 0, what is too large the largest."""
    limits = np.iinfo(integer)
    t = np.trunc(np.where(x != x, 0, x))
    low, high = t <= float(limits.min), t >= float(limits.max)
    inside: Array = np.where(low | high, 0, t).astype(integer)
    return np.where(low, limits.min, np.where(high, limits.max, inside)).astype(integer)


def packed(high: Array, low: Array) -> Array:
    """Two numbers of 16 bits in one of 32."""
    return (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)


def unordered(a: Array, b: Array) -> Array:
    return (a != a) | (b != b)


def ordered_not_equal(a: Array, b: Array) -> Array:
    return (a < b) | (a > b)
