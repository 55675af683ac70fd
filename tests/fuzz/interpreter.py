"""Conversions of Triton's interpreter, put right where a GPU does otherwise."""

from typing import Any

import numpy as np


def read_bfloat16_exactly() -> None:
    """Lets the interpreter read a subnormal bfloat16 number as what it is, where Triton 3.6 and 3.7 read another one.

    Of float32 such a number has the bits, followed by zeros, as any other bfloat16 number.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    untyped: Any = interpreter
    convert = untyped._convert_float
    if hasattr(convert, "replaced"):
        return

    def converted(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, rounding_mode)

    vars(converted)["replaced"] = convert
    untyped._convert_float = converted
