# mypy: allow-untyped-defs
"""Weights and moments as they are kept: how kernels read them, and how they round them to 16 bits.

`MASTER` is the dtype of what completes a weight: int16 for the lower half of its bits, beside bfloat16; float32 for the
weight itself, beside float16; None for nothing.
"""

import triton.language as tl

from fusedopt_kernels import rules
from fusedopt_kernels.device import device_function, narrow

NEAREST, MOMENTS, EVERYTHING = range(3)
"""What a launch rounds stochastically, of what has 16 bits: nothing, averages of squares, weights as well."""

_STOCHASTIC_WEIGHTS = tl.constexpr(EVERYTHING)
_TO_FLOAT16 = tl.constexpr(2.0**-112)
_FROM_FLOAT16 = tl.constexpr(2.0**112)

_rules_scramble = device_function(rules.scramble)
_rules_random_word = device_function(rules.random_word)
_rules_rounding_keys = device_function(rules.rounding_keys)


@device_function
def _shift(x, n):
    return x >> n


@device_function
def _times(x, constant):
    return x * constant


@device_function
def _scramble(x):
    return _rules_scramble(x, _shift, _times)


@device_function
def rounding_keys(seed, number, step):
    """The two keys of rows, as uint32, from int64 seeds and numbers and float64 step counts."""
    return _rules_rounding_keys(
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
        number.to(tl.uint32),
        step.to(tl.int64).to(tl.uint32),
        _scramble,
        _times,
    )


@device_function
def store_keys(at, key0, key1):
    """Keeps the keys of rows, both in one cell of their scalars."""
    keys = key0.to(tl.uint64) | (key1.to(tl.uint64) << 32)
    tl.store(at, keys.to(tl.float64, bitcast=True))


@device_function
def load_keys(at):
    """The two keys of a row."""
    keys = tl.load(at).to(tl.uint64, bitcast=True)
    return keys.to(tl.uint32), (keys >> 32).to(tl.uint32)


@device_function
def random_words(low, high, key0, key1):
    """The random words of elements with these indices, given as uint32 halves."""
    return _rules_random_word(low, high, key0, key1, _scramble, _times)


@device_function
def load_weight(p_at, master_at, mask, MASTER: tl.constexpr, COMPUTE: tl.constexpr, OTHER: tl.constexpr = None):
    """Weights at these addresses; `OTHER` outside of the mask.

    What completes a parameter counts only as far as it still fits: others may have written to the parameter.
    """
    p = tl.load(p_at, mask=mask, other=OTHER)
    if MASTER is None:
        weight = p.to(COMPUTE)
    elif tl.float32 == MASTER:
        copy = tl.load(master_at, mask=mask, other=OTHER)
        weight = tl.where(narrow(copy, p.dtype).to(tl.float32) == p.to(tl.float32), copy, p.to(tl.float32))
    else:
        bits = (p.to(tl.int16, bitcast=True).to(tl.int32) << 16) + tl.load(master_at, mask=mask, other=OTHER).to(
            tl.int32
        )
        weight = bits.to(tl.float32, bitcast=True)
        # Zeros and infinities have remainders of one sign only: with one that is left over they would become NaN.
        weight = tl.where(weight != weight, p.to(tl.float32), weight)
    return weight


@device_function
def store_weight(weight, p_at, master_at, words, mask, P: tl.constexpr, MASTER: tl.constexpr, ROUNDING: tl.constexpr):
    """Stores weights at these addresses, and what completes them. `words` is None where nothing is random.

    Returns the weights as they can be read again if that is in 16 bits alone, None if nothing is lost of them.
    """
    kept = None
    if MASTER is None:
        if ROUNDING == _STOCHASTIC_WEIGHTS and P.primitive_bitwidth == 16:
            rounded = _stochastic(weight, words & 0xFFFF, P)
        else:
            rounded = narrow(weight, P)
        tl.store(p_at, rounded, mask=mask)
        if P.primitive_bitwidth == 16:
            kept = rounded.to(weight.dtype)
    elif tl.float32 == MASTER:
        tl.store(master_at, weight, mask=mask)
        tl.store(p_at, narrow(weight, P), mask=mask)
    else:
        bits = tl.where(weight != weight, 0x7FC00000, weight.to(tl.int32, bitcast=True))
        tl.store(master_at, bits.to(tl.int16), mask=mask)
        tl.store(p_at, ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    return kept


@device_function
def load_moment(at, mask, COMPUTE: tl.constexpr, OTHER: tl.constexpr = None):
    """Moments at these addresses; `OTHER` outside of the mask."""
    return tl.load(at, mask=mask, other=OTHER).to(COMPUTE)


@device_function
def store_moment(x, at, mask, DTYPE: tl.constexpr, words=None, ROUNDING: tl.constexpr = 0):
    """Stores moments at these addresses; with `words`, those that would freeze in 16 bits if rounded to nearest."""
    if ROUNDING > 0 and DTYPE.primitive_bitwidth == 16:
        if tl.float64 == x.dtype:  # what float32 cannot hold becomes its largest number; for `clamp` there is no code
            within = tl.maximum(tl.minimum(x, 3.4028234663852886e38), -3.4028234663852886e38)
            x = tl.where(tl.abs(x) < float("inf"), within, x)
        tl.store(at, _stochastic(x.to(tl.float32), words >> (16 if tl.bfloat16 == DTYPE else 19), DTYPE), mask=mask)
    else:
        tl.store(at, narrow(x, DTYPE), mask=mask)


@device_function
def _stochastic(x, bits, DTYPE: tl.constexpr):
    """float32 rounded to DTYPE, up in magnitude if the part that does not fit and these bits make a whole unit.

    16 bits do not fit into bfloat16, the last 13 of them into float16. What would round past the largest number becomes
    it; infinities and NaN stay what they are.
    """
    if tl.bfloat16 == DTYPE:
        # From the largest number on nothing is added. What is cut off of a NaN leaves one: arithmetic makes quiet ones.
        bits = tl.where(tl.abs(x) < 3.3895313892515355e38, bits, 0)
        rounded = ((x.to(tl.uint32, bitcast=True) + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # Times 2^-112, a number has the exponent that it has in float16, and is subnormal where it is there: what does
        # not fit are always its last 13 bits.
        moved = ((x * _TO_FLOAT16).to(tl.uint32, bitcast=True) + (bits & 0x1FFF)) & 0xFFFFE000
        finite = tl.clamp(moved.to(tl.float32, bitcast=True) * _FROM_FLOAT16, -65504.0, 65504.0)
        rounded = tl.where(tl.abs(x) < float("inf"), finite, x).to(DTYPE)
    return rounded
