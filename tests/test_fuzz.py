"""A fixed number of fuzzed runs, the same every time; `make fuzz` goes on from there. See `fuzz`."""

import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from fuzz import drawn, formulas
from fuzz.bounds import FLOAT32, FLOAT64, Bound
from fuzz.events import Run
from fuzz.machine import machine
from fuzz.setups import Grads, Group, Setup, Spec
from fuzz.watch import Enough, Watch
from helpers.optimizers import NEEDS_TRITON
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

EAGER, TRITON = (50, 10), (8, 6)
"""Examples, and events of each: in the interpreter, a step takes many times as long."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("backends", "examples", "events"),
    [
        pytest.param(("eager",), *EAGER, id="eager"),
        pytest.param(("triton", "eager"), *TRITON, id="triton", marks=NEEDS_TRITON),
    ],
)
@pytest.mark.parametrize("name", drawn.NAMES)
def test_random_runs(name, backends, examples, events):
    """The seed is a number of their own, not hypothesis' of the source of what is tested, which edits would change."""
    under_test = machine(name, backends, watch=Watch(shrinking=math.inf))
    run_state_machine_as_test(
        seed(zlib.crc32(f"{name} on {backends[0]}".encode()))(under_test),
        settings=settings(
            max_examples=examples,
            stateful_step_count=events,
            suppress_health_check=list(HealthCheck),
        ),
    )


EXAMPLES = """
import importlib, sys
from fuzz import drawn
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

for module in sys.argv[1:]:
    importlib.import_module(module)

@seed(0)
@settings(max_examples=100, database=None, deadline=None, phases=[Phase.generate])
@given(st.tuples(drawn.setups("AdamW", "eager", True), drawn.grads()))
def show(example):
    print(example)

show()
"""


@pytest.mark.slow
def test_examples_stay_when_the_source_changes(tmp_path):
    """hypothesis prefers numbers that it finds in source files to others: from 100 on, and of a file up to 1,024."""
    (tmp_path / "numbers_of_others.py").write_text(f"NUMBERS = {tuple(range(100, 1000))}")
    path = ":".join([*sys.path, str(tmp_path)])
    shown = [
        subprocess.run(
            [sys.executable, "-c", EXAMPLES, *others],
            env={"PYTHONPATH": path},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for others in ([], ["numbers_of_others"])
    ]
    assert shown[0] == shown[1] and shown[0].count("Setup(") >= 100


def test_norms_of_the_reference_end_where_float64_squares_do():
    def norm(*numbers):
        found = Bound.of(np.array(numbers), FLOAT64).norm()
        return found.value, found.error

    for size in (1.35e154, 1e200, 1e300, math.inf):  # squares overflow, whatever else there is
        assert norm(size) == norm(1.0, -size) == (math.inf, 0.0)
    assert norm(1e154, 1e154) == (math.inf, 0.0)
    assert norm(1.3407807929942596e154)[1] == math.inf  # may be either
    for size in (1e-140, 1e-20, 3.0, 1e153):
        value, error = norm(size, size)
        assert abs(value - size * math.sqrt(2.0)) <= error < 1e-14 * size
    for size in (1e-163, 1e-200):  # squares underflow, and cannot leave more than their own number
        value, error = norm(size, size)
        assert error >= value and error < 1e-161
    assert norm(0.0, 0.0) == (0.0, 0.0)


def test_the_reference_clips_by_a_number_of_the_gradients_dtype():
    """0.001 is none of float32; gradients within the limit stay as exact as they were."""
    for kind, clamped in ((FLOAT32, float(np.float32(0.001))), (FLOAT64, 0.001)):
        gradient = Bound.of(np.array([math.inf, -1.0, 1e-4]), kind)
        (clipped,) = formulas.keras_clipped([gradient], {"clipvalue": 0.001, "clipnorm": None, "global_clipnorm": None})
        assert (abs(clipped.value - [clamped, -clamped, 1e-4]) <= clipped.error).all()
        assert clipped.error[2] == 0.0 and (clipped.error < 8.0 * 0.001 * kind.unit).all()


def test_the_reference_does_not_guess_beside_a_limit():
    limit = Bound.of(1.0, FLOAT64)
    assert formulas.is_above(Bound.of(1.1, FLOAT64, 0.01), limit)
    assert not formulas.is_above(Bound.of(0.9, FLOAT64, 0.01), limit) and not formulas.is_above(limit, limit)
    for number in (Bound.of(1.005, FLOAT64, 0.01), Bound.of(0.995, FLOAT64, 0.01), Bound.of(1e9, FLOAT64, math.inf)):
        with pytest.raises(formulas.UnclearError):
            formulas.is_above(number, limit)
    with pytest.raises(formulas.UnclearError):
        formulas.is_finite(Bound.of(1.0, FLOAT64, math.inf))
    assert not formulas.is_finite(Bound.of(math.inf, FLOAT64)) and formulas.is_finite(limit)


def test_a_failure_is_told_at_once_and_not_shrunk_for_ever(capsys):
    now = 0.0
    watch = Watch(shrinking=100.0, every=30.0, clock=lambda: now)

    def example(*calls, error=None):
        watch.begin_example()
        for call in calls:
            watch.begin(call, {"x": 1})
        if error is not None:
            watch.failed(error)

    example("run.a")
    example("run.a", "run.b", "run.c", error=AssertionError("first\nsecond"))
    assert capsys.readouterr().out.split(": ", 1)[1] == "AssertionError: first\n"
    now = 29.0
    example("run.a", "run.b", error=AssertionError("smaller"))
    example("run.b", "run.c", "run.d", error=AssertionError("larger again"))
    assert capsys.readouterr().out == ""
    now = 31.0
    example("run.a")
    told = capsys.readouterr().out
    assert "shrinking for 31 s, 3 examples tried, the shortest has 2 lines: AssertionError: first" in told
    now = 101.0
    with pytest.raises(Enough):
        example("run.a")
    assert watch.failing == ["run.a(x=1)", "run.b(x=1)"] and str(watch.error) == "smaller"
    watch.begin_round()
    example("run.a")
    assert watch.failing == [] and watch.examples == 7


@NEEDS_TRITON
def test_squares_too_small_for_a_normal_number_are_read_as_they_are():
    """In bfloat16 they are subnormal; Triton's interpreter took each of them for another one."""
    spec = Spec(shape=(40,), dtype=torch.bfloat16)
    options = {"lr": 0.1, "betas": (0.9, 0.9999), "master_weights": True, "state_dtype": torch.bfloat16}
    run = Run(setup=Setup("AdamW", options=options, groups=(Group(specs=(spec,), options={}),), backend="triton"))
    run.step(how=Grads(seed=42, size=3e-18))
    squares = run.optimizer.state[run.params[0]]["exp_avg_sq"]
    assert 0.0 < squares.max() < torch.finfo(torch.bfloat16).tiny
    run.step(how=Grads(seed=0, size=0.0))
