# mypy: allow-untyped-defs
"""The device functions that kernels share: find my piece, read, write, round; the functions that rules take.

Memory is reached through int64 addresses out of a launch table. `ALIGNED` promises that the address is a multiple of 16
bytes and the size one of 16 elements: with both, reads and writes are 128 bits wide, masks included.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


TRITON_DTYPES = {
    None: None,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int16: tl.int16,
}


_BY_NAME = {dtype.name: dtype for dtype in TRITON_DTYPES.values() if dtype is not None}


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name that Triton has for a dtype, None for None.

    Constants of kernels hold names: what serializes them (compile hooks, `JITFunction.preload`) knows no tuple that
    holds dtypes.
    """
    return None if dtype is None else TRITON_DTYPES[dtype].name


def options(threads: int) -> dict[str, Any]:
    """Returns the compile options of a kernel with this many threads per program.

    A kernel that writes where it reads gets no more threads than it has elements in hand: else several threads read an
    element, and may read what one of them already wrote.
    """
    return {"num_warps": threads // (64 if torch.version.hip else 32), "enable_fp_fusion": False}


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, or a rule, that kernels call. The interpreter runs it as it is, which it does much faster."""
    return function if _INTERPRETED else triton.jit(function)


def constant_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of constants that kernels call. The interpreter runs it as it is: triton 3.6 drops names of tuples."""
    return function if _INTERPRETED else triton.constexpr_function(function)


@constant_function
def dtypes_of_names(constants: Any) -> Any:
    """A tuple of constants with dtypes in the place of their names, inside of a kernel.

    It keeps its type, unless triton 3.6 has dropped that before, in a call from another function of constants.
    """
    values = [_BY_NAME[value] if isinstance(value, str) else value for value in constants]
    return type(constants)(*values) if hasattr(constants, "_fields") else tuple(values)


def _loop_range(first: Any, last: Any, step: Any) -> range:
    numbers = (x.handle.data.item() if isinstance(x, tl.tensor) else x for x in (first, last, step))
    return range(*map(int, numbers))


loop_range = _loop_range if _INTERPRETED else tl.range
"""`range` for a loop in a kernel. What the interpreter has for numbers are arrays, which newer numpy takes for none."""


# Builtins of the language cannot be passed to a rule; functions can.


@device_function
def exp(x):
    return tl.exp(x)


@device_function
def log(x):
    return tl.log(x)


@device_function
def minimum(x, y):
    return tl.minimum(x, y)


@device_function
def maximum(x, y):
    return tl.maximum(x, y)


@device_function
def where(condition, x, y):
    return tl.where(condition, x, y)


@device_function
def sqrt_rn(x):
    """The root, rounded to nearest; for float64 the plain one is."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@device_function
def div_rn(x, y):
    """The quotient, rounded to nearest; for float64 the plain one is. x may be a number."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@device_function
def sign(x):
    """-1, 0 or 1; NaN for NaN."""
    return tl.where(x != x, x, (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype))


@device_function
def my_piece(chunks):
    """The (row, piece) that this program works on, as int64: tensors may have more than 2^31 elements."""
    return piece_of(chunks, tl.program_id(0))


@device_function
def piece_of(chunks, program):
    """The (row, piece) of a program."""
    chunk = chunks + 2 * program.to(tl.int64)
    return tl.load(chunk).to(tl.int64), tl.load(chunk + 1).to(tl.int64)


# What ALIGNED promises has to be said where a value is made, not of an argument, and of an address once it is a
# pointer: otherwise Triton does not hear it.


@device_function
def load_pointer(cell, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, VECTOR_WIDTH: tl.constexpr = None):
    """The address in a cell of the table, as a pointer to elements of DTYPE.

    VECTOR_WIDTH: how many elements an access takes, None for 128 bits. Where tensors of several dtypes are walked over
    together it has to be the same for all, or threads exchange elements through shared memory before they write.
    """
    address = tl.load(cell).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16 if VECTOR_WIDTH is None else VECTOR_WIDTH * DTYPE.primitive_bitwidth // 8)
    return address


@device_function
def load_size(cell, ALIGNED: tl.constexpr):
    """The number of elements in a cell of the table."""
    number = tl.load(cell)
    if ALIGNED:
        number = tl.multiple_of(number, 16)
    return number


@device_function
def load_behind(address, DTYPE: tl.constexpr, absent):
    """The elements at a block of addresses; `absent` where the address is 0."""
    return tl.load(address.to(tl.pointer_type(DTYPE)), mask=address != 0, other=absent)


@device_function
def load_number(cell):
    """The float64 that a `NUMBER` of a record stands for: its value, or what lies at one of its two addresses."""
    at32 = tl.load(cell + 1)
    at64 = tl.load(cell + 2)
    number = tl.where(at32 == 0, load_float64(cell), load_behind(at32, tl.float32, 0.0).to(tl.float64))
    return tl.where(at64 == 0, number, load_behind(at64, tl.float64, 0.0))


@device_function
def load_float64(cell):
    """A float64 that lies in the table as its bits."""
    return tl.load(cell).to(tl.float64, bitcast=True)


@device_function
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest even: the interpreter would cut off what bfloat16 cannot hold."""
    if _INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        nearest = x.to(tl.float32)
        bits = nearest.to(tl.uint32, bitcast=True)
        if (
            x.dtype == tl.float64
        ):  # Rounded to odd, so that no tie comes of it: see fusedopt/backends/eager/rounding.py.
            back = nearest.to(tl.float64)
            toward_zero = bits - (tl.abs(back) > tl.abs(x)).to(tl.uint32)
            bits = tl.where(tl.abs(x - back) > 0.0, toward_zero | 1, bits)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        narrowed = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = x.to(DTYPE)
    return narrowed
