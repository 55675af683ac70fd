"""Compiled steps against the eager backend: every dtype, precision and option that reaches a kernel, and shards."""

from functools import cache

import pytest
from helpers.comparing import assert_same
from triton.compiler.compiler import make_backend

from ptx.cases import CASES, ONE_OF_EVERY_KERNEL
from ptx.gpu import TARGET, standing_in
from ptx.machine import Schedule
from ptx.outcomes import Outcome, assert_agree


@cache
def eager(name: str) -> Outcome:
    return CASES[name].run("eager")


def compiled(name: str, schedule: Schedule | None = None, compared: bool = False) -> Outcome:
    with standing_in(schedule or Schedule(watched=CASES[name].watched), compared) as gpu:
        outcome = CASES[name].run("triton")
    assert gpu.launches
    return outcome


@pytest.mark.parametrize("name", CASES)
def test_compiled_steps_are_the_eager_ones(name: str) -> None:
    """And launches write what Triton's interpreter writes, to the bit where nothing is added up."""
    assert_agree(compiled(name, compared=True), eager(name), CASES[name].parameters)


@pytest.mark.parametrize("name", ONE_OF_EVERY_KERNEL)
def test_the_order_of_blocks_and_warps_changes_no_bit(name: str) -> None:
    in_order = compiled(name, Schedule(watched=False))
    assert_same(compiled(name, Schedule(seed=7, batch=8, watched=False)), in_order, name, equal_nan=True)


@pytest.mark.parametrize("name", ["Adafactor float32", "Adafactor many tiles"])
def test_approximate_instructions_may_be_off_by_two_units(name: str) -> None:
    """They are the quotient here, to nearest; a GPU promises two units in the last place."""
    assert_agree(compiled(name, Schedule(seed=3, inexact=2, watched=False)), eager(name))


def test_a_gpu_that_shares_the_cache_finds_its_machine_code() -> None:
    """What is compiled here has none; the backend's hash is part of the key in Triton's cache."""
    with standing_in():
        apart = make_backend(TARGET).hash()
    assert apart != make_backend(TARGET).hash()
