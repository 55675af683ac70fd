"""Modules go on under the names that they had before they moved: for imports, and for pickles."""

import pickle
from importlib import import_module
from pathlib import Path

import pytest

import fusedopt
from fusedopt.moved import MOVED
from fusedopt.schedules import SchedulerType, needs_metric

# Written before the schedules had a folder: one of each form, and schedulers after three steps.
SAVED = pickle.loads((Path(__file__).parent / "data" / "schedules_before_0.2.pkl").read_bytes())


@pytest.mark.parametrize("old", MOVED)
def test_the_old_name_is_the_same_module(old: str) -> None:
    module = import_module(old)
    assert module is import_module(MOVED[old]) is getattr(fusedopt, old.removeprefix("fusedopt."))


def test_pickled_schedules_are_those_of_now() -> None:
    for schedule in SAVED["forms"]:
        assert type(schedule) is getattr(fusedopt, type(schedule).__name__)
        assert schedule == type(schedule)(**schedule.parameters) and schedule(7) > 0.0
    assert SAVED["kind"] is SchedulerType.GREEDY


@pytest.mark.parametrize("name", ["linear", "greedy", "reduce_lr_on_plateau"])
def test_a_pickled_scheduler_goes_on(name: str) -> None:
    scheduler = SAVED[name]
    assert type(scheduler) is getattr(fusedopt, type(scheduler).__name__) and scheduler.last_epoch == 3
    scheduler.optimizer.step()
    scheduler.step(*[1.0] if needs_metric(name) else [])
    assert scheduler.last_epoch == 4
    assert scheduler.get_last_lr() == [pytest.approx(0.08 if name == "linear" else 0.1)]
