"""Spoilt instructions, and those that could be left out."""

from random import Random

import pytest

from ptx.reader import Instruction, read
from ptx.snippets import kernel_text
from ptx.spoiling import dead, spoilt, with_statement
from ptx.translator import translate


def test_an_instruction_is_spoilt_in_every_way_that_fits_it() -> None:
    listing = read(kernel_text("setp.lt.u32 %p1, %r1, 3;\n@%p1 st.global.b32 [%rd1], %r1;\nbar.sync 0;", 1))
    found: dict[str, set[str]] = {}
    for at, i in enumerate(listing.statements):
        for way, new in spoilt(listing, at, Random(0)):
            assert isinstance(i, Instruction)
            assert str(new) != str(i)
            translate(with_statement(listing, at, new))
            found.setdefault(i.opcode, set()).add(way)
    assert found["st.global.b32"] == {"guard negated", "guard dropped", "dropped", "address off by one element"}
    assert found["setp.lt.u32"] >= {"other word", "other border", "operands swapped", "other number", "result 0"}
    assert found["bar.sync"] == {"dropped"}


DEAD = {
    "overwritten": ("mov.b32 %r2, 0;\nld.global.b32 %r2, [%rd1];", ["mov.b32 %r2, 0"]),
    "overwritten by some threads": ("mov.b32 %r2, 0;\n@%p1 ld.global.b32 %r2, [%rd1];", []),
    "read by what is dead": ("mov.b32 %r3, 1;\nadd.s32 %r4, %r3, %r3;", ["mov.b32 %r3, 1", "add.s32 %r4, %r3, %r3"]),
    "read in the next turn of a loop": (
        "mov.b32 %r2, 0;\n$L__again:\nmov.b32 %r3, 1;\nadd.s32 %r2, %r2, %r3;\n@%p1 bra $L__again;",
        [],
    ),
    "counted, and never asked for": ("$L__again:\nadd.s32 %r3, %r3, 1;\n@%p1 bra $L__again;", ["add.s32 %r3, %r3, 1"]),
}


@pytest.mark.parametrize("body, expected", DEAD.values(), ids=DEAD)
def test_a_result_that_nobody_reads_is_dead(body: str, expected: list[str]) -> None:
    listing = read(kernel_text(body + "\nst.global.v2.b32 [%rd1], {%r1, %r2};", 1))
    found = {str(listing.statements[at]) for at in dead(listing)}
    assert found == set(expected)
