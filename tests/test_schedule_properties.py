"""Properties of every schedule for any parameters, and the parameters that are refused."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from helpers.schedules import sgd
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedopt import schedules
from fusedopt.schedules import example_arguments, get_scheduler, needs_metric

counts = st.one_of(st.integers(0, 500), st.floats(0.01, 500))
shares = st.floats(0, 2)
cycles = st.floats(0, 8)
shapes = st.sampled_from(["linear", "cosine", "1-sqrt"])
positive = st.floats(1e-6, 10)


@st.composite
def polynomials(draw: st.DrawFn) -> schedules.PolynomialSchedule:
    lr_init = draw(positive)
    return schedules.PolynomialSchedule(
        draw(counts), draw(counts), lr_init, draw(st.floats(0, 0.99)) * lr_init, draw(st.floats(0, 50))
    )


any_schedule = st.one_of(
    st.builds(schedules.ConstantSchedule),
    st.builds(schedules.ConstantWithWarmupSchedule, counts),
    st.builds(schedules.LinearSchedule, counts, counts),
    st.builds(schedules.CosineSchedule, counts, counts, cycles),
    st.builds(schedules.CosineWithRestartsSchedule, counts, counts, cycles),
    polynomials(),
    st.builds(schedules.InverseSqrtSchedule, counts, st.one_of(st.none(), st.floats(1e-30, 1e6))),
    st.builds(schedules.CosineWithMinLRSchedule, counts, counts, st.floats(-1, 2), cycles),
    st.builds(
        schedules.CosineWarmupWithMinLRSchedule,
        counts,
        counts,
        st.floats(-1, 2),
        cycles,
        st.one_of(st.none(), shares),
    ),
    st.builds(schedules.WarmupStableDecaySchedule, counts, counts, counts, st.none(), shapes, shapes, shares, cycles),
    st.builds(schedules.WarmupStableDecaySchedule, counts, counts, st.none(), counts, shapes, shapes, shares, cycles),
)


@settings(max_examples=200)
@given(any_schedule, st.one_of(st.integers(0, 2000), st.floats(0, 1e9)))
def test_finite_and_non_negative_wherever_it_is_defined(schedule: schedules.Schedule, step: float) -> None:
    value = schedule(step)
    assert math.isfinite(value) and value >= 0
    with np.errstate(all="raise", under="ignore"):
        array = schedule(np.array([0.0, step]))
    # An ulp of the arguments of cos and of a power is amplified by up to 8 cycles, or an exponent of 50.
    assert array == pytest.approx([schedule(0), value], rel=1e-11, abs=1e-13)
    assert schedule(torch.tensor([step], dtype=torch.float64)).tolist() == pytest.approx([value], rel=1e-11, abs=1e-13)


START = {
    "constant": lambda s: 1.0,
    "cosine_warmup_with_min_lr": lambda s: (
        1.0 / max(1, s.num_warmup_steps) if s.warmup_lr_rate is None else s.warmup_lr_rate
    ),
    "warmup_stable_decay": lambda s: s.min_lr_ratio,
}


@settings(max_examples=200)
@given(any_schedule)
def test_starts_where_its_parameters_say(schedule: schedules.Schedule) -> None:
    if schedule.num_warmup_steps > 0:
        assert schedule(0) == pytest.approx(START.get(schedule.name, lambda s: 0.0)(schedule))


def wave(num_cycles: float) -> float:
    return 0.5 + 0.5 * math.cos(2 * math.pi * num_cycles)


END = {
    "linear": lambda s: 0.0,
    "cosine": lambda s: wave(s.num_cycles),
    "cosine_with_restarts": lambda s: 0.0,
    "polynomial": lambda s: s.lr_end / s.lr_init if s.power > 0 else 1.0,
    "cosine_with_min_lr": lambda s: max(0.0, s.min_lr_rate + (1 - s.min_lr_rate) * wave(s.num_cycles)),
    "cosine_warmup_with_min_lr": lambda s: max(0.0, s.min_lr_rate + (1 - s.min_lr_rate) * wave(s.num_cycles)),
    "warmup_stable_decay": lambda s: s.min_lr_ratio,
}


@settings(max_examples=200)
@given(any_schedule, st.integers(0, 300), st.integers(1, 300))
def test_peaks_after_the_warm_up_and_ends_where_its_parameters_say(
    schedule: schedules.Schedule, warm_up: int, decay: int
) -> None:
    changes: dict[str, Any] = {"num_warmup_steps": warm_up, "num_training_steps": warm_up + decay}
    if schedule.name == "warmup_stable_decay":
        changes |= {"num_decay_steps": decay, "num_stable_steps": None}
    arguments = {name: changes.get(name, value) for name, value in asdict(schedule).items()}
    schedule = type(schedule)(**arguments)
    end = getattr(schedule, "num_training_steps", None)
    if schedule.name == "cosine_warmup_with_min_lr":  # one step further on
        assert warm_up < 2 or schedule(warm_up - 1) == pytest.approx(1.0)
        assert schedule(end - 1) == pytest.approx(END[schedule.name](schedule), abs=1e-12)
        return
    assert schedule(schedule.num_warmup_steps) == pytest.approx(1.0)
    if end is not None:
        assert schedule(end) == pytest.approx(END[schedule.name](schedule), abs=1e-12)


BAD = {
    "unknown name": (
        lambda o: get_scheduler("lineal", o, 1, 2),
        "'lineal', did you mean 'linear'. choose one of linear, cosine, .*greedy",
    ),
    "no name": (lambda o: get_scheduler(None, o, 1, 2), "None; choose one of"),  # type: ignore[arg-type]
    "no warm-up": (lambda o: get_scheduler("linear", o, None, 10), "needs num_warmup_steps; give it"),
    "no total": (lambda o: get_scheduler("linear", o, 1), "needs num_training_steps; give"),
    "None as warm-up": (
        lambda o: schedules.get_linear_schedule_with_warmup(o, None, 10),  # type: ignore[arg-type]
        "num_warmup_steps is missing",
    ),
    "None as total": (
        lambda o: schedules.get_cosine_schedule_with_warmup(o, 1, None),  # type: ignore[arg-type]
        "num_training_steps is missing",
    ),
    "negative warm-up": (lambda o: get_scheduler("linear", o, -1, 10), "num_warmup_steps must be >= 0, got -1; .*0"),
    "negative total": (lambda o: get_scheduler("cosine", o, 1, -10), "num_training_steps must be >= 0, got -10"),
    "negative decay": (lambda o: schedules.get_wsd_schedule(o, 1, -2, 10), "num_decay_steps must be >= 0, got -2"),
    "negative stable": (
        lambda o: schedules.get_wsd_schedule(o, 1, 2, num_stable_steps=-3),
        "num_stable_steps must be >= 0, got -3",
    ),
    "nan count": (lambda o: get_scheduler("linear", o, math.nan, 10), "num_warmup_steps must be a finite number"),
    "count too large": (
        lambda o: get_scheduler("linear", o, 0, 10**5000),
        "num_training_steps must be .* got a larger one",
    ),
    "infinite count": (lambda o: get_scheduler("linear", o, 0, math.inf), "num_training_steps must be a finite number"),
    "count as text": (lambda o: get_scheduler("linear", o, "10", 20), "must be a finite number, got '10'"),  # type: ignore[arg-type]
    "lr_end equal": (
        lambda o: schedules.get_polynomial_decay_schedule_with_warmup(o, 1, 9, lr_end=0.1),
        r"lr_end must be below the initial learning rate 0.1, got 0.1; pass a smaller",
    ),
    "lr_end above": (
        lambda o: get_scheduler("polynomial", o, 1, 9, {"lr_end": 0.2}),
        "lr_end must be below .* got 0.2",
    ),
    "negative power": (lambda o: get_scheduler("polynomial", o, 1, 9, {"power": -1}), "power must be >= 0, got -1"),
    "min_lr and min_lr_rate": (
        lambda o: get_scheduler("cosine_with_min_lr", o, 1, 9, {"min_lr": 0.01, "min_lr_rate": 0.1}),
        "min_lr=0.01 and min_lr_rate=0.1 exclude each other; give one",
    ),
    "neither min_lr": (lambda o: get_scheduler("cosine_warmup_with_min_lr", o, 1, 9), "both missing; give one"),
    "negative warmup_lr_rate": (
        lambda o: get_scheduler("cosine_warmup_with_min_lr", o, 1, 9, {"min_lr_rate": 0.1, "warmup_lr_rate": -0.1}),
        "warmup_lr_rate must be >= 0, got -0.1; leave it out",
    ),
    "timescale zero": (
        lambda o: schedules.get_inverse_sqrt_schedule(o, 0, timescale=0),
        "timescale must be > 0, got 0",
    ),
    "neither total nor stable": (lambda o: schedules.get_wsd_schedule(o, 1, 2), "both missing; give one of them"),
    "unknown shape": (
        lambda o: schedules.get_wsd_schedule(o, 1, 2, 9, decay_type="exp"),
        "decay_type must be one of linear, cosine, 1-sqrt, got 'exp'",
    ),
    "negative min_lr_ratio": (
        lambda o: schedules.get_wsd_schedule(o, 1, 2, 9, min_lr_ratio=-0.1),
        "min_lr_ratio must be >= 0, got -0.1",
    ),
    "greedy factor": (
        lambda o: get_scheduler("greedy", o, scheduler_specific_kwargs={"factor": 1.5}),
        "factor must be < 1",
    ),
    "greedy list": (lambda o: schedules.get_greedy_schedule(o, max_lr=[1, 2]), "max_lr must be one number or 1"),
    "unknown name in needs_metric": (lambda o: needs_metric("plateau"), "choose one of"),
    "unknown name in example_arguments": (lambda o: example_arguments("plateau", 9), "choose one of"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_one_sentence_with_the_way_out(what: str) -> None:
    act, message = BAD[what]
    with pytest.raises(ValueError) as caught:
        act(sgd())
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["linear", "polynomial"])
def test_an_optimizer_without_a_rate_is_refused(name: str) -> None:
    optimizer = sgd()
    optimizer.defaults["lr"] = optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match=r"lr=None.*; give"):
        get_scheduler(name, optimizer, 1, 10)


def test_an_initial_rate_of_zero_is_refused_where_it_is_a_divisor() -> None:
    optimizer = sgd(default=0.0)
    with pytest.raises(ValueError, match="give min_lr_rate"):
        schedules.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 1, 9, min_lr=0.0)
    with pytest.raises(ValueError, match="must be > 0"):
        schedules.get_polynomial_decay_schedule_with_warmup(optimizer, 1, 9, lr_end=-1.0)


@pytest.mark.parametrize(
    ("name", "specific"), [("linear", {"num_cycles": 2}), ("warmup_stable_decay", {}), ("greedy", {"foo": 1})]
)
def test_arguments_that_the_function_lacks_are_type_errors_as_in_the_original(name: str, specific: dict) -> None:
    with pytest.raises(TypeError):
        get_scheduler(name, sgd(), 1, 10, specific)


def test_plateau_needs_its_metric() -> None:
    with pytest.raises(TypeError):
        get_scheduler("reduce_lr_on_plateau", sgd()).step()  # type: ignore[call-arg]


def test_greedy_says_what_it_changes_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = schedules.get_greedy_schedule(sgd(), patience=0, factor=0.5, verbose=True)
    scheduler.step(1.0)
    assert capsys.readouterr().out == "metric 1: learning rates [0.1] -> [0.2]\n"
