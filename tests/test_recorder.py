"""The learning rates of a run: recorded, compared with the schedule, and the classic mistakes that explain them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.schedules import CLOSED_FORMS, NoReading, advance, by_name, sgd

from fusedopt import schedules
from fusedopt.schedules.recorder import LRRecorder
from fusedopt.schedules.verification import verify_schedule

STEPS = 40
LambdaLR = torch.optim.lr_scheduler.LambdaLR


def linear(optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> LambdaLR:
    return schedules.get_linear_schedule_with_warmup(optimizer, 8, STEPS, last_epoch)


# What a training loop does, one letter a step: "o" steps the optimizer, "s" the scheduler; for the rest see `train`.
MISTAKES = {
    "stepped before the optimizer": ("so" * 40, 40, "one step ahead; call optimizer.step() before scheduler.step()"),
    "stepped twice": ("oss" * 40, 39, "stepped 2 times per optimizer step; step it once"),
    "stepped on both sides": ("sos" * 40, 40, "stepped 2 times per optimizer step; step it once"),
    "stepped per micro-batch": ("sssos" * 12, 12, "stepped 4 times per optimizer step; step it once"),
    "stepped per epoch": (
        ("o" * 10 + "s") * 4,
        39,
        "stepped once in 10 optimizer steps, as if per epoch; step it after every one",
    ),
    "never stepped": ("o" * 40, 39, "never changed, so the scheduler is not stepped; call scheduler.step() after"),
    "started anew on resume": (
        "os" * 15 + "n" + "os" * 25,
        24,
        "from step 15 on it starts anew; load the scheduler's state_dict on resume",
    ),
    "resumed from an older checkpoint": (
        "os" * 20 + "b" + "os" * 20,
        20,
        "from step 20 on the scheduler is 3 steps behind",
    ),
    "stepped without the optimizer": (  # as a GradScaler skips a step whose gradients overflow
        "os" * 9 + "s" + "os" * 30,
        30,
        "from step 9 on the scheduler is 1 step ahead (stepped although the optimizer",
    ),
    "another initial rate": (
        "q" + "os" * 40,
        39,
        "all rates are 0.25 times those of the schedule; give the optimizer the initial rate",
    ),
    "changed by hand": ("os" * 12 + "h" + "os" * 28, 1, "first at step 12, [0.7, 0.0175] instead of [0.0875, 0.0175]"),
}


def train(optimizer: torch.optim.Optimizer, loop: str) -> None:
    if loop[0] == "q":
        for group in optimizer.param_groups:
            group["lr"] *= 0.25
    scheduler = linear(optimizer)
    for action in loop:
        if action == "o":
            optimizer.step()
        elif action == "s":
            scheduler.step()
        elif action == "n":  # a resume, without load_state_dict
            scheduler = linear(optimizer)
        elif action == "b":  # a resume
            scheduler = linear(optimizer, last_epoch=16)
        elif action == "h":
            optimizer.param_groups[0]["lr"] = 0.7


def two_groups(as_tensor: bool) -> torch.optim.SGD:
    return sgd(*[torch.tensor(lr, dtype=torch.float32) if as_tensor else lr for lr in (0.1, 0.02)])


@pytest.mark.filterwarnings("ignore:Detected call of")  # torch suspects the mistake that is made on purpose
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_named(mistake: str) -> None:
    loop, num_wrong, finding = MISTAKES[mistake]
    optimizer = two_groups(as_tensor=False)
    recorder = LRRecorder(optimizer)
    train(optimizer, loop)
    verification = verify_schedule(recorder, schedules.LinearSchedule(8, STEPS))
    assert not verification.ok
    assert verification.finding.startswith(f"{num_wrong} of {len(recorder)} steps used another rate: ")
    assert finding in verification.finding and "\n" not in verification.finding
    assert len(verification.wrong_steps) == num_wrong
    with pytest.raises(RuntimeError) as caught:
        verify_schedule(recorder, schedules.LinearSchedule(8, STEPS), raise_on_difference=True)
    assert str(caught.value) == verification.finding


def test_twice_per_step_in_a_warm_up_is_not_mistaken_for_twice_the_rate() -> None:
    optimizer = sgd(0.1)
    scheduler = schedules.get_constant_schedule_with_warmup(optimizer, 100)
    recorder = LRRecorder(optimizer)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
        scheduler.step()
    assert "stepped 2 times per optimizer step" in verify_schedule(recorder, scheduler).finding


def test_starting_anew_is_preferred_to_a_jump_that_looks_the_same() -> None:
    optimizer = sgd(0.1)
    recorder = LRRecorder(optimizer)
    for _ in range(2):  # the second time without the first one's state
        scheduler = schedules.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 0, 40, num_cycles=4)
        for _ in range(15):
            advance(scheduler)
    assert "from step 15 on it starts anew" in verify_schedule(recorder, scheduler).finding


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_run_as_meant_is_found_to_be_one(name: str, as_tensor: bool) -> None:
    optimizer = two_groups(as_tensor)
    recorder = LRRecorder(optimizer)
    scheduler = by_name(name, optimizer)
    for _ in range(STEPS + 5):
        advance(scheduler)
    verification = verify_schedule(recorder, scheduler, raise_on_difference=True)
    assert verification.ok and verification.finding == "all 45 steps used the rate of the schedule"
    assert verification.steps.tolist() == list(range(45))
    assert verification.expected.shape == verification.recorded.shape == verification.differs.shape == (45, 2)
    np.testing.assert_allclose(verification.recorded[:, 0], 0.1 * scheduler.lr_lambdas[0](np.arange(45)), rtol=3e-7)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float_lr", "tensor_lr"])
def test_the_smallest_shift_of_a_long_run_is_seen(as_tensor: bool) -> None:
    optimizer = two_groups(as_tensor)
    scheduler = schedules.get_cosine_schedule_with_warmup(optimizer, 0, 2000)
    recorder = LRRecorder(optimizer)
    optimizer.step()
    scheduler.step()
    for _ in range(1999):
        scheduler.step()
        optimizer.step()
    verification = verify_schedule(recorder, scheduler)
    assert "from step 1 on the scheduler is 1 step ahead" in verification.finding


def test_a_resumed_run_is_compared_with_its_own_part() -> None:
    optimizer = sgd(0.05, initial_lr=[0.1])
    scheduler = linear(optimizer, last_epoch=19)
    recorder = LRRecorder(optimizer, first_step=20)
    for _ in range(5):
        advance(scheduler)
    assert recorder.steps.tolist() == [20, 21, 22, 23, 24]
    assert verify_schedule(recorder, scheduler).ok

    optimizer = sgd(0.1)
    scheduler = linear(optimizer)  # starts anew
    recorder = LRRecorder(optimizer, first_step=20)
    for _ in range(5):
        advance(scheduler)
    assert "from step 20 on it starts anew" in verify_schedule(recorder, scheduler).finding


def test_the_recorder_may_come_before_or_after_the_scheduler() -> None:
    optimizer = sgd(0.1)
    before = LRRecorder(optimizer)
    scheduler = linear(optimizer)
    after = LRRecorder(optimizer)
    for _ in range(5):
        advance(scheduler)
    assert before.rates.tolist() == after.rates.tolist()
    assert before.initial_rates.tolist() == after.initial_rates.tolist() == [0.1]


def test_a_function_per_param_group() -> None:
    optimizer = sgd(0.1, 0.02)
    recorder = LRRecorder(optimizer)
    functions = [lambda step: 0.5**step, schedules.ConstantSchedule()]
    scheduler = LambdaLR(optimizer, functions)
    for _ in range(4):
        advance(scheduler)
    assert verify_schedule(recorder, functions).ok and verify_schedule(recorder, scheduler).ok
    assert not verify_schedule(recorder, functions[::-1]).ok


def test_tensors_are_not_read_before_the_rates_are_asked_for() -> None:
    optimizer = two_groups(as_tensor=True)
    scheduler = linear(optimizer)
    with NoReading():
        recorder = LRRecorder(optimizer)
        for _ in range(1500):  # more than one block
            advance(scheduler)
    assert recorder.rates.shape == (1500, 2)
    assert verify_schedule(recorder, scheduler).ok


def test_a_param_group_that_joins_later() -> None:
    optimizer = sgd(0.1)
    recorder = LRRecorder(optimizer)
    optimizer.step()
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.02})
    optimizer.step()
    np.testing.assert_array_equal(recorder.rates, [[0.1, np.nan], [0.1, 0.02]])
    assert verify_schedule(recorder, schedules.ConstantSchedule()).ok


def test_an_optimizer_that_sets_its_own_rate() -> None:
    optimizer = sgd(0.1)
    optimizer.param_groups[0]["lr"] = None
    recorder = LRRecorder(optimizer)
    recorder.note()
    assert np.isnan(recorder.rates).all()


def test_steps_recorded_by_hand_and_closing() -> None:
    optimizer = sgd(0.1)
    recorder = LRRecorder(optimizer)
    recorder.note()  # as before a graph replay
    optimizer.step()
    recorder.close()
    optimizer.step()
    assert len(recorder) == 2


def test_the_capture_of_a_graph_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = sgd(0.1)
    recorder = LRRecorder(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    assert len(recorder) == 0
    optimizer.step()
    assert len(recorder) == 1


def test_a_step_that_raised_is_not_recorded() -> None:
    def closure() -> Any:
        raise KeyError("no data")

    optimizer = sgd(0.1)
    recorder = LRRecorder(optimizer)
    with pytest.raises(KeyError):
        optimizer.step(closure)
    optimizer.step()
    assert len(recorder) == 1


def test_the_rate_is_that_before_the_step() -> None:
    optimizer = sgd(0.1)
    recorder = LRRecorder(optimizer)

    def closure() -> float:
        optimizer.param_groups[0]["lr"] = 0.5
        return 0.0

    optimizer.step(closure)
    assert recorder.rates.tolist() == [[0.1]]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        pytest.param(lambda o: schedules.get_greedy_schedule(o), "GreedyLR gives no rate for a step", id="greedy"),
        pytest.param(lambda o: "linear", "str gives no rate for a step; verify against a schedule", id="name"),
        pytest.param(lambda o: [schedules.ConstantSchedule()] * 3, "2 param groups .* but 3 schedules", id="three"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Callable[[torch.optim.Optimizer], Any], message: str) -> None:
    optimizer = two_groups(as_tensor=False)
    recorder = LRRecorder(optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        verify_schedule(recorder, schedule(optimizer))


def test_an_empty_record_and_a_negative_start_are_refused() -> None:
    with pytest.raises(ValueError, match="no step was recorded; make the LRRecorder before training"):
        verify_schedule(LRRecorder(sgd()), schedules.ConstantSchedule())
    with pytest.raises(ValueError, match="first_step must be a whole number >= 0, got -1"):
        LRRecorder(sgd(), first_step=-1)
    for wrong in (math.inf, math.nan, 10**400):
        with pytest.raises(ValueError, match=r"first_step must be a (finite number, got|number .* got a larger one)"):
            LRRecorder(sgd(), first_step=wrong)
