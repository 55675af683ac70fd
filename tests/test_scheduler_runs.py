"""Schedulers in a run: every name and optimizer, checkpoints, learning rates that are tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.comparing import assert_near
from helpers.files import through_a_file
from helpers.schedules import CLOSED_FORMS, EVERY_NAME, RTOL, NoReading, advance, by_name, rates, sgd

from fusedopt import AdamW, schedules
from fusedopt.schedules import SchedulerType, needs_metric
from fusedopt.schedules.recorder import LRRecorder
from fusedopt.schedules.verification import verify_schedule


@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_name_drives_a_run(name: str) -> None:
    optimizer = sgd(0.1, 0.02)
    scheduler = by_name(name, optimizer)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) is not needs_metric(name)
    for _ in range(40):
        advance(scheduler)
    assert all(0 <= rate <= 0.2 for rate in rates(optimizer))
    assert type(by_name(SchedulerType(name), sgd())) is type(scheduler)


OPTIMIZERS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "LBFGS",
    "NAdam",
    "RAdam",
    "RMSprop",
]


@pytest.mark.parametrize("optimizer_name", [*OPTIMIZERS, "Rprop", "SGD"])
def test_any_torch_optimizer(optimizer_name: str) -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = getattr(torch.optim, optimizer_name)([weight], lr=0.1)
    scheduler = schedules.get_linear_schedule_with_warmup(optimizer, 2, 10)
    for _ in range(3):
        weight.grad = torch.ones(2)
        optimizer.step(lambda: torch.tensor(0.0))
        scheduler.step()
    assert rates(optimizer) == pytest.approx([0.1 * 7 / 8], rel=RTOL)


def test_our_own_optimizer_with_a_tensor_rate() -> None:
    weight, lr = torch.ones(2, requires_grad=True), torch.tensor(0.1)
    optimizer = AdamW([weight], lr=lr, no_deprecation_warning=True)
    scheduler = schedules.get_linear_schedule_with_warmup(optimizer, 2, 10)
    recorder = LRRecorder(optimizer)
    for _ in range(6):
        weight.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert verify_schedule(recorder, scheduler).ok and len(recorder) == 6


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_checkpoint_in_the_middle_of_a_run(name: str, as_tensor: bool) -> None:
    def lrs() -> list[Any]:
        return [torch.tensor(lr, dtype=torch.float64) if as_tensor else lr for lr in (0.1, 0.02)]

    metrics = [1.0 - 0.1 * min(step, 10) for step in range(40)]
    optimizer = sgd(*lrs())
    scheduler = by_name(name, optimizer)
    uninterrupted = []
    for step, metric in enumerate(metrics):
        if step == 17:
            saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
        advance(scheduler, metric)
        uninterrupted.append(rates(optimizer))

    optimizer = sgd(*lrs())
    scheduler = by_name(name, optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    resumed = []
    for metric in metrics[17:]:
        advance(scheduler, metric)
        resumed.append(rates(optimizer))
    assert resumed == uninterrupted[17:]


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_fields_are_in_the_state_dict(name: str) -> None:
    schedule = CLOSED_FORMS[name]
    scheduler = torch.optim.lr_scheduler.LambdaLR(sgd(0.1, 0.02), copy.deepcopy(schedule))
    state = through_a_file(scheduler.state_dict())
    assert state["lr_lambdas"] == [vars(schedule)] * 2


def test_a_checkpoint_of_the_original_loads() -> None:
    scheduler = schedules.get_linear_schedule_with_warmup(sgd(), 5, 40)
    state = {
        **scheduler.state_dict(),
        "last_epoch": 12,
        "_step_count": 13,
        "lr_lambdas": [{}],
    }  # a partial has no fields
    scheduler.load_state_dict(state)
    advance(scheduler)
    assert scheduler.get_last_lr() == pytest.approx([0.1 * (40 - 13) / 35], rel=RTOL)


def test_a_greedy_checkpoint_of_the_original_loads() -> None:
    scheduler = schedules.get_greedy_schedule(sgd(), smooth=True, window_size=3)
    state = {key: value for key, value in scheduler.state_dict().items() if key != "_window"}
    scheduler.load_state_dict({**state, "_last_lr": [0.05], "_streaming_avg": {"values": [3.0, 1.0], "sum": 4.0}})
    assert rates(scheduler.optimizer) == [0.05]
    scheduler.step(2.0)
    assert scheduler.best == 2.0


@pytest.mark.parametrize("last_epoch", [0, 3, 11, 30])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_resume_with_last_epoch(name: str, last_epoch: int) -> None:
    optimizer = sgd(0.5, 0.7, initial_lr=[0.1, 0.02])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, CLOSED_FORMS[name], last_epoch)
    for step in range(last_epoch + 1, last_epoch + 5):
        factor = CLOSED_FORMS[name](step)
        assert rates(optimizer) == pytest.approx([0.1 * factor, 0.02 * factor], rel=RTOL, abs=0)
        advance(scheduler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_tensor_stays_the_same_tensor_and_is_never_read(name: str, dtype: torch.dtype) -> None:
    tensors = [torch.tensor(0.1, dtype=dtype), torch.tensor(0.02, dtype=dtype)]
    optimizer, plain = sgd(*tensors), sgd(0.1, 0.02)
    scheduler, reference = by_name(name, optimizer), by_name(name, plain)
    for step in range(45):
        assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors))
        # Two roundings to the tensor's precision: of the initial rate, and of its product with the factor.
        assert [float(t) for t in tensors] == pytest.approx(rates(plain), rel=2 * torch.finfo(dtype).eps, abs=1e-18)
        metric = 1.0 - 0.1 * min(step, 10)
        advance(reference, metric)
        optimizer.step()
        with NoReading():
            scheduler.step(*[metric] if needs_metric(name) else [])


def test_plateau_with_a_float_and_a_tensor() -> None:
    tensor = torch.tensor(0.02, dtype=torch.float64)
    optimizer, plain = sgd(0.1, tensor), sgd(0.1, 0.02)
    kwargs = {"patience": 0, "factor": 0.5, "min_lr": 0.015, "eps": 1e-3}
    schedulers = [schedules.get_reduce_on_plateau_schedule(o, **kwargs) for o in (optimizer, plain)]
    for _ in range(6):
        for scheduler in schedulers:
            scheduler.step(1.0)
        assert rates(optimizer) == rates(plain)
    assert optimizer.param_groups[1]["lr"] is tensor and float(tensor) == 0.015


def test_greedy_makes_no_change_smaller_than_eps() -> None:
    scheduler = schedules.get_greedy_schedule(sgd(0.1, 0.02), patience=0, factor=0.5, eps=0.05)
    scheduler.step(1.0)
    assert scheduler.get_last_lr() == [0.2, 0.02]


def test_greedy_counts_to_its_reset_from_the_start_after_an_increase() -> None:
    scheduler = schedules.get_greedy_schedule(sgd(0.1), patience=0, factor=0.5, min_lr=0.05, reset_start=2)
    for metric in (1.0, 1.0, 1.0, 0.9, 0.9):  # up, down, down to the minimum, up, down to the minimum again
        scheduler.step(metric)
    assert scheduler.get_last_lr() == [0.05]
    scheduler.step(0.9)
    assert scheduler.get_last_lr() == [0.1]  # the second time there: everything starts over


def test_the_no_reading_check_can_fail() -> None:
    with pytest.raises(AssertionError, match="was read"), NoReading():
        float(torch.tensor(1.0))


def test_a_second_scheduler_on_a_tensor_knows_the_initial_rate() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=torch.tensor(0.5))
    first = schedules.get_polynomial_decay_schedule_with_warmup(optimizer, 0, 10, lr_end=0.1)
    for _ in range(5):
        advance(first)
    second = schedules.get_polynomial_decay_schedule_with_warmup(optimizer, 0, 10, lr_end=0.1, last_epoch=4)
    assert second.lr_lambdas[0].lr_init == 0.5
    assert rates(optimizer) == pytest.approx([0.3])


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_captured_step_follows_the_schedule(name: str) -> None:
    weight = torch.zeros(3, device="cuda", requires_grad=True)
    weight.grad = torch.ones_like(weight)
    lr = torch.tensor(0.1, device="cuda")
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0, eps=0.0, capturable=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        optimizer.step()  # its state must exist before the capture
    torch.cuda.current_stream().wait_stream(side)
    scheduler = by_name(name, optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    expected = []
    moved = [weight.detach().clone()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            expected.append(lr.clone())
            graph.replay()
            moved.append(weight.detach().clone())
            scheduler.step(*[1.0] if needs_metric(name) else [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Constant gradients: every step of AdamW moves each weight by the learning rate.
    steps = torch.stack(moved[:-1]) - torch.stack(moved[1:])
    assert_near(steps[:, 0], torch.stack(expected), rtol=1e-3, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] is lr
