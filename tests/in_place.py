"""Where a compiled kernel writes what it has read: a race, if two threads have a copy of one number each."""

import re
from math import prod
from typing import Any, NamedTuple


class InPlace(NamedTuple):
    """Elements that a kernel writes where it has read them."""

    elements: int  # that a program has in hand at once
    behind_barrier: bool  # True if all threads have read theirs before one writes


def in_place(code: Any) -> list[InPlace]:
    """Returns what compiled code writes where it has read, from Triton's representation before layouts are chosen."""
    lines = code.asm["ttir"].splitlines()
    read: dict[str, int] = {}
    found = []
    for number, line in enumerate(lines):
        if load := re.search(r"tt\.load (%[\w#]+)", line):
            read[load[1]] = number
            continue
        store = re.search(r"tt\.store (%[\w#]+),.* : (?:tensor<((?:\d+x)+))?!tt\.ptr", line)
        if store and store[1] in read:
            elements = prod(int(size) for size in (store[2] or "").split("x") if size)
            found.append(InPlace(elements, any("barrier" in between for between in lines[read[store[1]] : number])))
    return found
