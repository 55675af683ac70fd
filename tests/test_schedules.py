"""The schedules, compared with recordings of the originals, and as objects."""

from __future__ import annotations

import builtins
import copy
import inspect
import json
import math
import pickle
import warnings
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.schedules import CLOSED_FORMS, EVERY_NAME, RTOL, advance, rates, sgd

from fusedopt import schedules
from fusedopt.schedules import SchedulerType

GOLDEN = Path(__file__).parent / "golden"
RECORDED = {version: json.loads((GOLDEN / f"schedules_{version}.json").read_text()) for version in ("v4", "v5")}
CASES = [
    pytest.param(version, case, id=f"{version}-{case['name']}")
    for version, recorded in RECORDED.items()
    for case in recorded["cases"]
]


def divides_by_zero(case: dict[str, Any]) -> bool:
    return case["error"] is not None and case["error"]["type"] == "ZeroDivisionError"


def refused_by_us(case: dict[str, Any]) -> bool:
    return case["name"] == "constant_with_warmup/negative"


def call(case: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    return getattr(schedules, case["function"])(optimizer=optimizer, **case["args"])


def optimizer_of(case: dict[str, Any]) -> torch.optim.SGD:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], **group} for group in case["groups"]]
    return torch.optim.SGD(groups, lr=case["default_lr"])


