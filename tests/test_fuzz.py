"""A fixed number of fuzzed runs, the same every time; `make fuzz` goes on from there. See `fuzz`."""

import pytest
from fuzz import drawn
from fuzz.machine import machine
from helpers.optimizers import NEEDS_TRITON
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


EAGER, TRITON = (50, 10), (8, 6)
"""Examples, and events of each: in the interpreter, a step takes many times as long."""


@pytest.mark.parametrize(
    ("backends", "examples", "events"),
    [
        pytest.param(("eager",), *EAGER, id="eager"),
        pytest.param(("triton", "eager"), *TRITON, id="triton", marks=NEEDS_TRITON),
    ],
)
@pytest.mark.parametrize("name", drawn.NAMES)
def test_random_runs(name, backends, examples, events):
    run_state_machine_as_test(
        machine(name, backends),
        settings=settings(
            max_examples=examples,
            stateful_step_count=events,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
