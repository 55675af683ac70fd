"""A kernel -> Python functions, one of each basic block, that call `arithmetic` with a register's bits as arguments.

Whatever is not known here is an error when a kernel is read, never when it runs: an instruction has to fit a row of
`RULES` with all its modifiers, and roundings have to be spelled out.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ptx import arithmetic
from ptx.reader import Block, Instruction, Listing, UnknownInstructionError, blocks

SHARED_BASE = 1024
"""Where shared memory begins, for whoever takes the address of `global_smem`."""

REGISTERS = {"%rs": np.uint16, "%rd": np.uint64, "%r": np.uint32, "%p": np.bool_}
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x", "%ntid.x")

UNSIGNED = {"16": np.uint16, "32": np.uint32, "64": np.uint64}
TYPES: dict[str, Any] = {
    **{f"u{bits}": t for bits, t in UNSIGNED.items()},
    **{"s16": np.int16, "s32": np.int32, "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64},
}


Operations = Mapping[str, Callable[..., Any]]
"""Functions by the first word of an instruction."""


class Rule(NamedTuple):
    """How instructions of one form are computed.

    Attributes:
        pattern: of the opcode; its groups fill the braces of the other fields.
        result, sources: types: u, s, f and a number of bits, bf16, or p for a predicate. 16-bit floats become float32.
        function: of the sources; or by the first group of the pattern.
    """

    pattern: str
    result: str
    sources: str
    function: Callable[..., Any] | Operations


COMPARISONS: dict[str, Callable[..., Any]] = {
    **{"eq": np.equal, "ne": arithmetic.ordered_not_equal},
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    "neu": np.not_equal,
    "nan": arithmetic.unordered,
    "num": lambda a, b: ~arithmetic.unordered(a, b),
}
for _name in ("eq", "lt", "le", "gt", "ge"):  # true for NaN too
    COMPARISONS[_name + "u"] = lambda a, b, _ordered=COMPARISONS[_name]: _ordered(a, b) | arithmetic.unordered(a, b)
_SIGNS = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
OF_INTEGERS: Operations = {**COMPARISONS, **_SIGNS, "ne": np.not_equal}
_ANY = "|".join(COMPARISONS)
_OF_INTEGERS = "eq|ne|lt|le|gt|ge|lo|ls|hi|hs"
_SUM: Operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "div": np.divide}
_BITS: Operations = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_EXTREMES: Operations = {
    **{"max": arithmetic.float_max, "min": arithmetic.float_min},
    **{"max.NaN": arithmetic.nan_max, "min.NaN": arithmetic.nan_min},
}
_TO_16 = {"bf16": arithmetic.to_bf16, "f16": arithmetic.to_f16}


def _as(dtype: Any) -> Callable[[Any], Any]:
    return lambda x: x.astype(dtype)


RULES = [
    Rule(r"(add|sub|mul\.lo)\.[su](16|32|64)", "u{2}", "u{2} u{2}", _SUM),
    Rule(r"mul\.wide\.([su])32", "{1}64", "{1}32 {1}32", arithmetic.multiply_wide),
    Rule(r"mul\.hi\.([su])32", "{1}32", "{1}32 {1}32", arithmetic.multiply_high),
    Rule(r"mad\.wide\.([su])32", "{1}64", "{1}32 {1}32 {1}64", lambda a, b, c: arithmetic.multiply_wide(a, b) + c),
    Rule(r"mad\.lo\.[su](32|64)", "u{1}", "u{1} u{1} u{1}", lambda a, b, c: a * b + c),
    Rule(r"div\.([su])(32|64)", "{1}{2}", "{1}{2} {1}{2}", arithmetic.quotient),
    Rule(r"rem\.([su])(32|64)", "{1}{2}", "{1}{2} {1}{2}", arithmetic.remainder),
    Rule(r"(max|min)\.([su])(32|64)", "{2}{3}", "{2}{3} {2}{3}", {"max": np.maximum, "min": np.minimum}),
    Rule(r"neg\.s(32|64)", "s{1}", "s{1}", np.negative),
    Rule(r"(and|or|xor)\.b(16|32|64)", "u{2}", "u{2} u{2}", _BITS),
    Rule(r"(and|or|xor)\.pred", "p", "p p", _BITS),
    Rule(r"(not)\.b(16|32|64)", "u{2}", "u{2}", _BITS),
    Rule(r"(not)\.pred", "p", "p", _BITS),
    Rule(r"shl\.b(16|32|64)", "u{1}", "u{1} u32", arithmetic.shift_left),
    Rule(r"shr\.[ub](16|32|64)", "u{1}", "u{1} u32", arithmetic.shift_right),
    Rule(r"shr\.s(16|32|64)", "s{1}", "s{1} u32", arithmetic.shift_right),
    Rule(r"bfe\.u32", "u32", "u32 u32 u32", arithmetic.bit_field),
    Rule(r"prmt\.b32", "u32", "u32 u32 u32", arithmetic.permute_bytes),
    Rule(r"popc\.b32", "u32", "u32", arithmetic.population_count),
    Rule(r"selp\.[bfsu](16|32|64)", "u{1}", "u{1} u{1} p", lambda a, b, p: np.where(p, a, b)),
    Rule(r"(add|sub|mul|div)\.rn\.f(32|64)", "f{2}", "f{2} f{2}", _SUM),
    Rule(r"fma\.rn\.f64", "f64", "f64 f64 f64", arithmetic.fma),
    Rule(r"sqrt\.rn\.f(32|64)", "f{1}", "f{1}", np.sqrt),
    Rule(r"rcp\.approx\.ftz\.f64", "f64", "f64", arithmetic.reciprocal),
    Rule(r"(max|min)\.f(32|64)", "f{2}", "f{2} f{2}", _EXTREMES),
    Rule(r"(max\.NaN|min\.NaN)\.f(32|64)", "f{2}", "f{2} f{2}", _EXTREMES),
    Rule(r"min\.xorsign\.abs\.f32", "f32", "f32 f32", arithmetic.xorsign_min),
    Rule(r"abs\.f(32|64)", "f{1}", "f{1}", np.abs),
    Rule(r"abs\.ftz\.f32", "f32", "f32", lambda a: np.abs(arithmetic.flushed(a))),
    Rule(r"neg\.f(32|64)", "f{1}", "f{1}", np.negative),
    Rule(rf"setp\.({_ANY})\.f(32|64)", "p", "f{2} f{2}", COMPARISONS),
    Rule(rf"setp\.({_ANY})\.(bf16|f16)", "p", "{2} {2}", COMPARISONS),
    Rule(rf"setp\.({_OF_INTEGERS})\.b?([su])(16|32|64)", "p", "{2}{3} {2}{3}", OF_INTEGERS),
    Rule(r"setp\.(eq|ne)\.b(16|32|64)", "p", "u{2} u{2}", OF_INTEGERS),
    Rule(r"cvt\.f32\.(bf16|f16)", "f32", "{1}", lambda x: x),
    Rule(r"cvt\.f64\.(bf16|f16)", "f64", "{1}", _as(np.float64)),
    Rule(r"cvt\.f64\.f32", "f64", "f32", _as(np.float64)),
    Rule(r"cvt\.rn\.f32\.f64", "f32", "f64", _as(np.float32)),
    Rule(r"cvt\.rn\.(bf16|f16)\.f(32|64)", "u16", "f{2}", _TO_16),
    Rule(r"cvt\.rn\.bf16x2\.f32", "u32", "f32 f32", lambda a, b: arithmetic.packed(*map(arithmetic.to_bf16, (a, b)))),
    Rule(r"cvt\.rn\.f16x2\.f32", "u32", "f32 f32", lambda a, b: arithmetic.packed(*map(arithmetic.to_f16, (a, b)))),
    *(Rule(rf"cvt\.rn\.f{bits}\.([su])(32|64)", f"f{bits}", "{1}{2}", _as(TYPES["f" + bits])) for bits in ("32", "64")),
    Rule(r"cvt\.rzi\.s32\.f(32|64)", "s32", "f{1}", lambda x: arithmetic.to_integer(x, np.int32)),
    Rule(r"cvt\.rzi\.s64\.f(32|64)", "s64", "f{1}", lambda x: arithmetic.to_integer(x, np.int64)),
    *(Rule(rf"cvt\.[su]{bits}\.([su])(16|32|64)", f"u{bits}", "{1}{2}", _as(UNSIGNED[bits])) for bits in UNSIGNED),
]
_COMPILED = [(re.compile(rule.pattern), rule) for rule in RULES]


@dataclass
class Kernel:
    """A kernel that `machine.Run` can run.

    Attributes:
        listing: what it was made of.
        blocks: its basic blocks.
        targets: of each block, the index of the one that its end names; -1 for none.
        functions: of each block, a function of (machine, registers, indices of threads or None for all, their number);
            it returns, of a "branch", which threads take it.
        numbered: the instructions that talk to the machine, by the number that they give.
        registers: dtypes of the register file.
        source: of the functions.
    """

    listing: Listing
    blocks: list[Block]
    targets: list[int]
    functions: list[Callable[..., Any]] = field(default_factory=list)
    numbered: list[Instruction] = field(default_factory=list)
    registers: list[Any] = field(default_factory=list)
    source: str = ""

    def where(self, number: int) -> str:
        """Says which instruction a number stands for."""
        i = self.numbered[number]
        return f"{self.listing.name}: {i.opcode} at {i.where}"


def translate(listing: Listing) -> Kernel:
    """Returns the kernel, ready to run.

    Raises:
        UnknownInstructionError: one that no rule fits.
    """
    found = blocks(listing.statements)
    places = {block.label: place for place, block in enumerate(found) if block.label}
    kernel = Kernel(listing, found, [places[block.target] if block.target else -1 for block in found])
    names: dict[str, Any] = {"full": np.full, "where": np.where, "put": put, **TYPES}
    slots: dict[str, int] = {}
    writers = [_Writer(kernel, names, slots) for _ in found]
    for writer, block in zip(writers, found):
        for i in block.body:
            try:
                writer.instruction(i)
            except UnknownInstructionError as error:
                raise UnknownInstructionError(f"{listing.name}: {i} at {i.where}: {error}") from None
        if block.end == "branch" and block.last is not None and block.last.guard is not None:
            writer.lines.append(f"branch = {writer.guard(block.last.guard)}")
    needed = set().union(*(writer.loaded for writer in writers))  # the others never leave their block
    kernel.registers = [_register_type(register) for register in slots]
    functions = []
    for number, (writer, block) in enumerate(zip(writers, found)):
        kept = [f"put(R, {slots[r]}, I, {r[1:]})" for r in writer.written if r in needed]
        lines = [*writer.lines, *kept, "return branch" if block.end == "branch" else "return None"]
        functions.append(f"def block{number}(m, R, I, n):\n    " + "\n    ".join(lines))
    kernel.source = "\n\n".join(functions)
    exec(compile(kernel.source, f"<{listing.name}>", "exec"), names)
    kernel.functions = [names[f"block{number}"] for number in range(len(found))]
    return kernel


def put(registers: list[Any], slot: int, index: Any, value: Any) -> None:
    """Writes a register of some threads. Arrays may be those of several registers, so none is written into."""
    if index is not None:
        new = registers[slot].copy()
        new[index] = value
        value = new
    registers[slot] = value


def _register_type(register: str) -> Any:
    return REGISTERS[re.sub(r"\d+$", "", register)]


def _is_register(x: Any) -> bool:
    return isinstance(x, str) and re.fullmatch(r"%(rs|rd|r|p)\d+", x) is not None


class _Writer:
    """Writes the function of one basic block. Registers are locals there, once they are loaded or written."""

    def __init__(self, kernel: Kernel, names: dict[str, Any], slots: dict[str, int]) -> None:
        self.kernel, self.names, self.slots = kernel, names, slots
        self.lines: list[str] = []
        self.loaded: set[str] = set()
        self.written: dict[str, None] = {}

    # ---- operands

    def name(self, value: Any, prefix: str = "K") -> str:
        """The name of a value that the function uses."""
        key = f"{prefix}_{value.dtype.str[1:]}_{value.tobytes().hex()}" if prefix == "K" else f"{prefix}{id(value)}"
        self.names[key] = value
        return key

    def read(self, x: Any, type_: str) -> str:
        """An operand as an expression of a type, as in a `Rule`."""
        bits = re.sub(r"^\D+", "", type_)
        if type_ == "bf16":
            return f"{self.name(arithmetic.from_bf16, 'F')}({self.bits(x, '16')})"
        if type_ == "f16":
            return f"{self.bits(x, '16')}.view(f16).astype(f32)"
        if type_ == "p" or type_[0] == "u":
            return self.bits(x, bits)
        return f"{self.bits(x, bits)}.view({type_})"

    def bits(self, x: Any, bits: str) -> str:
        """An operand as unsigned bits, "" for a predicate."""
        if not isinstance(x, str):
            raise UnknownInstructionError(f"a vector {x} where a single operand belongs")
        if _is_register(x):
            if _register_type(x) is not (UNSIGNED[bits] if bits else np.bool_):
                raise UnknownInstructionError(f"register {x} as {bits or 'predicate'}")
            self.slots.setdefault(x, len(self.slots))
            if x not in self.loaded and x not in self.written:
                self.lines.append(f"{x[1:]} = R[{self.slots[x]}] if I is None else R[{self.slots[x]}][I]")
                self.loaded.add(x)
            return x[1:]
        if x in SPECIAL and bits == "32":
            return f"m.special({x!r}, I)"
        if x == "global_smem" and bits:
            return self.name(UNSIGNED[bits](SHARED_BASE))
        if (re.fullmatch(r"0f[0-9A-Fa-f]{8}", x) and bits == "32") or (
            re.fullmatch(r"0d[0-9A-Fa-f]{16}", x) and bits == "64"
        ):
            return self.name(UNSIGNED[bits](int(x[2:], 16)))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", x):
            value = int(x.rstrip("U"), 0)
            return self.name(UNSIGNED[bits](value % (1 << int(bits))) if bits else np.bool_(value))
        raise UnknownInstructionError(f"operand {x}")

    def array(self, x: Any, bits: str) -> str:
        """`bits`, as an array even if it is a constant."""
        value = self.bits(x, bits)
        return f"full(n, {value})" if value.startswith("K_") else value

    def guard(self, guard: tuple[str, bool]) -> str:
        predicate = self.bits(guard[0], "")
        return f"~{predicate}" if guard[1] else predicate

    def address(self, text: Any, bits: str) -> str:
        found = re.fullmatch(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\d+))?\s*\]", str(text))
        if found is None:
            raise UnknownInstructionError(f"address {text}")
        offset = int(found[2] or 0) % (1 << int(bits))
        return self.array(found[1], bits) + (f" + {self.name(UNSIGNED[bits](offset))}" if offset else "")

    def write(self, register: Any, expression: str, guard: tuple[str, bool] | None = None) -> None:
        """Gives a register the value of an expression; `_` and the `tmp` of a scope are thrown away."""
        if register in ("_", "tmp"):
            return
        if not _is_register(register):
            raise UnknownInstructionError(f"result {register}")
        if guard is not None:
            bits = {np.uint16: "16", np.uint32: "32", np.uint64: "64", np.bool_: ""}[_register_type(register)]
            expression = f"where({self.guard(guard)}, {expression}, {self.bits(register, bits)})"
        self.slots.setdefault(register, len(self.slots))
        self.lines.append(f"{register[1:]} = {expression}")
        self.written[register] = None

    def number(self, i: Instruction) -> int:
        """The number under which the machine hears of an instruction."""
        numbered = self.kernel.numbered
        if not numbered or numbered[-1] is not i:
            numbered.append(i)
        return len(numbered) - 1

    # ---- instructions

    def instruction(self, i: Instruction) -> None:
        word = i.opcode.split(".")
        if word[0] == "mov":
            return self.move(i, word[-1])
        if word[0] in ("ld", "st"):
            return self.access(i, word)
        if word[0] in ("ldmatrix", "stmatrix"):
            return self.matrix(i)
        if word[0] in ("shfl", "redux"):
            return self.exchange(i)
        if re.fullmatch(rf"setp\.({_ANY})\.b?f16x2", i.opcode):
            return self.compare_pairs(i, word)
        if i.opcode == "div.full.f32":
            quotient = f"m.approximate({self.read(i.operands[1], 'f32')} / {self.read(i.operands[2], 'f32')})"
            return self.write(i.operands[0], f"{quotient}.view(u32)", i.guard)
        for pattern, rule in _COMPILED:
            if found := pattern.fullmatch(i.opcode):
                return self.by_rule(i, rule, found)
        raise UnknownInstructionError("no rule for it")

    def by_rule(self, i: Instruction, rule: Rule, found: re.Match[str]) -> None:
        result, *sources = (type_.format(found[0], *found.groups()) for type_ in (rule.result, *rule.sources.split()))
        if len(i.operands) != 1 + len(sources):
            raise UnknownInstructionError(f"{len(i.operands)} operands")
        function = rule.function if callable(rule.function) else rule.function[found[1]]
        given = [self.source(x, type_, i) for x, type_ in zip(i.operands[1:], sources)]
        if re.match(r"(div|rem)\.[su]", i.opcode):
            self.lines.append(f"m.check_divisor({self.number(i)}, {given[1]})")
        value = f"{self.name(function, 'F')}({', '.join(given)})"
        if result[0] in "sf":
            value = f"{value}.view(u{result[1:]})"
        if not any(_is_register(x) for x in i.operands[1:]):
            value = f"full(n, {value})"
        self.write(i.operands[0], value, i.guard)

    def source(self, x: Any, type_: str, i: Instruction) -> str:
        """`read`; an integer to be converted may come in a wider register, of which the end counts."""
        if i.opcode.startswith("cvt.") and type_[0] in "su" and _is_register(x):
            wide = 8 * np.dtype(_register_type(x)).itemsize
            if wide > int(type_[1:]):
                return f"{self.bits(x, str(wide))}.astype({type_})"
        return self.read(x, type_)

    def move(self, i: Instruction, type_: str) -> None:
        bits = "" if type_ == "pred" else type_[1:]
        to, of = i.operands
        if isinstance(to, list):
            value, part = self.bits(of, bits), int(bits) // len(to)
            for k, register in enumerate(to):
                self.write(register, f"({value} >> {self.name(UNSIGNED[bits](k * part))}).astype(u{part})", i.guard)
        elif isinstance(of, list):
            part = int(bits) // len(of)
            parts = [
                f"({self.array(x, str(part))}.astype(u{bits}) << {self.name(UNSIGNED[bits](k * part))})"
                for k, x in enumerate(of)
            ]
            self.write(to, " | ".join(parts), i.guard)
        else:
            self.write(to, self.array(of, bits), i.guard)

    def access(self, i: Instruction, word: list[str]) -> None:
        """`ld.global.b32`, `st.shared.v4.b32` and the like, or a parameter."""
        found = re.fullmatch(r"(ld|st)\.(global|shared)(?:\.v([24]))?\.[bufs](16|32|64)", i.opcode)
        if i.opcode == "ld.param.b64" and i.guard is None:
            return self.write(i.operands[0], f"full(n, m.param({str(i.operands[1])[1:-1]!r}))")
        if found is None:
            raise UnknownInstructionError("no such access")
        kind, space, count, bits = found.groups()
        at, values = i.operands[::-1] if kind == "ld" else i.operands
        registers = values if isinstance(values, list) else [values]
        if len(registers) != int(count or 1):
            raise UnknownInstructionError(f"{len(registers)} registers")
        mask = "None" if i.guard is None else self.guard(i.guard)
        address = self.address(at, "64" if space == "global" else "32")
        arguments = f"{self.number(i)}, I, {address}, {mask}, {int(bits) // 8}"
        if kind == "ld":
            self.lines.append(f"t = m.{space}_load({arguments}, {len(registers)})")
            for k, register in enumerate(registers):
                self.write(register, f"t[{k}]", i.guard)
        else:
            self.lines.append(f"m.{space}_store({arguments}, [{', '.join(self.array(r, bits) for r in registers)}])")

    def matrix(self, i: Instruction) -> None:
        found = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", i.opcode)
        if found is None or i.guard is not None:
            raise UnknownInstructionError("no such access")
        at, registers = i.operands[::-1] if found[1] == "ld" else i.operands
        arguments = f"{self.number(i)}, I, {self.address(at, '32')}"
        if found[1] == "ld":
            self.lines.append(f"t = m.matrix_load({arguments}, {found[2]})")
            for k, register in enumerate(registers):
                self.write(register, f"t[{k}]")
        else:
            self.lines.append(f"m.matrix_store({arguments}, [{', '.join(self.bits(r, '32') for r in registers)}])")

    def exchange(self, i: Instruction) -> None:
        """Shuffles and sums of whole warps."""
        to, of, *rest = map(str, i.operands)
        form = i.opcode, *rest[1:]
        arguments = f"{self.number(i)}, I, {self.array(of, '32')}"
        if i.guard is None and form == ("shfl.sync.bfly.b32", "31", "-1") and rest[0].isdigit():
            return self.write(to, f"m.shuffle_xor({arguments}, {int(rest[0])})")
        if i.guard is None and form == ("shfl.sync.idx.b32", "31", "-1"):
            return self.write(to, f"m.shuffle({arguments}, {self.array(rest[0], '32')})")
        if i.guard is None and i.opcode == "redux.sync.add.s32":
            return self.write(to, f"m.warp_sum({arguments}, {self.array(rest[0], '32')})")
        raise UnknownInstructionError("no such exchange")

    def compare_pairs(self, i: Instruction, word: list[str]) -> None:
        function = self.name(COMPARISONS[word[1]], "F")
        for k, register in enumerate(str(i.operands[0]).split("|")):
            halves = [f"({self.bits(x, '32')} >> {self.name(np.uint32(16 * k))}).astype(u16)" for x in i.operands[1:]]
            if word[2] == "bf16x2":
                values = [f"{self.name(arithmetic.from_bf16, 'F')}({half})" for half in halves]
            else:
                values = [f"{half}.view(f16)" for half in halves]
            self.write(register, f"{function}({', '.join(values)})", i.guard)
