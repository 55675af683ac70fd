"""How launches are compared with the interpreter's: planted differences, and what may differ."""

import numpy as np
import pytest
import torch
import triton.language as tl

from ptx.agreement import APPLY, Launch, disagreement
from ptx.arithmetic import Array
from ptx.cases import CASES
from ptx.gpu import kernel_of, listing_of, standing_in
from ptx.memory import BASE, Journal, Registry, Span
from ptx.mutants import EQUIVALENT, NUMBERS, try_out
from ptx.reader import Instruction
from ptx.replays import Launches
from ptx.spoiling import with_statement
from ptx.translator import translate

EXACT, SUMS = "adamw.update", "step.sums"


def wrong(
    kernel: str, found: Array, right: Array, dtype: str = "float32", compute: str = "", also: Array | None = None
) -> str | None:
    """What is wrong with numbers found where others are right; `also` is what only the launch writes, behind them."""
    more = np.zeros(0, found.dtype) if also is None else also
    memory = np.zeros(len(found) + len(more), found.dtype)
    size, address = memory.itemsize, memory.ctypes.data
    registry = Registry([Span(address, address + memory.nbytes, "an array", dtype)])
    cells = (address - BASE) // size + np.arange(len(memory))
    other = Journal()
    other.note(size, cells[: len(right)])
    memory[: len(right)] = right
    expected = other.written()
    other.undo()
    journal, now = Journal(), np.concatenate([found, more])
    journal.note(size, cells)
    memory[:] = now
    message = disagreement(Launch(kernel, compute, expected, registry), journal)
    assert memory.tobytes() == now.tobytes()
    return message


def units_above(x: Array, units: int) -> Array:
    return (x.view(f"i{x.itemsize}") + units).view(x.dtype)


ONES = np.linspace(1.0, 1.9, 8, dtype=np.float32)


def test_what_is_not_added_up_agrees_to_the_bit() -> None:
    assert wrong(EXACT, ONES, ONES) is None
    message = wrong(EXACT, np.append(ONES[:-1], units_above(ONES[-1:], 1)), ONES)
    assert message is not None
    assert "element 7 of an array" in message
    assert ": 1 units apart" in message


def test_nan_is_nan_and_the_sign_of_zero_counts() -> None:
    nan = np.array([np.nan, 0.0], np.float32)
    assert wrong(EXACT, -nan * [1, -1], nan) is None
    assert wrong(EXACT, np.array([np.nan, -0.0], np.float32), nan)
    assert wrong(EXACT, np.array([1.0, 0.0], np.float32), nan)


def test_what_one_of_them_alone_writes() -> None:
    assert wrong(EXACT, ONES, ONES, also=np.zeros(2, np.float32)) is None  # as it was before
    assert wrong(EXACT, ONES, ONES, also=np.ones(2, np.float32))


@pytest.mark.parametrize("units", [4, 5])
def test_sums_may_be_a_few_units_off(units: int) -> None:
    assert (wrong(SUMS, units_above(ONES, units), ONES) is None) == (units == 4)
    wide = ONES.astype(np.float64)
    assert (wrong(SUMS, units_above(wide, units), wide, "float64") is None) == (units == 4)
    assert (wrong(SUMS, units_above(wide, units << 29), wide, "float64", "fp32") is None) == (units == 4)
    assert wrong(EXACT, units_above(wide, units << 29), wide, "float64", "fp32")  # measures are not in float32


@pytest.mark.parametrize("ties", [9, 20])
def test_few_numbers_of_16_bits_fall_to_the_other_side_of_a_tie(ties: int) -> None:
    right = np.full(1000, 0x3F80, np.uint16)
    found = np.where(np.arange(1000) < ties, 0x3F81, right).astype(np.uint16)
    assert (wrong(APPLY, found, right, "bfloat16") is None) == (ties == 9)
    assert wrong(EXACT, found, right, "bfloat16")
    assert wrong(APPLY, np.where(found > right, found + 1, found).astype(np.uint16), right, "bfloat16")


def language() -> list[dict[str, object]]:
    return [{name: getattr(x, name) for name in dir(x)} for x in (tl, tl.core, tl.math, tl.standard, tl.tensor)]


def test_the_interpreter_leaves_the_language_as_it_was() -> None:
    before = language()
    with standing_in(compared=True) as gpu:
        CASES["Lion statistics float32"].run("triton")
    assert gpu.launches
    assert language() == before


def test_every_store_that_is_dropped_is_noticed() -> None:
    torch.use_deterministic_algorithms(True)
    launches = Launches()
    launches.run(CASES["AdamW options on the device, float32"])
    for text in launches.names:
        listing = listing_of(text)
        for at in sorted(launches.executed(text)):
            i = listing.statements[at]
            if isinstance(i, Instruction) and i.opcode.startswith("st.global"):
                assert try_out(kernel_of(text), launches.of(text, at)) == EQUIVALENT
                assert try_out(translate(with_statement(listing, at, None)), launches.of(text, at)) == NUMBERS, i
