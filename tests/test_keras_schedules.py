"""WarmUp and PolynomialDecay, and an AdamWeightDecay whose rate is a function of the step."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers.comparing import assert_same
from helpers.keras import BACKENDS, device_of, parameter, recorded, schedule, step
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fusedopt import AdamW
from fusedopt.backends.eager.adamw import EagerAdamW
from fusedopt.interface import StepArgs
from fusedopt.keras import AdamWeightDecay
from fusedopt.keras.schedules import PolynomialDecay, WarmUp, describe, revive
from fusedopt.schedules.plotting import plot_schedule
from fusedopt.schedules.recorder import LRRecorder
from fusedopt.schedules.verification import verify_schedule

SCHEDULES = recorded("tf_schedules")


@pytest.mark.parametrize("case", SCHEDULES["cases"], ids=lambda case: case["name"])
def test_schedule_golden(case):
    rate = schedule(case["schedule"])
    convert = int if case["step_type"] == "int" else lambda s: torch.tensor(s, dtype=getattr(torch, case["step_type"]))
    values = [rate(convert(s)) for s in case["steps"]]
    assert all(type(value) is float for value in values)
    assert values == pytest.approx(case["values"], rel=1e-6, abs=1e-9, nan_ok=True)
    assert rate(case["steps"]).tolist() == rate(torch.tensor(case["steps"])).tolist() == values


def test_schedule_config_golden():
    inner = PolynomialDecay(0.1, 12)
    config = WarmUp(0.1, inner, 3).get_config()
    assert list(config) == SCHEDULES["warmup_get_config"]["keys"]
    assert config.pop("decay_schedule_fn") is inner
    assert config == SCHEDULES["warmup_get_config"]["values_without_decay_schedule_fn"]
    named = WarmUp(0.1, inner, 3, power=2.0, name="schedule").get_config()
    assert {**named, "decay_schedule_fn": None} == {
        **SCHEDULES["warmup_get_config"]["named"],
        "decay_schedule_fn": None,
    }


def test_schedules_survive_their_configs():
    nested = WarmUp(0.1, WarmUp(0.2, PolynomialDecay(0.3, 5, cycle=True), 4), 3, power=2.0)
    assert revive(describe(nested)) == nested
    assert WarmUp.from_config(nested.get_config()) == nested
    assert pickle.loads(pickle.dumps(nested)) == nested


def test_schedules_plot_their_rates():
    decay = PolynomialDecay(0.4, 10, 0.0)
    figure = plot_schedule([WarmUp(0.4, decay, 10), decay])
    warm_up, alone = (line for line in figure.axes[0].lines if len(line.get_xdata()) > 2)
    assert (warm_up.get_label(), alone.get_label()) == ("WarmUp", "PolynomialDecay")
    assert warm_up.get_ydata().tolist() == [WarmUp(0.4, decay, 10)(step) for step in warm_up.get_xdata()]
    assert warm_up.get_xdata().max() >= 20
    assert "times" not in figure.axes[0].get_ylabel()


def test_schedule_lengths():
    assert WarmUp(0.1, PolynomialDecay(0.1, 5), 3).length == 8
    assert WarmUp(0.1, PolynomialDecay(0.1, 5, cycle=True), 3).length is None
    assert WarmUp(0.1, math.exp, 3).length is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmUp(0.1, 0.1, 3), "decay_schedule_fn must be a function of the step, got 0.1"),
        (lambda: WarmUp(0.1, math.exp, -1), "warmup_steps must be >= 0, got -1"),
        (lambda: WarmUp(0.1, math.exp, 3, power=-1.0), "power must be >= 0"),
        (lambda: WarmUp(math.nan, math.exp, 3), "initial_learning_rate must be a finite number, got nan"),
        (lambda: PolynomialDecay(0.1, -5), "decay_steps must be >= 0, got -5"),
        (lambda: PolynomialDecay(0.1, 5, "0"), "end_learning_rate must be a finite number, got '0'"),
        (lambda: revive({"class_name": "CosineDecay", "config": {}}), "no schedule can be made of .*CosineDecay"),
    ],
)
def test_schedule_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Rates that are functions of the step.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_function_counts_calls_and_the_correction_counts_updates(backend):
    """A call without gradients advances the schedule but not the bias correction."""
    rates = [0.5, 0.25, 0.125]
    p, plain = (parameter(device=device_of(backend)) for _ in range(2))
    optimizer = AdamWeightDecay([p], lambda i: rates[i], backend=backend)
    other = AdamW([plain], eps=1e-7, convention="keras", backend=backend)
    for i, gradient in enumerate([1.0, None, 3.0]):
        p.grad = plain.grad = None if gradient is None else torch.full_like(p, gradient)
        other.param_groups[0]["lr"] = rates[i]
        optimizer.step()
        other.step()
        assert optimizer.param_groups[0]["lr"] == rates[i]
    assert_same(p, plain)
    assert optimizer.iterations == 3
    assert optimizer.state[p]["step"].item() == 2


def test_counts_go_on_where_all_gradients_are_on_another_device():
    p = parameter()
    optimizer = AdamWeightDecay([p], backend="eager")
    step(optimizer)
    EagerAdamW(p.device)(optimizer._engine.param_sets(optimizer, optimizer.param_groups, [[None]]), StepArgs())
    assert optimizer.state[p]["step"].item() == 2


def test_calls_are_counted_across_checkpoints_copies_and_late_groups():
    make = lambda p: AdamWeightDecay([p], PolynomialDecay(0.4, 4, 0.0))  # noqa: E731
    p = parameter()
    optimizer = make(p)
    step(optimizer)
    step(optimizer)
    restored = make(parameter())
    restored.load_state_dict(optimizer.state_dict())
    copied = pickle.loads(pickle.dumps(optimizer))
    late = copy.deepcopy(optimizer)
    late.add_param_group({"params": [parameter()]})
    for other in (restored, copied, late):
        step(other)
        assert [group["iterations"] for group in other.param_groups] == [3] * len(other.param_groups)
        assert [group["lr"] for group in other.param_groups] == [pytest.approx(0.2)] * len(other.param_groups)
    step(optimizer)
    assert_same(copied.param_groups[0]["params"][0], p)


def test_recorded_rates_are_those_of_their_steps():
    """For copies too, whose hooks are made again, once."""
    optimizer = AdamWeightDecay([parameter()], PolynomialDecay(0.4, 4, 0.0))
    copied, loaded = copy.deepcopy(optimizer), copy.deepcopy(optimizer)
    loaded.load_state_dict(optimizer.state_dict())
    for one in (optimizer, copied, loaded):
        recorder = LRRecorder(one)
        for _ in range(3):
            step(one)
        assert recorder.rates.tolist() == pytest.approx(np.array([[0.4], [0.3], [0.2]]))
        assert verify_schedule(recorder, one.schedule).finding == "all 3 steps used the rate of the schedule"
        assert len(one._optimizer_step_pre_hooks) == 2


def test_looking_at_a_fresh_state_takes_no_step():
    """torch.distributed.checkpoint steps with a rate of 0 to see the state."""
    model = torch.nn.Linear(2, 1)
    optimizer = AdamWeightDecay(model.named_parameters(), lambda i: 0.5)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.iterations == 0 and optimizer.param_groups[0]["lr"] == 0.5
    model(torch.ones(2)).backward()
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    other = AdamWeightDecay(model.named_parameters(), lambda i: 0.5)
    set_optimizer_state_dict(model, other, saved)
    assert other.iterations == 1


def test_closure_and_schedule():
    p = parameter(1.0)
    optimizer = AdamWeightDecay([p], lambda i: 0.5 / (i + 1))

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert [optimizer.step(closure).item() for _ in range(2)] == [1.0, pytest.approx(0.25, rel=1e-5)]


def test_torch_scheduler_drives_a_number():
    optimizer = AdamWeightDecay([parameter()], 0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    step(optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.hyper(optimizer.param_groups[0]).lr == 0.25


def test_torch_scheduler_on_a_function_is_refused():
    p = parameter()
    optimizer = AdamWeightDecay([p], lambda i: 0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    step(optimizer)
    scheduler.step()
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"was set to 0\.25, by a torch scheduler or by hand, but learning_rate is"):
        step(optimizer)
    assert_same(p, before)
    assert optimizer.iterations == 1


@pytest.mark.parametrize("bad", [math.nan, -0.1, math.inf])
def test_a_function_that_returns_no_rate_is_refused(bad):
    p = parameter()
    optimizer = AdamWeightDecay([p], lambda i: bad if i else 0.1)
    step(optimizer)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=f"gives {bad} at step 1"):
        step(optimizer)
    assert_same(p, before)


@pytest.mark.parametrize("options", [{"learning_rate": lambda i: 0.1}, {"decay": 0.5}], ids=["function", "decay"])
def test_a_function_of_the_step_is_refused_in_a_cuda_graph(monkeypatch, options):
    optimizer = AdamWeightDecay([parameter()], **options)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="pass a tensor as learning_rate"):
        step(optimizer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_as_a_tensor(backend):
    device = device_of(backend)
    p, q = parameter(device=device), parameter(device=device)
    lr = torch.tensor(0.5, device=device)
    optimizer, other = AdamWeightDecay([p], lr, backend=backend), AdamWeightDecay([q], 0.5, backend=backend)
    for value in (0.5, 0.25):
        lr.fill_(value)
        other.param_groups[0]["lr"] = value
        step(optimizer)
        step(other)
    assert_same(p, q)
    assert optimizer.get_config()["learning_rate"] == 0.25
