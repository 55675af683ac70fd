"""Instructions that a compiled kernel issues per element, where no GPU can time it: read from its machine code.

At copy bandwidth, a GPU issues so many instructions while it moves a byte; a kernel that needs most of them is no
longer bound by memory. Counted is the main path: the loop over a matrix where there is one, else the kernel from its
beginning, with every branch that may be taken but without the subroutines for divisions and roots of rare numbers.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fusedopt_kernels import elementwise, norm
from fusedopt_kernels.adafactor import plan, step
from perf.compiled import cubin_text

SLOTS_PER_BYTE = 6.9
"""Instructions per thread that an H200 may issue for each byte it copies: 132 multiprocessors x 4 schedulers x 32 lanes
x 1.755 GHz, over 4.3 TB/s.
"""

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
        return SLOTS_PER_BYTE * self.bytes

    @property
    def share(self) -> float:
        """Share of the budget."""
        return self.instructions / self.budget


def issued(launch: Any) -> Issued | None:
    """Returns what a launch of `compiled` needs; None for kernels that read no gradients, and for other machines."""
    if launch.kernel not in ELEMENTS or "cubin" not in launch.code.asm:
        return None
    number = main_path(cubin_text(launch.code, "nvdisasm", "-c"))
    return Issued(_bytes(launch.kernel, launch.constants["A"]), number / ELEMENTS[launch.kernel])


def _bytes(kernel: str, access: Any) -> int:
    """Bytes of one element of each tensor that a kernel reads, and of each that it writes, with Adafactor's average."""
    tensors = access._fields[: access._fields.index("compute")]
    sizes = {name: int(re.sub(r"\D", "", dtype)) // 8 for name in tensors if (dtype := getattr(access, name))}
    read = sum(size for name, size in sizes.items() if name in _READ.get(kernel, tensors))
    return read + (sum(sizes.values()) - sizes["grad"] if kernel in _WRITE else 0)


def main_path(text: str) -> int:
    """Returns how many instructions the main path has, of a loop once around.

    Several loops: the one with most 128-bit reads is over aligned matrices.
    """
    instructions, labels = _parsed(text)
    wide = [bool(re.search(r"\bLDG\S*\.128", instruction)) for instruction in instructions]
    following = [_following(i, instruction, labels) for i, instruction in enumerate(instructions)]
    loops = [(to, i) for i, targets in enumerate(following) for to in targets if to < i]
    ends = [(0, i) for i, instruction in enumerate(instructions) if instruction.startswith("EXIT")]
    around = [_longest(following, wide, *loop) for loop in loops]
    length, reads = max(around, key=lambda way: way[1], default=(0, 0))
    return length if reads else max(_longest(following, wide, *end)[0] for end in ends)


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


def _longest(following: Sequence[Sequence[int]], wide: Sequence[bool], start: int, end: int) -> tuple[int, int]:
    """Length and wide reads of the longest way from one instruction to a later one without going back; 0 for none."""
    ways = {end: (1, int(wide[end]))}
    for i in range(end - 1, start - 1, -1):
        if later := [(ways[j][0], j) for j in following[i] if j > i and j in ways]:
            length, j = max(later)
            ways[i] = 1 + length, wide[i] + ways[j][1]
    return ways.get(start, (0, 0))
