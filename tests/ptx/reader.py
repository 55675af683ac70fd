"""PTX as text -> basic blocks of instructions."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


class UnknownInstructionError(Exception):
    """An instruction, a modifier or an operand that the executor does not know; raised before anything runs."""


@dataclass(eq=False)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all modifiers.
        operands: as written; a list for a vector in braces.
        guard: (predicate, negated), None for none.
        where: the line of the kernel's source, with the calls that led there.
    """

    opcode: str
    operands: list[str | list[str]]
    guard: tuple[str, bool] | None = None
    where: str = ""

    def __str__(self) -> str:
        operands = ", ".join("{" + ", ".join(x) + "}" if isinstance(x, list) else x for x in self.operands)
        guard = "" if self.guard is None else f"@{'!' * self.guard[1]}{self.guard[0]} "
        return f"{guard}{self.opcode} {operands}"


Label = str


@dataclass
class Listing:
    """A kernel, read.

    Attributes:
        name: of its entry.
        params: names of its parameters.
        threads: of a block.
        statements: labels and instructions in their order.
    """

    name: str
    params: list[str]
    threads: int
    statements: list[Label | Instruction]


@dataclass
class Block:
    """Instructions that run one after the other, and where to go from there.

    Attributes:
        end: "fall", "exit", "barrier", "jump" to `target`, or "branch" to it where the predicate `guard` holds.
    """

    label: Label | None = None
    body: list[Instruction] = field(default_factory=list)
    end: str = "fall"
    target: Label = ""
    last: Instruction | None = None
    """What ended it, if an instruction did."""


def read(text: str) -> Listing:
    """Returns the kernel in a PTX file.

    Raises:
        UnknownInstructionError: what is no label, instruction, or declaration of registers.
    """
    entry = text.index(".entry")
    begin, end = text.index("{", entry), text.index("$L__func_end0")
    name = re.match(r"\.entry (\w+)\(", text[entry:])
    threads = re.search(r"\.reqntid (\d+)\s*\{", text)
    if name is None or threads is None:
        raise UnknownInstructionError(f"no entry with a fixed number of threads: {text[entry:begin]}")
    params = re.findall(r"\.param [^,)]*?(\w+_param_\d+)", text[entry:begin])
    return Listing(name[1], params, int(threads[1]), list(_statements(text[begin + 1 : end])))


_LABEL = re.compile(r"(\$?[\w$]+):\s*")


def _statements(body: str) -> Iterator[Label | Instruction]:
    where, pending = "", ""
    for line in body.splitlines():
        code, _, comment = (part.strip() for part in line.partition("//"))
        if code.startswith(".loc"):
            where = comment
            continue
        while code:
            if not pending:
                if label := _LABEL.match(code):
                    if not label[1].startswith(("$L__tmp", "$L__func")):  # marks for debuggers
                        yield label[1]
                    code = code[label.end() :]
                    continue
                if code[0] in "{}":  # a scope around inline assembly
                    code = code[1:].lstrip()
                    continue
            statement, semicolon, code = code.partition(";")
            pending, code = f"{pending} {statement}".strip(), code.lstrip()
            if semicolon:
                if not pending.startswith((".reg", ".pragma")):
                    yield _instruction(pending, where)
                pending = ""
    if pending:
        raise UnknownInstructionError(pending)


def _instruction(statement: str, where: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
    if found is None:
        raise UnknownInstructionError(statement)
    negated, predicate, opcode, rest = found.groups()
    operands: list[str | list[str]] = []
    for vector, single in re.findall(r"\{([^}]*)\}|((?:\[[^]]*\]|[^,{}])+)", rest):
        if vector:
            operands.append([x.strip() for x in vector.split(",")])
        elif single.strip():
            operands.append(single.strip())
    return Instruction(opcode, operands, (predicate, negated == "!") if predicate else None, where)


def blocks(statements: Iterable[Label | Instruction]) -> list[Block]:
    """Returns the basic blocks in the order of the text; a "fall" and a "branch" not taken go on to the next."""
    found = [Block()]
    for statement in statements:
        block = found[-1]
        if isinstance(statement, Label):
            if block.body or block.label:
                found.append(Block(statement))
            else:
                block.label = statement
            continue
        end = _end(statement)
        if end == "fall":
            block.body.append(statement)
            continue
        block.end, block.last = end, statement
        if end in ("jump", "branch"):
            block.target = str(statement.operands[0])
        found.append(Block())
    if not found[-1].body and not found[-1].label:
        found.pop()
    return found


def _end(i: Instruction) -> str:
    """How an instruction ends its block; "fall" if it does not."""
    if i.opcode in ("bra", "bra.uni"):
        return "branch" if i.guard else "jump"
    ends = {"ret": "exit", "bar.sync": "barrier"}
    if i.opcode in ends and (i.guard or i.operands not in ([], ["0"])):
        raise UnknownInstructionError(str(i))
    return ends.get(i.opcode, "fall")
