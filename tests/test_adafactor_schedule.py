"""AdafactorSchedule: recorded runs, the departures from them and their reasons, resuming and copies."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from torch.optim.lr_scheduler import LambdaLR

from fusedopt import AdamW
from fusedopt.adafactor import Adafactor
from fusedopt.adafactor_schedule import AdafactorSchedule, get_adafactor_schedule
from fusedopt.reference import ReferenceAdafactor

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "adafactor_schedule.json").read_text())["cases"]
}

# What the original does here nobody can want; each has a test of its own below.
DEPARTURES = {
    "grads_cleared": "initial_lr comes back when gradients were cleared before scheduler.step()",
    "manual_lr_unscaled": "a given lr is overwritten with initial_lr, 0.0",
    "manual_lr_scaled": "a given lr is multiplied by the parameter scale at every step",
    "partial_grads": "a group without gradient is a ValueError",
    "grads_at_construction": "gradients before the first step are a KeyError",
}


def replay(name, make=Adafactor, with_schedule=True):
    """Returns (rates, group rates) at the start and after every scheduler step, and parameters after every step."""
    case = CASES[name]
    params = [torch.nn.Parameter(torch.tensor(values)) for values in case["init"]]
    optimizer = make([{"params": [params[i] for i in group]} for group in case["groups"]], **case["adafactor_kwargs"])
    absent = {tuple(pair) for pair in case["grad_absent"]}
    if case["grads_at_construction"]:
        for p, grads in zip(params, case["grads"]):
            p.grad = torch.tensor(grads[0])
    schedule = AdafactorSchedule(optimizer, case["initial_lr"] or 0.0) if with_schedule else None
    rates, in_groups, trajectory = [], [], []

    def look():
        rates.append(list(schedule.get_last_lr() if schedule else []))
        in_groups.append([group["lr"] for group in optimizer.param_groups])

    look()
    for t in range(case["steps"]):
        for i, p in enumerate(params):
            p.grad = None if (i, t) in absent else torch.tensor(case["grads"][i][t])
        optimizer.step()
        trajectory.append([p.detach().clone() for p in params])
        if t in case["zero_grad_before_scheduler_step"]:
            optimizer.zero_grad()
        if schedule:
            schedule.step()
        look()
    return rates, in_groups, trajectory


def close(rates):
    return [[pytest.approx(rate, rel=1e-6) for rate in row] for row in rates]  # the recorded RMS is float32


def assert_same_path(trajectory, expected):
    for row, recorded in zip(trajectory, expected, strict=True):
        for p, q in zip(row, recorded, strict=True):
            assert_near(p, torch.as_tensor(q), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DEPARTURES])
def test_golden(name):
    rates, in_groups, trajectory = replay(name)
    assert rates == close(CASES[name]["last_lr"])
    assert in_groups == close(CASES[name]["group_lr"])
    assert_same_path(trajectory, CASES[name]["params"])


def test_departure_gradients_that_were_cleared_change_nothing():
    name = "grads_cleared"
    rates, in_groups, trajectory = replay(name)
    cleared = [t + 1 for t in CASES[name]["zero_grad_before_scheduler_step"]]
    for k, (shown, recorded) in enumerate(zip(rates, CASES[name]["last_lr"], strict=True)):
        if k in cleared:
            assert recorded == [0.5, 0.5] and max(shown) < 0.01
        else:
            assert shown == close([recorded])[0]
    assert in_groups == rates
    assert_same_path(trajectory, CASES[name]["params"])


@pytest.mark.parametrize("name", ["manual_lr_unscaled", "manual_lr_scaled"])
def test_departure_a_given_lr_is_kept(name):
    rates, in_groups, trajectory = replay(name)
    assert in_groups == [[0.01, 0.01]] * len(in_groups)
    assert_same_path(trajectory, replay(name, ReferenceAdafactor, with_schedule=False)[2])
    if name == "manual_lr_unscaled":
        assert rates[1:] == in_groups[1:]
    else:
        params = [[torch.tensor(values) for values in CASES[name]["init"]], *trajectory]
        scales = [[float(p.square().mean().sqrt()) for p in row] for row in params]
        assert rates[1:] == close([[0.01 * scale for scale in row] for row in scales[:-1]])


def test_departure_a_group_without_gradient_shows_its_last_rate():
    name = "partial_grads"
    rates, _, _ = replay(name)
    at = CASES[name]["error"]["at"] + 1
    assert rates[:at] == close(CASES[name]["last_lr"])[:at]
    assert len(rates) == CASES[name]["steps"] + 1
    ((group, t),) = CASES[name]["grad_absent"]
    assert rates[t + 1][group] == rates[t][group] and rates[t + 1][1 - group] != rates[t][1 - group]


def test_departure_gradients_before_the_first_step_are_no_error():
    rates, _, _ = replay("grads_at_construction")
    assert rates[0] == [0.0, 0.0] and min(rates[1]) > 0.0


def optimizer_of(*params, **options):
    return Adafactor(list(params) or [torch.nn.Parameter(torch.full((2, 2), 0.5))], **options)


def step(optimizer, *which):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        p.grad = torch.ones_like(p) if not which or i in which else None
    optimizer.step()


def test_a_frozen_first_parameter_does_not_stand_for_its_group():
    params = [torch.nn.Parameter(torch.full((2,), value)) for value in (4.0, 2.0)]
    optimizer = optimizer_of(*params)
    optimizer.init_state()
    schedule = AdafactorSchedule(optimizer, initial_lr=0.5)
    step(optimizer, 1)
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.02)]


def test_what_it_shows_is_never_what_the_optimizer_computes_with():
    shown, plain = optimizer_of(), optimizer_of()
    schedule = AdafactorSchedule(shown, initial_lr=0.7)
    for _ in range(3):
        step(shown)
        step(plain)
        schedule.step()
        schedule.step()  # once too often, as in a loop over micro-batches
    (p,), (q,) = (optimizer.param_groups[0]["params"] for optimizer in (shown, plain))
    assert_same(p, q)


def test_a_tensor_rate_stays_the_same_tensor():
    lr = torch.tensor(0.25)
    optimizer = optimizer_of(lr=lr, relative_step=False)
    schedule = AdafactorSchedule(optimizer)
    step(optimizer)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is lr and lr == 0.25
    assert schedule.get_last_lr() == [pytest.approx(0.125)]


def test_beside_a_schedule_that_drives_the_given_lr():
    optimizer = optimizer_of(lr=0.2, relative_step=False, scale_parameter=False)
    drives = LambdaLR(optimizer, lambda k: 1 / (1 + k))
    shows = AdafactorSchedule(optimizer)
    for k in range(4):
        step(optimizer)
        shows.step()
        drives.step()
        assert shows.get_last_lr() == [pytest.approx(0.2 / (1 + k))]
        assert drives.get_last_lr() == [pytest.approx(0.2 / (2 + k))]
    assert optimizer.param_groups[0]["initial_lr"] == 0.2


def test_it_leaves_no_key_in_the_groups():
    optimizer = optimizer_of()
    before = set(optimizer.param_groups[0])
    AdafactorSchedule(optimizer)
    assert set(optimizer.param_groups[0]) == before
    assert isinstance(get_adafactor_schedule(optimizer), AdafactorSchedule)


def test_resuming(tmp_path):
    optimizer = optimizer_of(warmup_init=True)
    schedule = AdafactorSchedule(optimizer, initial_lr=0.1)
    step(optimizer)
    schedule.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = optimizer_of(warmup_init=True)
    other = AdafactorSchedule(resumed)
    resumed.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["schedule"])
    assert other.get_last_lr() == schedule.get_last_lr() and other.last_epoch == 1
    step(resumed)
    other.step()
    assert other.get_last_lr() == [pytest.approx(1e-6)]  # two steps, at a scale of 0.5


def test_copies():
    optimizer = optimizer_of()
    schedule = AdafactorSchedule(optimizer)
    step(optimizer)
    schedule.step()
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert copied.get_last_lr() == schedule.get_last_lr()
        assert copied.optimizer is not optimizer


def test_without_state_there_is_no_warning(recwarn):
    optimizer = optimizer_of()
    schedule = AdafactorSchedule(optimizer)
    schedule.step()
    step(optimizer)
    schedule.step()
    assert not recwarn.list


@pytest.mark.parametrize("value", [-1.0, float("nan"), None])
def test_initial_lr_out_of_range(value):
    with pytest.raises(ValueError, match="initial_lr"):
        AdafactorSchedule(optimizer_of(), initial_lr=value)


def test_another_optimizer():
    with pytest.raises(TypeError, match="got AdamW"):
        AdafactorSchedule(AdamW([torch.nn.Parameter(torch.ones(2))]))
