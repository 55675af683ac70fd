"""The history of statistics: bounded, without waiting, handed to a writer."""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.comparing import assert_same
from helpers.schedules import sgd
from helpers.statistics import Stack, made, train
from torch import nn

from fusedopt import AdamW, Lion, StatisticsRecorder
from fusedopt.statistics import recorder as recording
from fusedopt.statistics.values import QUANTITIES

RATIO = QUANTITIES.index("update_to_weight")


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert (tag, step) not in self.scalars
        self.scalars[tag, step] = value


class Device:
    """Stands in for a device: tensors arrive when it says so, and waiting for one of them is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        self.sent = 0
        self.waits = 0
        monkeypatch.setattr(recording, "_sent", self._send)

    def _send(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        number = self.sent = self.sent + 1
        host = torch.full_like(tensor, -7.0)

        def arrived() -> bool:
            if self.done >= number:
                host.copy_(tensor)
            return self.done >= number

        def wait() -> None:
            self.waits += self.done < number
            self.done = max(self.done, number)
            arrived()

        return host, SimpleNamespace(query=arrived, synchronize=wait)


def test_an_entry_per_measured_step_is_what_the_optimizer_said():
    model, optimizer = made()
    recorder = StatisticsRecorder(optimizer)
    said = train(model, optimizer, 4)
    assert recorder.steps.tolist() == [0, 1, 2, 3]
    assert recorder.history.dtype == np.float32
    np.testing.assert_array_equal(recorder.history, np.array(said, np.float32))
    assert recorder.names == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    assert recorder.quantities == QUANTITIES


def test_every_third_step_and_a_resumed_run():
    model, optimizer = made(track_statistics=3)
    recorder = StatisticsRecorder(optimizer, first_step=100)
    train(model, optimizer, 8)
    assert recorder.steps.tolist() == [100, 103, 106]


def test_a_recorder_that_comes_later_begins_with_the_next_step():
    model, optimizer = made()
    train(model, optimizer, 2)
    recorder = StatisticsRecorder(optimizer)
    assert len(recorder.steps) == 0 and recorder.history.shape == (0, 3, 6)
    (said,) = train(model, optimizer, 1)
    np.testing.assert_array_equal(recorder.history, np.array([said], np.float32))


def test_a_recorder_that_comes_before_a_step_without_statistics():
    model, optimizer = made(track_statistics=2)
    train(model, optimizer, 1)
    recorder = StatisticsRecorder(optimizer)
    train(model, optimizer, 2)
    assert recorder.steps.tolist() == [1]


def test_no_measured_step_waits_and_each_is_read_in_order(monkeypatch):
    model, optimizer = made()
    device, writer = Device(monkeypatch), Writer()
    recorder = StatisticsRecorder(optimizer, writer)
    said = train(model, optimizer, 3)
    assert not writer.scalars
    device.done = 2
    said += train(model, optimizer, 1)
    assert {step for _, step in writer.scalars} == {0, 1}
    assert device.waits == 0
    np.testing.assert_array_equal(recorder.history, np.array(said, np.float32))  # who asks for it waits
    assert device.waits == 2 and {step for _, step in writer.scalars} == {0, 1, 2, 3}


def test_steps_that_are_not_measured_receive_too(monkeypatch):
    model, optimizer = made(track_statistics=2)
    device, writer = Device(monkeypatch), Writer()
    _recorder = StatisticsRecorder(optimizer, writer)
    train(model, optimizer, 1)
    device.done = 1
    train(model, optimizer, 1)
    assert writer.scalars and (device.sent, device.waits) == (1, 0)


def test_closing_waits_for_the_last_ones_and_ends_the_history(monkeypatch):
    model, optimizer = made()
    device, writer = Device(monkeypatch), Writer()
    recorder = StatisticsRecorder(optimizer, writer)
    train(model, optimizer, 2)
    recorder.close()
    train(model, optimizer, 2)
    assert sorted({step for _, step in writer.scalars}) == [0, 1] and device.waits == 2
    assert recorder.steps.tolist() == [0, 1] and device.sent == 2


@pytest.mark.parametrize("limit", [2, 7, 64])
def test_ten_thousand_steps_are_bounded(limit):
    _, optimizer = made(1)
    recorder = StatisticsRecorder(optimizer, limit=limit)
    values = np.ones((1, len(QUANTITIES)))
    for step in range(10_000):
        values[0, 0] = step
        values[0, QUANTITIES.index("update_norm")] = step % 10 > 0
        recorder._keep(step, values)
        assert len(recorder._steps) <= limit
    steps = recorder.steps
    assert limit / 2 <= len(steps) <= limit
    assert steps[0] == 0 and len(set(np.diff(steps))) == 1 and 10_000 - steps[-1] <= np.diff(steps)[0]
    np.testing.assert_array_equal(recorder.history[:, 0, 0], steps.astype(np.float32))
    assert len(recorder.skipped) == len(steps) and recorder.skipped.sum() == 1000


def test_a_writer_gets_every_step_and_no_parameter_without_a_gradient():
    model, optimizer = made()
    writer = Writer()
    recorder = StatisticsRecorder(optimizer, writer, limit=2, first_step=10)
    expected = {}
    for step in range(10, 15):
        model.give_gradients(step)
        model.layers[1].weight.grad = None
        optimizer.step()
        expected |= {(tag, step): value for tag, value in optimizer.statistics.to_dict().items()}
    assert writer.scalars == expected
    assert len(expected) == 5 * 2 * 6 and ("update_to_weight/layers.0.weight", 12) in expected
    assert len(recorder.steps) == 2


def test_the_writer_of_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    model, optimizer = made()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        recorder = StatisticsRecorder(optimizer, writer)
        train(model, optimizer, 2)
        recorder.close()
    assert list(tmp_path.iterdir())


def test_replays_are_recorded_by_hand_and_captures_not_at_all(monkeypatch):
    model, optimizer = made()
    recorder = StatisticsRecorder(optimizer)
    train(model, optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(recording, "capturing", lambda device: True)
        train(model, optimizer, 1)
    recorder.record()
    recorder.record(step=10)
    train(model, optimizer, 1)
    assert recorder.steps.tolist() == [0, 1, 10, 11]


def test_a_step_after_a_capture_is_recorded_if_it_is_measured(monkeypatch):
    model, optimizer = made(track_statistics=2)
    recorder = StatisticsRecorder(optimizer)
    train(model, optimizer, 2)
    with monkeypatch.context() as patch:
        patch.setattr(recording, "capturing", lambda device: True)
        train(model, optimizer, 1)
    assert optimizer.tracker.measured_steps == 2
    train(model, optimizer, 2)
    assert recorder.steps.tolist() == [0, 3]


def test_skipped_steps_are_counted():
    model, optimizer = made(skip_nonfinite=True)
    recorder = StatisticsRecorder(optimizer)
    for step in range(4):
        model.give_gradients(step)
        if step in (1, 2):
            model.layers[2].weight.grad[0, 0] = math.inf
        optimizer.step()
    assert recorder.skipped.tolist() == [0, 1, 1, 0]
    assert recorder.history[1, 2, 0] == math.inf and (recorder.history[1, :, RATIO] == 0.0).all()


def test_a_group_that_joins_later():
    model, optimizer = made()
    recorder = StatisticsRecorder(optimizer)
    train(model, optimizer, 1)
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones(2)
    train(model, optimizer, 1)
    history = recorder.history
    assert recorder.names[-1] == "late" and history.shape == (2, 4, 6)
    assert np.isnan(history[0, 3]).all() and np.isfinite(history[:, :3]).all() and np.isfinite(history[1, 3]).all()


def weight_norms(recorder: StatisticsRecorder) -> dict[str, list[float]]:
    """By name, a weight norm per entry of the history, whole numbers; -1 where none was measured."""
    column = recorder.history[:, :, QUANTITIES.index("weight_norm")].T
    return {name: np.nan_to_num(row, nan=-1.0).round().tolist() for name, row in zip(recorder.names, column)}


def sized(*sizes: float) -> list[nn.Parameter]:
    """Parameters of these norms with gradients of 0, which an update without decay leaves as they are."""
    params = [nn.Parameter(torch.tensor([size])) for size in sizes]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


@pytest.mark.parametrize("named", [True, False])
def test_rows_stay_with_their_parameters_when_groups_are_edited(named, monkeypatch):
    params = sized(1.0, 2.0, 3.0)
    given = [(f"w{i}", p) for i, p in enumerate(params)] if named else params
    optimizer = AdamW([{"params": [one]} for one in given], lr=1e-3, track_statistics=True)
    device, writer = Device(monkeypatch), Writer()
    recorder = StatisticsRecorder(optimizer, writer)
    optimizer.step()
    del optimizer.param_groups[0]
    optimizer.step()
    (late,) = sized(4.0)
    optimizer.add_param_group({"params": [("late", late) if named else late]})
    optimizer.param_groups.reverse()
    optimizer.step()
    device.done = 3  # whatever arrives after the edits belongs to its own parameters
    names = ["w0", "w1", "w2", "late"] if named else ["0.0", "1.0", "2.0", "0.0 (2)"]
    expected = [[1.0, -1.0, -1.0], [2.0] * 3, [3.0] * 3, [-1.0, -1.0, 4.0]]
    assert weight_norms(recorder) == dict(zip(names, expected))
    for name, sizes in zip(names, expected):
        written = [writer.scalars.get((f"weight_norm/{name}", step), -1.0) for step in range(3)]
        assert written == sizes
    assert set(recorder.to_dict()) == {"step", *(f"{quantity}/{name}" for quantity in QUANTITIES for name in names)}


def test_a_tensor_under_the_name_of_another_continues_its_row():
    one, two = sized(1.0, 2.0)
    optimizer = AdamW([("w", one), ("v", sized(5.0)[0])], lr=1e-3, track_statistics=True)
    recorder = StatisticsRecorder(optimizer)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = two
    optimizer.step()
    assert weight_norms(recorder) == {"w": [1.0, 2.0], "v": [5.0, 5.0]}
    del one, optimizer.param_groups[0]["params"][0], optimizer.param_groups[0]["param_names"][0]
    optimizer.step()
    assert weight_norms(recorder) == {"w": [1.0, 2.0, -1.0], "v": [5.0] * 3}


def test_two_parameters_of_one_name():
    one, two = sized(1.0, 2.0)
    optimizer = AdamW([{"params": [("weight", p)]} for p in (one, two)], lr=1e-3, track_statistics=True)
    recorder = StatisticsRecorder(optimizer)
    optimizer.step()
    assert optimizer.statistics.names == recorder.names == ["weight", "weight (2)"]
    assert weight_norms(recorder) == {"weight": [1.0], "weight (2)": [2.0]}


class Failing(Writer):
    """Fails at the second scalar of some steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if step in self.steps and any(at == step for _, at in self.scalars):
            raise OSError("disk is full")
        super().add_scalar(tag, value, step)


