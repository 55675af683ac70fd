"""What can go wrong with one instruction: the same kernel, spoilt at one place."""

import re
from collections.abc import Iterator
from dataclasses import replace
from random import Random

from ptx.reader import Instruction, Label, Listing, blocks

OTHER_WORDS = {
    **{"add": "sub", "sub": "add", "mul": "add", "max": "min", "min": "max", "and": "or", "or": "and", "xor": "or"},
    **{"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "neu": "eq", "geu": "ltu", "nan": "num"},
    **{"ltu": "geu", "leu": "gtu", "gtu": "leu", "equ": "ne", "num": "nan", "bf16": "f16", "f16": "bf16"},
}
OTHER_BORDERS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "ltu": "leu", "leu": "ltu", "gtu": "geu", "geu": "gtu"}
ORDERED = ("sub", "div", "rem", "shl", "shr", "selp", "setp")
"""Instructions of which it matters which of two operands comes first."""

_REGISTER = re.compile(r"%(?:rs|rd|r|p)\d+")

Spoilt = Instruction | None
"""An instruction in the place of another; None if it is dropped."""


def spoilt(listing: Listing, at: int, random: Random) -> list[tuple[str, Spoilt]]:
    """Returns the ways to spoil a statement, each with its name."""
    i = listing.statements[at]
    if isinstance(i, Label):
        return []
    return list(_ways(i, _registers_before(listing, at), random))


def with_statement(listing: Listing, at: int, statement: Spoilt) -> Listing:
    """The listing with something else in the place of a statement."""
    new = [] if statement is None else [statement]
    return replace(listing, statements=[*listing.statements[:at], *new, *listing.statements[at + 1 :]])


def dead(listing: Listing) -> set[int]:
    """Statements whose results nobody reads, but for others of them: they could be left out."""
    found = blocks(listing.statements)
    places = {block.label: k for k, block in enumerate(found) if block.label}
    after: list[list[int]] = []
    for k, block in enumerate(found):
        falls = [] if block.end in ("exit", "jump") or k + 1 == len(found) else [k + 1]
        after.append(falls + ([places[block.target]] if block.target else []))
    live_before: list[set[str]] = [set() for _ in found]
    useful: set[Instruction] = set()
    changing = True
    while changing:
        changing = False
        for k in reversed(range(len(found))):
            live = set().union(*(live_before[other] for other in after[k]))
            last = found[k].last
            for i in reversed(found[k].body if last is None else [*found[k].body, last]):
                written = set(_written(i))
                if not written or written & live:
                    useful.add(i)
                    live = (live - written if i.guard is None else live) | set(_read(i))
            changing |= live != live_before[k]
            live_before[k] = live
    statements = enumerate(listing.statements)
    return {at for at, i in statements if isinstance(i, Instruction) and i not in useful}


def _written(i: Instruction) -> list[str]:
    if i.opcode.startswith(("st.", "stmatrix", "bra", "bar", "ret")):
        return []
    return _REGISTER.findall(str(i.operands[0]))


def _read(i: Instruction) -> list[str]:
    stores = i.opcode.startswith(("st.", "stmatrix", "bra", "bar", "ret"))
    registers = _REGISTER.findall(str(i.operands if stores else i.operands[1:]))
    return registers + ([i.guard[0]] if i.guard else [])


def _registers_before(listing: Listing, at: int) -> list[str]:
    """Registers that the block has written when it comes here."""
    found: list[str] = []
    for statement in reversed(listing.statements[:at]):
        if isinstance(statement, Label):
            break
        found += _written(statement)
    return sorted(set(found))


def _ways(i: Instruction, registers: list[str], random: Random) -> Iterator[tuple[str, Spoilt]]:
    word = i.opcode.split(".")
    if i.guard is not None:
        yield "guard negated", replace(i, guard=(i.guard[0], not i.guard[1]))
        if word[0] != "bra":
            yield "guard dropped", replace(i, guard=None)
    if word[0] in ("st", "stmatrix", "bar"):
        yield "dropped", None
    if word[0] in ("bra", "bar", "ret"):
        return
    for place, w in enumerate(word[:-1] if word[0] in ("selp", "ld", "st") else word):
        for name, others in (("other word", OTHER_WORDS), ("other border", OTHER_BORDERS)):
            if w in others and not (place and word[0] in ("mul", "mad", "and", "or", "xor", "mov")):
                yield name, replace(i, opcode=".".join([*word[:place], others[w], *word[place + 1 :]]))
    if word[0] in ORDERED and not {"eq", "ne"} & set(word) and len(i.operands) >= 3:
        result, first, second, *rest = i.operands
        yield "operands swapped", replace(i, operands=[result, second, first, *rest])
    for place, operand in enumerate(i.operands):
        if isinstance(operand, list) or (place == 0 and word[0] not in ("st", "stmatrix")):
            continue
        for new, name in _other_operands(operand, registers, word, random):
            yield name, replace(i, operands=[*i.operands[:place], new, *i.operands[place + 1 :]])
    result = i.operands[0]
    if isinstance(result, str) and _REGISTER.fullmatch(result) and word[0] != "mov":
        type_ = {"%rs": "b16", "%r": "b32", "%rd": "b64", "%p": "pred"}[re.sub(r"\d+$", "", result)]
        yield "result 0", Instruction(f"mov.{type_}", [result, "0"], i.guard, i.where)


def _other_operands(operand: str, registers: list[str], word: list[str], random: Random) -> Iterator[tuple[str, str]]:
    if found := re.fullmatch(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\d+))?\s*\]", operand):
        size = int(re.sub(r"\D", "", word[-1])) // 8
        yield f"[{found[1]}+{int(found[2] or 0) + size}]", "address off by one element"
    elif _REGISTER.fullmatch(operand):
        kind = re.sub(r"\d+$", "", operand)
        others = [r for r in registers if re.fullmatch(re.escape(kind) + r"\d+", r) and r != operand]
        if others:
            yield random.choice(others), "other operand"
    elif word[0] == "shfl":
        if operand in ("1", "2", "4", "8", "16"):
            yield "2" if operand == "1" else "1", "other lane"
    elif re.fullmatch(r"-?\d+", operand):
        yield str(int(operand) + 1) if word[-1] != "pred" else str(1 - abs(int(operand))), "other number"
    elif re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
        yield "0f40400000" if operand.lower() != "0f40400000" else "0f40800000", "other number"
    elif re.fullmatch(r"0d[0-9A-Fa-f]{16}", operand):
        yield "0d4008000000000000" if operand != "0d4008000000000000" else "0d4010000000000000", "other number"
    elif operand in ("%tid.x", "%ctaid.x"):
        yield "%ctaid.x" if operand == "%tid.x" else "%tid.x", "other operand"
