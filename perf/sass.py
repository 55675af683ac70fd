"""Instructions that a compiled kernel issues per element, where no GPU can time it: read from its machine code.

At copy bandwidth, a GPU issues so many instructions while it moves a byte; a kernel that needs most of them is no
longer bound by memory. Counted is the main path: the loop over a matrix where there is one, else the kernel from its
beginning, with every branch that may be taken but without the subroutines for divisions and roots of rare numbers.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from fusedopt_kernels import elementwise, norm
from fusedopt_kernels.adafactor import plan, step

SLOTS_PER_BYTE = {"H200": 6.9, "H100": 9.9}
"""Instructions per thread that a GPU may issue for each byte it copies: 132 multiprocessors x 4 schedulers x 32 lanes x
1.755 GHz, over 4.3 and 3.0 TB/s."""

ELEMENTS = {
    "update": elementwise.BLOCK // elementwise.THREADS,
    "sum_of_squares": norm.BLOCK // norm.THREADS,
    **dict.fromkeys(("sums", "squares", "apply"), plan.BLOCK // step.THREADS),
}
"""Elements of an aligned tensor that a thread has in hand at once, by the kernels that read gradients."""

_READ = {"sum_of_squares": ("grad",), "squares": ("grad",), "sums": ("param", "grad", "master")}
_WRITE = {"update", "apply"}


class Issued(NamedTuple):
    """What a kernel needs per element."""

    bytes: int  # read and written
    instructions: float

    @property
    def budget(self) -> float:
        """Instructions that an H200 may issue while it copies as many bytes."""
        return SLOTS_PER_BYTE["H200"] * self.bytes

    @property
    def share(self) -> float:
        """Share of the budget."""
        return self.instructions / self.budget


def issued(launch: Any) -> Issued | None:
    """Returns what a launch of `compiled` needs; None for kernels that read no gradients, and for other machines."""
    if launch.kernel not in ELEMENTS or "cubin" not in launch.code.asm:
        return None
    path = main_path(disassembled(launch.code.asm["cubin"]))
    return Issued(_bytes(launch.kernel, launch.constants["A"]), len(path) / ELEMENTS[launch.kernel])


def _bytes(kernel: str, access: Any) -> int:
    """Bytes of one element of each tensor that a kernel reads, and of each that it writes, with Adafactor's average."""
    tensors = access._fields[: access._fields.index("compute")]
    sizes = {name: int(re.sub(r"\D", "", dtype)) // 8 for name in tensors if (dtype := getattr(access, name))}
    read = sum(size for name, size in sizes.items() if name in _READ.get(kernel, tensors))
    return read + (sum(sizes.values()) - sizes["grad"] if kernel in _WRITE else 0)


def disassembled(cubin: bytes) -> str:
    """Returns the text of machine code, with labels."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def main_path(text: str) -> list[str]:
    """Returns the instructions of the main path, of a loop once around.

    Several loops: the one with most 128-bit reads is over aligned matrices.
    """
    instructions, labels = _parsed(text)
    following = [_following(i, instruction, labels) for i, instruction in enumerate(instructions)]
    loops = [(to, i) for i, targets in enumerate(following) for to in targets if to < i]
    ends = [(0, i) for i, instruction in enumerate(instructions) if instruction.startswith("EXIT")]
    around = [[instructions[i] for i in _longest(following, *loop)] for loop in loops]
    widest = max(around, key=_wide_reads, default=[])
    if _wide_reads(widest):
        return widest
    return max(([instructions[i] for i in _longest(following, *end)] for end in ends), key=len)


def _wide_reads(instructions: Sequence[str]) -> int:
    return sum(bool(re.search(r"\bLDG\S*\.128", instruction)) for instruction in instructions)


def _parsed(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and the labels in front of them."""
    instructions: list[str] = []
    labels = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    return instructions, labels


def _following(place: int, instruction: str, labels: dict[str, int]) -> list[int]:
    """The places that may come next; none behind a call, which is for rare numbers."""
    guard, name, rest = re.fullmatch(r"(@\S+ +)?(\S+)(.*)", instruction).groups()  # type: ignore[union-attr]
    if name.startswith(("CALL", "RET")) or (name.startswith("EXIT") and not guard):
        return []
    if not name.startswith("BRA"):
        return [place + 1]
    target = labels[re.search(r"\.L_\w+", rest)[0]]  # type: ignore[index]
    always = not guard and not re.match(r" +!?U?P\d", rest)
    return [target] if always else [place + 1, target]


def _longest(following: Sequence[Sequence[int]], start: int, end: int) -> list[int]:
    """The longest way from one instruction to a later one without going back; empty if there is none."""
    ways: dict[int, tuple[int, int]] = {end: (1, end)}  # length, and the next instruction
    for i in range(end - 1, start - 1, -1):
        later = [(ways[j][0] + 1, j) for j in following[i] if j > i and j in ways]
        if later:
            ways[i] = max(later)
    way = [start] if start in ways else []
    while way and way[-1] != end:
        way.append(ways[way[-1]][1])
    return way