def test_the_error_of_a_writer_comes_once_after_the_update_and_the_history_is_whole():
    model, optimizer = made()
    other, plain = made()
    writer = Failing(1)
    recorder = StatisticsRecorder(optimizer, writer)
    for step in range(4):
        model.give_gradients(step)
        with pytest.raises(OSError, match="disk is full") if step == 1 else nullcontext():
            optimizer.step()
    said = train(other, plain, 4)
    assert recorder.steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(recorder.history, np.array(said, np.float32))
    assert_same(list(model.parameters()), list(other.parameters()))
    written = [sum(at == step for _, at in writer.scalars) for step in range(4)]
    assert written == [18, 1, 18, 18]


def test_a_writer_that_fails_while_the_last_ones_arrive_loses_no_entry_and_no_other_step(monkeypatch):
    model, optimizer = made()
    Device(monkeypatch)
    writer = Failing(0)
    recorder = StatisticsRecorder(optimizer, writer)
    train(model, optimizer, 3)
    with pytest.raises(OSError, match="disk is full"):
        recorder.close()
    assert recorder.steps.tolist() == [0, 1, 2]
    assert [sum(at == step for _, at in writer.scalars) for step in range(3)] == [1, 18, 18]
    train(model, optimizer, 1)
    assert len(recorder.steps) == 3  # closed nevertheless


