"""A run that goes on does so with its new arguments, from the same kind of state, for the same param groups."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.files import through_a_file
from helpers.schedules import CLOSED_FORMS, EVERY_NAME, METRIC_DRIVEN, advance, by_name, rates, sgd
from torch.optim.lr_scheduler import LambdaLR, StepLR

from fusedopt import Adafactor, AdafactorSchedule, AdamWeightDecay, WarmUp, create_optimizer, get_scheduler, schedules

WITH_A_LENGTH = [name for name in CLOSED_FORMS if name not in ("constant", "constant_with_warmup", "inverse_sqrt")]


def finished(name: str, steps: int = 10, num_training_steps: int = 10) -> dict[str, Any]:
    scheduler = by_name(name, sgd(0.1), num_training_steps)
    for _ in range(steps):
        advance(scheduler)
    return through_a_file(scheduler.state_dict())


@pytest.mark.parametrize("kind", ["named", "fields alone", "functions", "partial functions"])
@pytest.mark.parametrize("name", WITH_A_LENGTH)
def test_a_resumed_run_follows_its_new_length(name: str, kind: str) -> None:
    """From our states, from older ones without a name, and from those of transformers, which say nothing."""
    state = finished(name)
    (saved,) = state["lr_lambdas"]
    own = {key: value for key, value in saved.items() if key != "name"}
    state["lr_lambdas"] = [{"named": saved, "fields alone": own, "functions": None, "partial functions": {}}[kind]]
    optimizer, other = sgd(0.1), sgd(0.1)
    scheduler, uninterrupted = by_name(name, optimizer, 20), by_name(name, other, 20)
    before = copy.deepcopy(scheduler.lr_lambdas)
    scheduler.load_state_dict(state)
    assert scheduler.lr_lambdas == before and scheduler.last_epoch == 10
    for _ in range(10):
        advance(uninterrupted)
    for _ in range(10):
        advance(scheduler)
        advance(uninterrupted)
        assert rates(optimizer) == rates(other)


@pytest.mark.parametrize("scheduler_class", [LambdaLR, schedules.ScheduleLR])
def test_a_frozen_schedule_is_never_changed_nor_is_one_that_two_schedulers_share(
    scheduler_class: type[LambdaLR],
) -> None:
    schedule = schedules.LinearSchedule(2, 20)
    one, two = (scheduler_class(sgd(0.1), schedule) for _ in range(2))
    one.load_state_dict(finished("linear"))
    assert schedule == schedules.LinearSchedule(2, 20) and one.lr_lambdas[0] is two.lr_lambdas[0] is schedule
    vars(schedule)["num_training_steps"] = 5
    assert schedule.num_training_steps == 20
    for again in (copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule and again(7) == schedule(7)


@pytest.mark.parametrize("loads", [*CLOSED_FORMS, "torch's LambdaLR"])
def test_the_state_of_another_kind_of_schedule_is_refused(loads: str) -> None:
    for name in EVERY_NAME:
        if loads == "torch's LambdaLR":
            scheduler: Any = LambdaLR(sgd(0.1), schedules.ConstantSchedule())
            if name in METRIC_DRIVEN or name == "constant":
                continue
        elif name == loads:
            continue
        else:
            scheduler = by_name(loads, sgd(0.1))
        whose = {"greedy": "a GreedyLR", "reduce_lr_on_plateau": "a ReduceLROnPlateau"}.get(name, f"'{name}'")
        before = scheduler.last_epoch
        with pytest.raises(ValueError, match=f"the state is that of {whose}, and this .* make the schedule"):
            scheduler.load_state_dict(finished(name))
        assert scheduler.last_epoch == before or loads == "torch's LambdaLR"


def adafactor_schedule() -> AdafactorSchedule:
    return AdafactorSchedule(Adafactor([torch.nn.Parameter(torch.ones(2))]), initial_lr=0.5)


def keras_schedule() -> Any:
    return create_optimizer([torch.nn.Parameter(torch.ones(2))], 0.1, 10, 2)[1]


def test_states_of_other_schedulers_are_refused_by_all() -> None:
    makers = {
        "a LambdaLR linear": lambda: by_name("linear", sgd(0.1)),
        "a ReduceLROnPlateau": lambda: by_name("reduce_lr_on_plateau", sgd(0.1)),
        "a GreedyLR": lambda: by_name("greedy", sgd(0.1)),
        "an AdafactorSchedule": adafactor_schedule,
        "a WarmUp": keras_schedule,
        "a scheduler with step_size, gamma": lambda: StepLR(sgd(0.1), 3),
    }
    for whose, saved in makers.items():
        for own, loading in makers.items():
            if own == whose or own.startswith("a scheduler"):
                continue
            with pytest.raises(ValueError, match=f"the state is that of {whose}, and this is an? [A-Z]"):
                loading().load_state_dict(through_a_file(saved().state_dict()))
        if not whose.startswith("a scheduler"):
            loading = makers[whose]()
            loading.load_state_dict(through_a_file(saved().state_dict()))


@pytest.mark.parametrize("name", METRIC_DRIVEN)
def test_a_metric_driven_scheduler_goes_on_with_the_arguments_given_now(name: str) -> None:
    first = get_scheduler(name, sgd(0.1), scheduler_specific_kwargs={"factor": 0.5, "patience": 3, "min_lr": 1e-3})
    for metric in (3.0, 2.0, 2.5, 2.5):
        advance(first, metric)
    optimizer = sgd(0.1)
    resumed: Any = get_scheduler(
        name, optimizer, scheduler_specific_kwargs={"factor": 0.8, "patience": 2, "min_lr": 0.01}
    )
    resumed.load_state_dict(through_a_file(first.state_dict()))
    assert (resumed.factor, resumed.patience, resumed.min_lrs) == (0.8, 2, [0.01])
    assert (resumed.best, resumed.num_bad_epochs, resumed.last_epoch) == (2.0, 2, 4)
    advance(resumed, 2.5)
    assert rates(optimizer) == pytest.approx([0.08])
    other: Any = get_scheduler(name, sgd(0.1), scheduler_specific_kwargs={"mode": "max"})
    with pytest.raises(ValueError, match="found with mode='min', and mode is 'max' now"):
        other.load_state_dict(first.state_dict())


def test_an_adafactor_schedule_goes_on_with_the_initial_rate_given_now() -> None:
    state = through_a_file(adafactor_schedule().state_dict())
    schedule = AdafactorSchedule(Adafactor([torch.nn.Parameter(torch.ones(2))]), initial_lr=0.25)
    schedule.load_state_dict(state)
    schedule.step()
    assert schedule.initial_lr == 0.25 and schedule.get_last_lr() == [0.25]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_group_added_after_the_scheduler_is_named_in_one_sentence(name: str, as_tensor: bool) -> None:
    optimizer = sgd(torch.tensor(0.1) if as_tensor else 0.1)
    scheduler = by_name(name, optimizer)
    if name == "reduce_lr_on_plateau":
        scheduler = get_scheduler(name, optimizer, scheduler_specific_kwargs={"min_lr": [0.0]})
    for _ in range(3):
        advance(scheduler)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.02})
    before = copy.deepcopy((scheduler.state_dict(), rates(optimizer)))
    message = (
        "a param group was added after the scheduler was made: it was made for 1 param group, and the optimizer has 2"
    )
    with pytest.raises(ValueError, match=f"{message}; .*make a new one"):
        advance(scheduler)
    assert (scheduler.state_dict(), rates(optimizer)) == before
    if name in CLOSED_FORMS:  # the way out that the message names
        optimizer.param_groups[1]["initial_lr"] = 0.02
        again = LambdaLR(optimizer, scheduler.lr_lambdas[0], last_epoch=scheduler.last_epoch - 1)
        assert rates(optimizer) == pytest.approx([lr * scheduler.lr_lambdas[0](3) for lr in (0.1, 0.02)])
        with pytest.raises(ValueError, match="a scheduler for 1 param group, and this one is for 2"):
            by_name(name, optimizer).load_state_dict(scheduler.state_dict())
        assert again.last_epoch == 3


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float_lr", "tensor_lr"])
def test_one_minimum_holds_for_a_group_added_later(as_tensor: bool) -> None:
    optimizer = sgd(torch.tensor(0.1) if as_tensor else 0.1)
    scheduler = schedules.get_reduce_on_plateau_schedule(optimizer, factor=0.5, patience=0, min_lr=0.04)
    advance(scheduler)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.06})
    advance(scheduler)
    assert rates(optimizer) == pytest.approx([0.05, 0.04])


def test_schedulers_that_only_show_rates_show_those_of_a_group_added_later() -> None:
    optimizer = Adafactor([torch.nn.Parameter(torch.ones(2))])
    schedule = AdafactorSchedule(optimizer, initial_lr=0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    schedule.step()
    assert schedule.get_last_lr() == [0.5, 0.5]
    keras, followed = create_optimizer([torch.nn.Parameter(torch.ones(2))], 0.1, 10, 0)
    keras.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    followed.step()
    assert followed.get_last_lr() == [0.1, 0.1]


def test_a_schedule_of_the_keras_half_shows_the_rate_of_its_own_optimizer_alone() -> None:
    schedule = WarmUp(0.1, lambda step: 0.1, 2)
    optimizer = AdamWeightDecay([torch.nn.Parameter(torch.ones(2))], schedule)
    with pytest.raises(ValueError, match=r"belongs to no optimizer.*schedule.belonging_to\(optimizer\)"):
        schedule.get_last_lr()
    assert schedule.belonging_to(optimizer).get_last_lr() == [0.0]
    assert schedule.belonging_to(optimizer) == schedule
    with pytest.raises(ValueError, match="SGD does not follow WarmUp"):
        schedule.belonging_to(sgd(0.1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_pair_shows_the_rate_of_the_copy(copied: Any) -> None:
    optimizer, schedule = copied(create_optimizer([torch.nn.Parameter(torch.ones(2))], 0.1, 10, 2))
    assert schedule.optimizer is optimizer and optimizer.schedule is schedule
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    assert schedule.get_last_lr() == [0.05]
