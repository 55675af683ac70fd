"""Training loops as people write them, right and wrong, and what `verify_schedule` says of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers.schedules import sgd

import fusedopt
from fusedopt import LRRecorder, schedules, verify_schedule

SKIPPED = (0, 6, 7, 15)
WAYS = {"linear": schedules.LinearSchedule(4, 60), "cosine": schedules.CosineSchedule(4, 60)}


def scheduler_for(optimizer: torch.optim.Optimizer, way: str, last_epoch: int = -1) -> schedules.ScheduleLR:
    make = getattr(schedules, f"get_{way}_schedule_with_warmup")
    return make(optimizer, 4, 60, last_epoch=last_epoch)


def finding(recorder: LRRecorder, way: str) -> str:
    verification = verify_schedule(recorder, WAYS[way])
    assert verification.ok is verification.finding.startswith("all ")
    return verification.finding


def scaled_run(
    make: Callable[..., torch.optim.Optimizer], way: str, waits: bool, overflows: Iterable[int]
) -> LRRecorder:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    scheduler, recorder = scheduler_for(optimizer, way), LRRecorder(optimizer)
    for step in range(25):
        scaler.scale((weight * (math.inf if step in overflows else 1.0)).sum()).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not (waits and scaler.get_scale() < before):
            scheduler.step()
    return recorder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [torch.optim.AdamW, fusedopt.AdamW], ids=["torch", "fusedopt"])
def test_a_scheduler_that_waits_for_an_overflow_is_right(make: Callable[..., torch.optim.Optimizer], way: str) -> None:
    assert finding(scaled_run(make, way, True, SKIPPED), way).startswith("all ")


@pytest.mark.parametrize("way", WAYS)
def test_one_that_goes_on_is_right_where_the_optimizer_skips_by_itself(way: str) -> None:
    """As in trainers, which see a step that was taken."""
    recorder = scaled_run(fusedopt.AdamW, way, False, SKIPPED)
    assert finding(recorder, way).startswith("all 25 ")
    assert tuple(recorder.skipped.nonzero()[0]) == SKIPPED


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("way", WAYS)
def test_several_overflows_over_which_the_scheduler_went_on_are_named(way: str) -> None:
    found = finding(scaled_run(torch.optim.AdamW, way, False, SKIPPED), way)
    assert "went on 4 times without the optimizer, before steps 0, 5 and 12 (overflows" in found


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_that_skip_nonfinite_skips_may_be_waited_for(waits: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.AdamW([weight], lr=0.01, skip_nonfinite=True)
    scheduler, recorder = scheduler_for(optimizer, "linear"), LRRecorder(optimizer)
    for step in range(25):
        weight.grad = torch.full((3,), math.nan if step in SKIPPED else 1.0)
        optimizer.step()
        if not (waits and step in SKIPPED):
            scheduler.step()
    assert finding(recorder, "linear").startswith("all 25 ")
    assert tuple(recorder.skipped.nonzero()[0]) == SKIPPED


def test_a_mistake_is_named_in_a_run_with_overflows_that_are_waited_for() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.AdamW([weight], lr=0.01, skip_nonfinite=True)
    scheduler, recorder = scheduler_for(optimizer, "linear"), LRRecorder(optimizer)
    for step in range(25):
        weight.grad = torch.full((3,), math.nan if step in SKIPPED else 1.0)
        optimizer.step()
        for _ in range(0 if step in SKIPPED else 2 if step == 20 else 1):
            scheduler.step()
    assert "from step 17 on the scheduler is 1 step ahead" in finding(recorder, "linear")  # the 18th applied one


def test_training_that_stops_a_step_early_is_right() -> None:
    optimizer = sgd(0.1)
    scheduler, recorder = scheduler_for(optimizer, "cosine"), LRRecorder(optimizer)
    for step in range(20):
        optimizer.step()
        if step < 19:
            scheduler.step()
    assert finding(recorder, "cosine").startswith("all 20 ")
    recorder = LRRecorder(optimizer, first_step=19)
    optimizer.step()
    assert finding(recorder, "cosine").startswith("all 1 ")


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("scheduler_first", [False, True])
@pytest.mark.parametrize(("window", "rest"), [(4, 2), (4, 1), (3, 2), (8, 5), (2, 1)])
@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_stepped_per_micro_batch_with_a_short_last_window(
    way: str, window: int, rest: int, scheduler_first: bool
) -> None:
    optimizer = sgd(0.1)
    scheduler, recorder = scheduler_for(optimizer, way), LRRecorder(optimizer)
    length = 2 * window + rest
    for step in range(min(3, 60 // length) * length):  # within the schedule
        if scheduler_first:
            scheduler.step()
        if step % length % window == window - 1 or step % length == length - 1:
            optimizer.step()
        if not scheduler_first:
            scheduler.step()
    expected = f"stepped {window} times per optimizer step, and {rest} in shorter windows, as if once per micro-batch"
    assert expected in finding(recorder, way)


def run(recorder: LRRecorder, scheduler: schedules.ScheduleLR, steps: Iterable[int]) -> None:
    """Takes one optimizer step for each number, each followed by that many scheduler steps."""
    for times in steps:
        recorder.optimizer.step()
        for _ in range(times):
            scheduler.step()


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_whose_record_lacks_first_step(way: str) -> None:
    optimizer = sgd(0.1, initial_lr=[0.1])
    scheduler = scheduler_for(optimizer, way, last_epoch=11)
    recorder = LRRecorder(optimizer)
    run(recorder, scheduler, [1] * 20)
    assert "pass first_step=12 to LRRecorder" in finding(recorder, way)
    optimizer = sgd(0.1, initial_lr=[0.1])
    scheduler = scheduler_for(optimizer, way, last_epoch=11)
    recorder = LRRecorder(optimizer)
    run(recorder, scheduler, [*[1] * 9, 2, *[1] * 9, 2, 1])
    found = finding(recorder, way)
    assert "pass first_step=12 to LRRecorder" in found
    assert "went on twice without the optimizer, before steps 10 and 20" in found


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("one_record", [False, True])
def test_a_count_that_went_on_twice(way: str, one_record: bool) -> None:
    """On resume the state is loaded, and then the scheduler is stepped to where it already is."""
    optimizer = sgd(0.1)
    scheduler, recorder = scheduler_for(optimizer, way), LRRecorder(optimizer)
    run(recorder, scheduler, [1] * 15)
    state = scheduler.state_dict()
    scheduler = scheduler_for(optimizer, way)
    scheduler.load_state_dict(state)
    for _ in range(15):
        scheduler.step()
    if not one_record:
        recorder = LRRecorder(optimizer, first_step=15)
    run(recorder, scheduler, [1] * 10)
    found = finding(recorder, way)
    assert "from step 15 on the scheduler is at step 30, so the steps before counted twice" in found


@pytest.mark.parametrize("way", WAYS)
def test_other_irregular_loops(way: str) -> None:
    cases = [
        (
            [*[1] * 9, 0, 1, 1, 1, 0, *[1] * 9],
            "was not stepped before steps 10 and 14; call scheduler.step() after every",
        ),
        ([*[1] * 9, 2, *[1] * 5, 0, *[1] * 9], "went on once without the optimizer, before step 10 (overflows"),
        ([*[1] * 9, 3, *[1] * 5, 2, *[1] * 9], "went on 3 times without the optimizer, before steps 10 and 16"),
        ([*[1] * 12, *[2] * 12], "from step 13 on the scheduler is stepped 2 times per optimizer step; step it once"),
    ]
    for steps, expected in cases:
        optimizer = sgd(0.1)
        scheduler, recorder = scheduler_for(optimizer, way), LRRecorder(optimizer)
        run(recorder, scheduler, steps)
        assert expected in finding(recorder, way)


def test_rates_that_no_rule_explains_stay_unexplained() -> None:
    optimizer = sgd(0.1)
    recorder = LRRecorder(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        factor = WAYS["cosine"](int(torch.randint(60, (), generator=generator)))
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        optimizer.step()
    assert "used another rate: first at step" in finding(recorder, "cosine")


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumed_with_another_length_begins_with_the_rate_of_its_checkpoint(way: str) -> None:
    """As in transformers: the state of the optimizer has the rate of the next step, from the old arguments."""
    make = getattr(schedules, f"get_{way}_schedule_with_warmup")
    before = sgd(0.1)
    first = make(before, 4, 10)
    for _ in range(6):
        before.step()
        first.step()
    optimizer = sgd(0.1)
    scheduler = make(optimizer, 4, 60)
    optimizer.load_state_dict(before.state_dict())
    scheduler.load_state_dict(first.state_dict())
    recorder = LRRecorder(optimizer, first_step=6)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert "1 of 10 steps used another rate: only the first one after the resume" in finding(recorder, way)
    # The way out that the finding names.
    optimizer = sgd(0.1)
    optimizer.load_state_dict(before.state_dict())
    scheduler, recorder = make(optimizer, 4, 60, last_epoch=5), LRRecorder(optimizer, first_step=6)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert finding(recorder, way).startswith("all 10 ")


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_stepped_twice_from_some_step_on_is_no_window(way: str) -> None:
    optimizer = sgd(0.1)
    scheduler, recorder = scheduler_for(optimizer, way), LRRecorder(optimizer)
    for step in range(24):
        optimizer.step()
        for _ in range(1 if step < 9 else 2):
            scheduler.step()
    assert "from step 10 on the scheduler is stepped 2 times per optimizer step; step it once" in finding(recorder, way)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("way", ["linear", "polynomial_decay"])
def test_windows_are_seen_long_after_the_rate_has_reached_its_end(way: str) -> None:
    """The length was counted in optimizer steps, as it should be, so the rate ends at a third of the run."""
    optimizer = sgd(0.1)
    make = getattr(schedules, f"get_{way}_schedule_with_warmup")
    scheduler, recorder = make(optimizer, 4, 40), LRRecorder(optimizer)
    for micro_batch in range(1, 101):
        scheduler.step()
        if micro_batch % 3 == 0 or micro_batch in (20, 100):
            optimizer.step()
    found = verify_schedule(recorder, scheduler).finding
    assert "stepped 3 times per optimizer step, and 1, 2 in shorter windows, as if once per micro-batch" in found


@pytest.mark.parametrize("value", ["3", 1.5, -1, None, True])
def test_what_is_no_step_or_no_tolerance_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="first_step must be"):
        LRRecorder(sgd(0.1), first_step=value)  # type: ignore[arg-type]
    recorder = LRRecorder(sgd(0.1), first_step=torch.tensor(3.0))  # type: ignore[arg-type]
    recorder.optimizer.step()
    assert recorder.steps.tolist() == [3]
    if value != 1.5 and value is not None:
        with pytest.raises(ValueError, match="tolerance must be"):
            verify_schedule(recorder, WAYS["linear"], tolerance=value)  # type: ignore[arg-type]