def test_names_without_named_parameters():
    model = Stack(2)
    optimizer = Lion([{"params": [p]} for p in model.parameters()], lr=1e-3, track_statistics=True)
    writer = Writer()
    recorder = StatisticsRecorder(optimizer, writer)
    train(model, optimizer, 1)
    assert recorder.names == ["0.0", "1.0"] and ("lost/1.0", 0) in writer.scalars


def test_columns_for_a_data_frame():
    model, optimizer = made()
    recorder = StatisticsRecorder(optimizer)
    train(model, optimizer, 3)
    columns = recorder.to_dict()
    assert len(columns) == 1 + 3 * 6 and {column.shape for column in columns.values()} == {(3,)}
    np.testing.assert_array_equal(columns["step"], [0, 1, 2])
    np.testing.assert_array_equal(columns["update_to_weight/layers.1.weight"], recorder.history[:, 1, RATIO])


@pytest.mark.parametrize("wrapper", ["accelerate", "lightning"])
def test_wrapped_optimizers(wrapper):
    model, optimizer = made()
    wrapped: Any
    if wrapper == "accelerate":
        wrapped = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)
    else:
        wrapped = pytest.importorskip("pytorch_lightning.core.optimizer").LightningOptimizer(optimizer)
    recorder = StatisticsRecorder(wrapped)
    assert recorder.optimizer is optimizer
    train(model, optimizer, 2)
    assert recorder.steps.tolist() == [0, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_has_no_recorder(copied):
    model, optimizer = made()
    recorder = StatisticsRecorder(optimizer)
    train(model, optimizer, 2)
    other = copied(optimizer)
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    other.step()
    assert other.statistics.to_dict() and len(recorder.steps) == 2
    train(model, optimizer, 1)
    assert len(recorder.steps) == 3
    later = StatisticsRecorder(other)
    other.step()
    assert len(later.steps) == 1 and len(recorder.steps) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: StatisticsRecorder(sgd()), "must be one of fusedopt's, got SGD", id="another optimizer"),
        pytest.param(
            lambda: StatisticsRecorder(made(track_statistics=False)[1]),
            "this AdamW measures nothing: construct it with track_statistics=True",
            id="nothing measured",
        ),
        pytest.param(lambda: StatisticsRecorder(made()[1], limit=1), "limit must be .* >= 2, got 1", id="limit"),
        pytest.param(
            lambda: StatisticsRecorder(made()[1], first_step=-1), "first_step must be .* >= 0, got -1", id="first step"
        ),
        pytest.param(lambda: StatisticsRecorder(made()[1], limit=math.inf), "limit must be .* >= 2, got inf", id="inf"),
        pytest.param(
            lambda: StatisticsRecorder(made()[1], first_step=math.nan), "first_step must be .* >= 0, got nan", id="nan"
        ),
        pytest.param(lambda: StatisticsRecorder(made()[1]).plot(), "no step was measured", id="an empty plot"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
