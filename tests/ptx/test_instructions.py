"""What instructions compute, against Python's integers, numpy and torch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ptx.reader import UnknownInstructionError, read
from ptx.snippets import THREADS, execute, kernel_text
from ptx.translator import translate

REGISTER = {2: "%rs", 4: "%r", 8: "%rd"}


def evaluated(opcode: str, result: Any, *operands: np.ndarray) -> np.ndarray:
    """What an instruction makes of arrays of operands; a result of type bool is a predicate."""
    lines, names = [], []
    for k, operand in enumerate(operands):
        size, register = operand.itemsize, f"{REGISTER[operand.itemsize]}{100 + k}"
        lines.append(f"mad.wide.u32 %rd{50 + k}, %r1, {size}, %rd{k + 1};")
        lines.append(f"ld.global.b{8 * size} {register}, [%rd{50 + k}];")
        names.append(register)
    number, size = len(operands), 4 if result is bool else np.dtype(result).itemsize
    to = "%p1" if result is bool else f"{REGISTER[size]}200"
    lines.append(f"{opcode} {to}, {', '.join(names)};")
    if result is bool:
        lines += ["selp.b32 %r201, 1, 0, %p1;", "mov.b32 %r200, %r201;"]
    lines.append(f"mad.wide.u32 %rd60, %r1, {size}, %rd{number + 1};")
    lines.append(f"st.global.b{8 * size} [%rd60], {REGISTER[size]}200;")
    out = np.zeros(THREADS, np.uint32 if result is bool else result)
    run = execute("\n".join(lines), *operands, out)
    assert not run.findings.counts, run.findings
    return out


def mixture(values: Sequence[Any], dtype: Any, seed: int) -> np.ndarray:
    """These values, then random ones of all bits, shuffled."""
    generator = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    bits = generator.integers(0, 256, THREADS * size, np.uint8).view(dtype)
    with np.errstate(all="ignore"):
        bits[: len(values)] = np.array(values).astype(dtype)
    return generator.permutation(bits)


def integers(dtype: Any, seed: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return mixture([limits.min, limits.max, 0, 1, 2, limits.max // 2, limits.max - 1], dtype, seed)


def floats(dtype: Any, seed: int) -> np.ndarray:
    limits = np.finfo(dtype)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, limits.max, limits.tiny, limits.tiny / 4, 1.0, -1.5, 3e9, -3e9]
    x = mixture([*special, *np.linspace(-3, 3, 20)], dtype, seed)
    return np.where(np.isnan(x), dtype(np.nan), x)  # quiet ones: what torch makes of the others differs


def cut(quotient: int, divisor: int) -> int:
    return abs(quotient) // abs(divisor) * (1 if (quotient < 0) == (divisor < 0) else -1)


INTEGER_RULES: dict[str, tuple[Any, Any, Callable[..., int]]] = {
    "add.s32": (np.int32, np.int32, lambda a, b: a + b),
    "add.s64": (np.int64, np.int64, lambda a, b: a + b),
    "sub.s32": (np.int32, np.int32, lambda a, b: a - b),
    "sub.s64": (np.int64, np.int64, lambda a, b: a - b),
    "mul.lo.s32": (np.int32, np.int32, lambda a, b: a * b),
    "mul.lo.s64": (np.int64, np.int64, lambda a, b: a * b),
    "mul.wide.s32": (np.int32, np.int64, lambda a, b: a * b),
    "mul.wide.u32": (np.uint32, np.uint64, lambda a, b: a * b),
    "mul.hi.u32": (np.uint32, np.uint32, lambda a, b: a * b >> 32),
    "mul.hi.s32": (np.int32, np.int32, lambda a, b: a * b >> 32),
    "max.s32": (np.int32, np.int32, max),
    "min.s64": (np.int64, np.int64, min),
    "max.u32": (np.uint32, np.uint32, max),
    "and.b32": (np.uint32, np.uint32, lambda a, b: a & b),
    "or.b64": (np.uint64, np.uint64, lambda a, b: a | b),
    "xor.b16": (np.uint16, np.uint16, lambda a, b: a ^ b),
    "not.b32": (np.uint32, np.uint32, lambda a: ~a),
    "neg.s32": (np.int32, np.int32, lambda a: -a),
    "popc.b32": (np.uint32, np.uint32, lambda a: a.bit_count()),
    "cvt.u64.u32": (np.uint32, np.uint64, lambda a: a),
    "cvt.s64.s32": (np.int32, np.int64, lambda a: a),
    "cvt.u32.u64": (np.uint64, np.uint32, lambda a: a),
    "cvt.s32.s16": (np.int16, np.int32, lambda a: a),
    "cvt.u16.u32": (np.uint32, np.uint16, lambda a: a),
    "setp.lt.s32": (np.int32, bool, lambda a, b: a < b),
    "setp.lt.u32": (np.uint32, bool, lambda a, b: a < b),
    "setp.ge.s64": (np.int64, bool, lambda a, b: a >= b),
    "setp.eq.b64": (np.uint64, bool, lambda a, b: a == b),
    "setp.ne.b32": (np.uint32, bool, lambda a, b: a != b),
}


@pytest.mark.parametrize("opcode", INTEGER_RULES)
def test_integers(opcode: str) -> None:
    dtype, result, rule = INTEGER_RULES[opcode]
    given = [integers(dtype, seed) for seed in range(rule.__code__.co_argcount if hasattr(rule, "__code__") else 2)]
    given[-1][:9] = given[0][:9]  # equal ones, too
    found = evaluated(opcode, result, *given)
    out = np.uint32 if result is bool else np.dtype(result)
    bits = 8 * np.dtype(out).itemsize
    expected = [rule(*map(int, row)) % (1 << bits) for row in zip(*given)]
    assert found.view(f"u{bits // 8}").tolist() == expected


@pytest.mark.parametrize("opcode", ["div.s32", "div.u32", "div.s64", "rem.s32", "rem.u32"])
def test_quotients_are_cut_off(opcode: str) -> None:
    dtype = np.dtype(("int" if ".s" in opcode else "uint") + opcode[-2:]).type
    a, b = integers(dtype, 0), integers(dtype, 1)
    b[b == 0] = 3
    b[b == -1] = 7
    found = evaluated(opcode, dtype, a, b)
    quotients = [cut(x, y) for x, y in zip(a.tolist(), b.tolist())]
    rest = [x - q * y for x, y, q in zip(a.tolist(), b.tolist(), quotients)]
    assert found.tolist() == (quotients if opcode.startswith("div") else rest)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_more_than_all_bits(bits: int) -> None:
    unsigned, signed = np.dtype(f"u{bits // 8}").type, np.dtype(f"i{bits // 8}").type
    a = integers(unsigned, 0)
    n = np.arange(THREADS, dtype=np.uint32) % (bits + 4)
    by = list(zip(a.tolist(), n.tolist()))
    assert evaluated(f"shl.b{bits}", unsigned, a, n).tolist() == [x << k & (1 << bits) - 1 for x, k in by]
    assert evaluated(f"shr.u{bits}", unsigned, a, n).tolist() == [x >> k for x, k in by]
    assert evaluated(f"shr.s{bits}", signed, a, n).tolist() == [
        x >> k for x, k in zip(a.view(signed).tolist(), n.tolist())
    ]


def test_bit_fields_and_bytes() -> None:
    a, b, c = (integers(np.uint32, seed) for seed in range(3))
    position, length = (np.arange(THREADS, dtype=np.uint32) * k % 32 for k in (1, 5))
    found = evaluated("bfe.u32", np.uint32, a, position, length)
    assert found.tolist() == [int(x) >> int(p) & (1 << int(n)) - 1 for x, p, n in zip(a, position, length)]
    for selector in (0x5410, 0x7632, 0x3210, 0xFEDC):
        found = evaluated("prmt.b32", np.uint32, a, b, np.full(THREADS, selector, np.uint32))
        for x, y, out in zip(a, b, found):
            both = int(x) | int(y) << 32
            taken = [(selector >> 4 * k) & 15 for k in range(4)]
            wanted = [both >> 8 * (t & 7) & 255 if t < 8 else 255 * (both >> 8 * (t & 7) + 7 & 1) for t in taken]
            assert out == sum(w << 8 * k for k, w in enumerate(wanted))
    found = evaluated("mad.lo.s32", np.uint32, a, b, c)
    assert found.tolist() == [(int(x) * int(y) + int(z)) % 2**32 for x, y, z in zip(a, b, c)]


def same_floats(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    assert (found[~nan] == expected[~nan]).all()
    assert (np.signbit(found[~nan]) == np.signbit(expected[~nan])).all()


FLOAT_RULES: dict[str, Callable[..., torch.Tensor]] = {
    "add.rn": torch.add,
    "sub.rn": torch.sub,
    "mul.rn": torch.mul,
    "div.rn": torch.div,
    "sqrt.rn": lambda x: x.double().sqrt().to(x.dtype),  # which rounds the root of a float32 correctly
    "abs": torch.abs,
    "neg": torch.neg,
    "max": torch.fmax,
    "min": torch.fmin,
    "max.NaN": torch.maximum,
}
UNARY = ("sqrt.rn", "abs", "neg")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FLOAT_RULES)
def test_floats(name: str, dtype: Any) -> None:
    given = [floats(dtype, seed) for seed in range(1 if name in UNARY else 2)]
    zeros = [np.where(np.abs(x) == 0, dtype(1), x) for x in given]  # the sign of the larger zero has its own test
    given = zeros if name.startswith(("max", "min")) else given
    found = evaluated(f"{name}.f{8 * np.dtype(dtype).itemsize}", dtype, *given)
    same_floats(found, FLOAT_RULES[name](*map(torch.from_numpy, given)).numpy())


def test_the_larger_zero_is_the_positive_one() -> None:
    a = np.where(np.arange(THREADS) % 2, 0.0, -0.0).astype(np.float32)
    b = np.where(np.arange(THREADS) // 2 % 2, 0.0, -0.0).astype(np.float32)
    larger, smaller = evaluated("max.f32", np.float32, a, b), evaluated("min.f32", np.float32, a, b)
    assert (np.signbit(larger) == (np.signbit(a) & np.signbit(b))).all()
    assert (np.signbit(smaller) == (np.signbit(a) | np.signbit(b))).all()


COMPARED: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b,
    "geu": lambda a, b: not a < b,
    "leu": lambda a, b: not a > b,
    "nan": lambda a, b: math.isnan(a) or math.isnan(b),
    "num": lambda a, b: not (math.isnan(a) or math.isnan(b)),
}


@pytest.mark.parametrize("type_", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_of_floats(name: str, type_: str) -> None:
    dtype = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16": np.float16}[type_]
    a, b = (floats(np.float16, seed) for seed in (0, 1))
    b[:20] = a[:20]
    given = [to_bfloat16(x.astype(np.float32)) if type_ == "bf16" else x.astype(dtype) for x in (a, b)]
    values = [from_bfloat16(x) if type_ == "bf16" else x for x in given]
    expected = [COMPARED[name](float(x), float(y)) for x, y in zip(*values)]
    assert (evaluated(f"setp.{name}.{type_}", bool, *given) == 1).tolist() == expected


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()


def test_two_comparisons_of_16_bits_at_once() -> None:
    a = np.array([1.0, 2.0, np.nan, -0.0] * 32, np.float16)
    b = np.array([1.0, 3.0, np.nan, 0.0] * 32, np.float16)
    wide = [v.astype(np.float32) for v in (a, b)]
    for type_, x, y in (("f16x2", a, b), ("bf16x2", to_bfloat16(wide[0]), to_bfloat16(wide[1]))):
        out = np.zeros(2 * THREADS, np.uint32)
        execute(
            f"""mad.wide.u32 %rd10, %r1, 4, %rd1;
            mad.wide.u32 %rd11, %r1, 4, %rd2;
            mad.wide.u32 %rd12, %r1, 8, %rd3;
            ld.global.b32 %r10, [%rd10];
            ld.global.b32 %r11, [%rd11];
            setp.eq.{type_} %p1|%p2, %r10, %r11;
            selp.b32 %r12, 1, 0, %p1;
            selp.b32 %r13, 1, 0, %p2;
            st.global.v2.b32 [%rd12], {{%r12, %r13}};""",
            *(x.copy(), y.copy(), out),
        )
        assert out.tolist() == (a == b).tolist()


@pytest.mark.parametrize("bits", [32, 64])
def test_conversions_of_floats(bits: int) -> None:
    dtype, other = (np.float32, np.float64) if bits == 32 else (np.float64, np.float32)
    x = floats(dtype, 0)
    # Ties of bfloat16 that float32 does not see: rounded to float32 first, they would fall to the even side.
    x[:4] = [1 + 2**-8 + 2**-23, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + (2**-40 if bits == 64 else 0)]
    t = torch.from_numpy(x)
    with np.errstate(all="ignore"):
        same_floats(evaluated("cvt.f64.f32" if bits == 32 else "cvt.rn.f32.f64", other, x), x.astype(other))
    half = evaluated(f"cvt.rn.f16.f{bits}", np.uint16, x)
    same_floats(half.view(np.float16), t.half().numpy())
    rounded = from_bfloat16(evaluated(f"cvt.rn.bf16.f{bits}", np.uint16, x))
    nearest = np.array([nearest_bfloat16(float(v)) for v in x], np.float32)
    same_floats(rounded, nearest)
    back = evaluated("cvt.f32.bf16", np.float32, to_bfloat16(floats(np.float32, 1)))
    same_floats(back, from_bfloat16(to_bfloat16(floats(np.float32, 1))))
    same_floats(evaluated("cvt.f32.f16", np.float32, half), half.view(np.float16).astype(np.float32))


def nearest_bfloat16(x: float) -> float:
    """By exact arithmetic: to a multiple of the unit in the last place, a tie to the even one."""
    if not math.isfinite(x) or x == 0:
        return x
    unit = 2.0 ** max(math.frexp(x)[1] - 8, -133)
    rounded = round(x / unit) * unit
    return math.copysign(math.inf if abs(rounded) >= 2.0**128 else abs(rounded), x)


@pytest.mark.parametrize("opcode", ["cvt.rzi.s32.f32", "cvt.rzi.s32.f64", "cvt.rzi.s64.f64"])
def test_floats_become_integers_towards_zero(opcode: str) -> None:
    result, dtype = (np.int64 if ".s64" in opcode else np.int32), (np.float64 if "f64" in opcode else np.float32)
    x, limits = floats(dtype, 0), np.iinfo(result)
    expected = [0 if v != v else int(min(max(v, -1e30), 1e30)) for v in x.tolist()]
    found = evaluated(opcode, result, x).tolist()
    assert found == [min(max(v, limits.min), limits.max) for v in expected]


def test_integers_become_floats() -> None:
    a = integers(np.int64, 0)
    same_floats(evaluated("cvt.rn.f32.s64", np.float32, a), torch.from_numpy(a).float().numpy())
    same_floats(evaluated("cvt.rn.f64.s64", np.float64, a), torch.from_numpy(a).double().numpy())
    b = integers(np.uint32, 0)
    same_floats(evaluated("cvt.rn.f64.u32", np.float64, b), b.astype(np.float64))


def test_a_fused_product_is_rounded_once() -> None:
    a, b = floats(np.float64, 0), floats(np.float64, 1)
    a[:1], b[:1] = 1 + 2.0**-30, 1 - 2.0**-30
    found = evaluated("fma.rn.f64", np.float64, a, b, np.full(THREADS, -1.0))
    assert found[0] == -(2.0**-60)


def test_reciprocals_are_near() -> None:
    x = np.linspace(0.1, 50, THREADS)
    np.testing.assert_allclose(evaluated("rcp.approx.ftz.f64", np.float64, x), 1 / x, rtol=2**-19)


def test_packing_two_halves() -> None:
    x, y = floats(np.float32, 0), floats(np.float32, 1)
    found = evaluated("cvt.rn.bf16x2.f32", np.uint32, x, y)
    same_floats(from_bfloat16((found >> 16).astype(np.uint16)), from_bfloat16(to_bfloat16(x)))
    same_floats(from_bfloat16((found & 0xFFFF).astype(np.uint16)), from_bfloat16(to_bfloat16(y)))
    out = np.zeros(THREADS, np.uint32)
    execute(
        """mad.wide.u32 %rd10, %r1, 4, %rd1;
        mad.wide.u32 %rd11, %r1, 4, %rd2;
        ld.global.b32 %r10, [%rd10];
        mov.b32 {%rs1, %rs2}, %r10;
        mov.b32 %r11, {%rs2, %rs1};
        st.global.b32 [%rd11], %r11;""",
        *(found, out),
    )
    assert (out == (found >> 16 | found << 16)).all()


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.b32 %r2, %r1;",
        "add.rz.f32 %r2, %r1, %r1;",  # another rounding
        "add.f32 %r2, %r1, %r1;",  # none said
        "add.s32 %r2, %rd1, %r1;",  # a register of another width
        "add.s32 %r2, %r1;",
        "add.s32 %r2, %laneid, %r1;",
        "ld.global.nc.b32 %r2, [%rd1];",
        "ld.global.b32 %r2, [%rd1+%r1];",
        "st.global.v2.b32 [%rd1], {%r1};",
        "bar.sync 1;",
        "@%p1 ret;",
        "shfl.sync.bfly.b32 %r2, %r1, 1, 15, -1;",
        "atom.global.add.u32 %r2, [%rd1], %r1;",
        "cvt.rna.bf16.f32 %rs1, %r1;",
    ],
)
def test_what_is_unknown_is_an_error_before_anything_runs(line: str) -> None:
    with pytest.raises(UnknownInstructionError):
        translate(read(kernel_text(line, 1)))