@pytest.mark.parametrize(("version", "case"), CASES)
def test_golden(version: str, case: dict[str, Any]) -> None:
    if refused_by_us(case):
        with pytest.raises(ValueError, match="must be >= 0, got -3"):
            call(case, optimizer_of(case))
        return
    if divides_by_zero(case):
        case = {**case, "error": None, "steps": len(case["lrs"])}
    optimizer = optimizer_of(case)
    raises = case["error"] and pytest.raises(getattr(builtins, case["error"]["builtin_bases"][0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if raises and case["error"]["at"] == "construct":
            with raises:
                call(case, optimizer)
            return
        scheduler = call(case, optimizer)
    assert [w.category.__name__ for w in caught] == case["warnings"]
    assert case.get("scheduler_class", "LRScheduler") in [cls.__name__ for cls in type(scheduler).__mro__]
    for k, expected in enumerate(case["lrs"]):
        if k > 0:
            optimizer.step()
            scheduler.step(*case["metrics"][k - 1 : k] if "metrics" in case else [])
        assert rates(optimizer) == pytest.approx(expected, rel=RTOL, abs=0), f"after {k} steps"
        assert scheduler.get_last_lr() == rates(optimizer)
    if raises:
        optimizer.step()
        with raises:
            scheduler.step()


def test_every_departure_from_the_originals_is_known() -> None:
    departures = {
        (version, case["name"])
        for version, recorded in RECORDED.items()
        for case in recorded["cases"]
        if divides_by_zero(case) or refused_by_us(case)
    }
    assert {name for _, name in departures} == {
        "constant_with_warmup/negative",
        "polynomial/w10_t10",
        "polynomial/w1_t1",
        "polynomial/w0_t0",
        "inverse_sqrt/w0_tsNone",
        "get_scheduler/inverse_sqrt/warmup_0",
    }
    assert {name for version, name in departures if version == "v5"} == {
        "constant_with_warmup/negative",
        "polynomial/w10_t10",
        "polynomial/w1_t1",
        "polynomial/w0_t0",
    }


@pytest.mark.parametrize("warm_up", [0, 1, 10])
def test_polynomial_with_warm_up_equal_to_total_ends_at_lr_end(warm_up: int) -> None:
    optimizer = sgd()
    scheduler = schedules.get_polynomial_decay_schedule_with_warmup(optimizer, warm_up, warm_up, lr_end=0.003)
    seen = []
    for _ in range(warm_up + 4):
        seen += rates(optimizer)
        advance(scheduler)
    assert seen == pytest.approx([0.1 * step / warm_up for step in range(warm_up)] + [0.003] * 4, rel=RTOL)


def test_inverse_sqrt_without_warm_up_takes_ten_thousand_steps() -> None:
    optimizer = sgd()
    schedule = schedules.get_inverse_sqrt_schedule(optimizer, 0).lr_lambdas[0]
    assert [schedule(step) for step in (0, 10_000, 30_000)] == pytest.approx([1.0, math.sqrt(0.5), 0.5], rel=RTOL)


@pytest.mark.parametrize("version", RECORDED)
def test_names_and_members_are_the_originals(version: str) -> None:
    for member in RECORDED[version]["scheduler_type"]:
        assert SchedulerType[member["name"]].value == member["value"] == SchedulerType(member["value"])
        assert isinstance(SchedulerType[member["name"]], str)
        assert callable(getattr(schedules, member["function"]))
    assert len(SchedulerType) == len(EVERY_NAME) == 12


POSITIONS = {
    "get_scheduler": "name optimizer num_warmup_steps=None num_training_steps=None scheduler_specific_kwargs=None",
    "get_constant_schedule": "optimizer last_epoch=-1",
    "get_constant_schedule_with_warmup": "optimizer num_warmup_steps last_epoch=-1",
    "get_linear_schedule_with_warmup": "optimizer num_warmup_steps num_training_steps last_epoch=-1",
    "get_cosine_schedule_with_warmup": "optimizer num_warmup_steps num_training_steps num_cycles=0.5 last_epoch=-1",
    "get_cosine_with_hard_restarts_schedule_with_warmup": (
        "optimizer num_warmup_steps num_training_steps num_cycles=1 last_epoch=-1"
    ),
    "get_polynomial_decay_schedule_with_warmup": (
        "optimizer num_warmup_steps num_training_steps lr_end=1e-07 power=1.0 last_epoch=-1"
    ),
    "get_inverse_sqrt_schedule": "optimizer num_warmup_steps timescale=None last_epoch=-1",
    "get_reduce_on_plateau_schedule": "optimizer kwargs",
    "get_greedy_schedule": "optimizer kwargs",
    "get_cosine_with_min_lr_schedule_with_warmup": (
        "optimizer num_warmup_steps num_training_steps num_cycles=0.5 last_epoch=-1 min_lr=None min_lr_rate=None"
    ),
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": (
        "optimizer num_warmup_steps num_training_steps num_cycles=0.5 last_epoch=-1 min_lr=None min_lr_rate=None"
        " warmup_lr_rate=None"
    ),
    "get_wsd_schedule": (
        "optimizer num_warmup_steps num_decay_steps num_training_steps=None num_stable_steps=None"
        " warmup_type='linear' decay_type='cosine' min_lr_ratio=0 num_cycles=0.5 last_epoch=-1"
    ),
    "GreedyLR": (
        "optimizer mode='min' factor=0.95 patience=10 threshold=1e-06 threshold_mode='abs' cooldown=0 warmup=0"
        " min_lr=0.001 max_lr=1.0 eps=1e-08 verbose=False smooth=False window_size=50 reset_start=500"
    ),
}


@pytest.mark.parametrize("function", POSITIONS)
def test_signatures_are_the_originals(function: str) -> None:
    parameters = inspect.signature(getattr(schedules, function)).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert " ".join(shown) == POSITIONS[function]


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_schedule_is_a_flat_frozen_object_that_says_what_it_is(name: str) -> None:
    schedule = CLOSED_FORMS[name]
    assert schedule.name == name
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}  # type: ignore[arg-type]
    assert vars(schedule) == {"name": name, **values}
    assert all(value is None or type(value) in (int, float, str) for value in values.values())
    assert repr(schedule) == f"{type(schedule).__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"
    assert eval(repr(schedule), vars(schedules)) == schedule
    with pytest.raises(FrozenInstanceError):
        schedule.num_warmup_steps = 3
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule and twin is not schedule and hash(twin) == hash(schedule)
        assert twin(17) == schedule(17)


def test_numbers_of_numpy_and_torch_become_plain_ones() -> None:
    schedule = schedules.LinearSchedule(np.int64(5), torch.tensor(40.0))  # type: ignore[arg-type]
    assert [type(value) for value in vars(schedule).values()] == [str, int, float] and schedule == CLOSED_FORMS[
        "linear"
    ]


def test_inverse_sqrt_with_a_timescale_that_vanishes_against_the_warm_up() -> None:
    schedule = schedules.InverseSqrtSchedule(5, timescale=1e-20)
    assert schedule(5) == 1.0 and schedule(6) == pytest.approx(1e-10)


STEPS = [0, 1, 4, 5, 6, 17, 30, 31, 32, 39, 40, 41, 60]


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_numbers_arrays_and_tensors_agree(name: str) -> None:
    schedule = CLOSED_FORMS[name]
    expected = [schedule(step) for step in STEPS]
    assert all(type(value) is float for value in expected)
    assert [schedule(float(step)) for step in STEPS] == expected
    assert [schedule(np.int64(step)) for step in STEPS] == expected
    for kind in (np.array, torch.tensor, list):
        factors = schedule(kind(STEPS))
        assert isinstance(factors, np.ndarray if kind is list else type(kind(STEPS)))
        assert str(factors.dtype).endswith("float64") and tuple(factors.shape) == (len(STEPS),)
        # numpy's and torch's vectorized cosine may be an ulp off math.cos, where 1 + cos has lost all its digits.
        np.testing.assert_allclose(np.asarray(factors), expected, rtol=RTOL, atol=2e-16)
    square = schedule(np.array(STEPS[:4]).reshape(2, 2))
    assert square.shape == (2, 2) and schedule(torch.tensor(5)).shape == ()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_arrays_beyond_the_ends_raise_no_floating_point_warning(name: str) -> None:
    with np.errstate(all="raise"):
        assert np.isfinite(CLOSED_FORMS[name](np.array([0.0, 1e9]))).all()
