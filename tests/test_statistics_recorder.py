"""The history of statistics: bounded, without waiting, handed to a writer; its picture, and what stands out."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.schedules import sgd
from torch import nn

from fusedopt import AdamW, Lion, StatisticsRecorder, plot_statistics
from fusedopt.statistics import recorder as recording
from fusedopt.statistics.findings import findings, kinds_of
from fusedopt.statistics.values import QUANTITIES

RATIO = QUANTITIES.index("update_to_weight")


class Stack(nn.Module):
    """So many linear layers in a row."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(layers)])

    def give_gradients(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def made(layers: int = 3, **options: Any) -> tuple[Stack, AdamW]:
    torch.manual_seed(0)
    model = Stack(layers)
    return model, AdamW(model.named_parameters(), lr=1e-3, **{"track_statistics": True, **options})


def train(model: Stack, optimizer: AdamW, steps: int) -> list[np.ndarray]:
    """Returns what `optimizer.statistics` said after each step."""
    said = []
    for step in range(steps):
        model.give_gradients(step)
        optimizer.step()
        said.append(optimizer.statistics.tensor.numpy())
    return said


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
            "this AdamW measures nothing: make it with track_statistics=True",
            id="nothing measured",
        ),
        pytest.param(lambda: StatisticsRecorder(made()[1], limit=1), "limit must be .* >= 2, got 1", id="limit"),
        pytest.param(
            lambda: StatisticsRecorder(made()[1], first_step=-1), "first_step must be .* >= 0, got -1", id="first step"
        ),
        pytest.param(lambda: StatisticsRecorder(made()[1]).plot(), "no step was measured", id="an empty plot"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What stands out.


def rows(*ratios: float, gradient: float = 1.0) -> np.ndarray:
    """Values of parameters with weights of norm 1."""
    return np.array([[gradient, 1.0, ratio, ratio, ratio, 0.0] for ratio in ratios])


def order(values: np.ndarray, kinds: list[Any] | None = None, numel: Any = 1) -> list[int]:
    found = findings(values, kinds or [0] * len(values), np.broadcast_to(numel, len(values)))
    return sorted(range(len(values)), key=lambda i: found[i][:2])


def test_the_farthest_from_its_kind_comes_first():
    values = rows(1e-3, 2e-3, 1e-5, 1e-3, 1.0, 2.0, 1.5)
    assert order(values, ["matrix"] * 4 + ["bias"] * 3)[0] == 2
    found = findings(values, ["matrix"] * 4 + ["bias"] * 3, np.ones(7))
    assert found[2].text == "update/weight × 0.01" and found[2].stands_out
    assert [f.text for i, f in enumerate(found) if i != 2] == [""] * 6


def test_kinds_are_dimensions_and_the_ends_of_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert kinds_of(AdamW(model.named_parameters())) == [(2, "weight"), (1, "bias"), (1, "weight"), (1, "bias")]
    assert kinds_of(AdamW(model.parameters())) == [(2, ""), (1, ""), (1, ""), (1, "")]


def test_elements_of_another_size_stand_out_where_the_ratio_does_not():
    values = rows(1e-3, 1e-3, 1e-3)
    values[1, QUANTITIES.index("weight_norm")] = 50.0
    assert order(values)[0] == 1 and findings(values, [0] * 3, np.ones(3))[1].text == "element size × 50"
    # A larger tensor has a larger norm, and elements of the same size.
    assert findings(values, [0] * 3, np.array([1, 2500, 1]))[1].text == ""


def test_a_kind_of_two_halves_hides_no_sick_layer():
    """As biases of linear layers, of which some start at 0 and others do not."""
    values = rows(*[1e-3] * 12, *[5e-2] * 8, *[2e-3] * 5, 1e-2)
    found = findings(values, ["bias"] * 20 + ["weight"] * 6, np.ones(26))
    assert [i for i, f in enumerate(found) if f.stands_out] == [25] and found[25].text == "update/weight × 5"


def test_what_is_broken_comes_before_what_is_far():
    values = rows(1e-3, 1e-3, 1e-3, 1e-9, 1e-3, 0.0, 1e-3)
    values[0, 0] = 0.0
    values[2, :3] = math.nan
    values[4, QUANTITIES.index("weight_norm")] = 0.0
    values[4, RATIO] = math.inf
    found = findings(values, [0] * 7, np.ones(7))
    assert order(values) == [2, 0, 3, 1, 6, 4, 5]
    texts = ["gradient is 0", "", "not finite: gradient, weight, update", "update/weight × 1e-06", "weight was 0"]
    assert [f.text for f in found] == [*texts, "update was 0", ""]
    assert [i for i, f in enumerate(found) if f.stands_out] == [0, 2, 3]


def test_no_gradient_at_all_and_no_elements_are_nothing_special():
    values = rows(0.0, 0.0, gradient=0.0)
    assert not any(f.stands_out for f in findings(values, [0, 0], np.ones(2)))
    values = rows(1e-3, 0.0)
    values[1, :3] = 0.0
    assert not findings(values, [0, 0], np.array([1, 0]))[1].stands_out


@pytest.mark.parametrize("layers", [5, 300])
def test_the_table_names_the_sick_layer_first_and_lines_up(layers):
    model, optimizer = made(layers)
    sick = f"layers.{layers - 2}.weight"
    with torch.no_grad():
        model.get_parameter(sick).mul_(100)
    train(model, optimizer, 2)
    head, first, *others = optimizer.statistics.table().splitlines()
    assert first.split()[0] == sick and "× " in first
    assert head.split()[::7] == ["parameter", "conspicuous"] and head.split()[5] == "update/weight"
    more = layers > 20
    assert len(others) == min(layers, 20) - 1 + more
    assert not more or others[-1] == "... and 280 more"
    assert {line.index("%") for line in [first, *others][: min(layers, 20)]} == {head.index("lost") + 3}
    end = head.index("update/weight") + len("update/weight")
    assert all(line[end - 1].isdigit() and line[end] == " " for line in [first, *others][: min(layers, 20)])
    assert len(optimizer.statistics.table(rows=None).splitlines()) == layers + 1
    numbers = dict(zip(head.split()[1:6], map(float, first.split()[1:6])))
    said = optimizer.statistics.to_dict()
    assert numbers["gradient"] == pytest.approx(said[f"grad_norm/{sick}"], rel=6e-3)
    assert numbers["update/weight"] == pytest.approx(said[f"update_to_weight/{sick}"], rel=6e-3)


# The picture.


@pytest.fixture
def trained():
    """Makes a recorder that has seen a few steps: one skipped, one layer sick, one never measured, one broken."""
    pytest.importorskip("matplotlib")

    def make(layers: int, steps: int = 6) -> StatisticsRecorder:
        model, optimizer = made(layers, skip_nonfinite=True)
        with torch.no_grad():
            model.layers[1].weight.mul_(100)
        recorder = StatisticsRecorder(optimizer)
        for step in range(steps):
            model.give_gradients(step)
            model.layers[2].weight.grad = None
            if step == 3:
                model.layers[3].weight.grad[0, 0] = math.nan
            optimizer.step()
        return recorder

    return make


def texts(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_few_layers_are_lines(trained, tmp_path):
    recorder = trained(5)
    figure = recorder.plot(tmp_path / "few.png")
    assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["update/weight", "gradient norm"]
    names = [f"{layer}.weight" for layer in (0, 1, 3, 4)]
    assert texts(figure)[:4] == names
    for ax, quantity in zip(figure.axes, ("update_to_weight", "grad_norm")):
        assert ax.get_yscale() == "log"
        for line, layer in zip(ax.get_lines(), (0, 1, 3, 4)):
            expected = recorder.history[:, layer, QUANTITIES.index(quantity)].astype(np.float64)
            np.testing.assert_array_equal(line.get_ydata(), np.where(expected > 0.0, expected, np.nan))
    assert "not finite: 3.weight" in texts(figure) and "steps that changed nothing" in texts(figure)
    first, second = figure.get_suptitle().splitlines()
    assert first == "4 parameters in layers, steps 0 to 5; 1 measured step changed nothing"
    assert second.startswith("stands out: 1.weight (")


def colours(figure: Any, panel: int) -> np.ndarray:
    """Of the cells of a heat map, [rows, columns, 3]."""
    (mesh,) = figure.axes[panel].collections
    return np.asarray(mesh.get_array())[..., :3]


def test_many_layers_are_a_heat_map(trained, tmp_path):
    from matplotlib.colors import to_rgb

    from fusedopt.drawing import WRONG
    from fusedopt.statistics.plotting import _NO_UPDATE

    figure = trained(300).plot(tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
    ratios, gradients = colours(figure, 0), colours(figure, 1)
    assert ratios.shape == gradients.shape == (299, 6, 3)  # one layer was never measured
    broken = np.isclose(gradients, to_rgb(WRONG)).all(axis=-1)
    assert np.argwhere(broken).tolist() == [[2, 3]]
    np.testing.assert_array_equal(np.isclose(ratios, to_rgb(_NO_UPDATE)).all(axis=-1), np.arange(6) == [[3]] * 299)
    labels = figure.axes[0].get_yticklabels()
    assert 20 < len(labels) < 100
    sick = next(label for label in labels if label.get_text() == "1.weight")
    assert sick.get_color() == WRONG
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.y0 >= b.y1 - 1 or b.y0 >= a.y1 - 1 for a, b in pairwise(boxes)), "labels overlap"
    assert "300" not in figure.get_suptitle() and "299 parameters in layers, steps 0 to 5" in figure.get_suptitle()


def test_long_names_are_shortened_and_the_picture_keeps_its_width(trained):
    recorder = trained(30)
    for group in recorder.optimizer.param_groups:
        group["param_names"] = [f"a.{name}.{'very_' * 40}long" for name in group["param_names"]]
    figure = plot_statistics(recorder)
    figure.draw_without_rendering()
    assert all("…" in label.get_text() for label in figure.axes[0].get_yticklabels())
    assert all(label.get_window_extent().x0 >= 0 for label in figure.axes[0].get_yticklabels())
    assert figure.axes[0].bbox.width > 0.25 * figure.bbox.width


def test_a_cell_of_many_shows_what_deserves_it_most():
    from fusedopt.statistics.plotting import _pooled

    deserves = np.zeros((1000, 50))
    deserves[777, 3] = np.inf
    cells, starts = _pooled(deserves[..., None], deserves, 0, 60)
    assert cells.shape == (60, 50, 1) and np.isinf(cells).sum() == 1
    assert starts[0] == 0 and np.isinf(cells[np.searchsorted(starts, 777, "right") - 1, 3])
    same, all_starts = _pooled(deserves[..., None], deserves, 1, 60)
    assert same.shape == (1000, 50, 1) and all_starts.tolist() == list(range(50))


def test_one_broken_step_of_many_is_seen():
    from matplotlib.colors import to_rgb

    from fusedopt.drawing import WRONG

    _, optimizer = made(20)
    recorder = StatisticsRecorder(optimizer)
    for step in range(900):
        values = np.repeat(rows(1e-3), 20, axis=0)
        values[:, 0] = 1.0 + step % 7
        if step == 501:
            values[4, 0] = math.inf
        recorder._keep(step, values)
    cells = colours(plot_statistics(recorder), 1)
    assert cells.shape == (20, 240, 3)
    assert np.argwhere(np.isclose(cells, to_rgb(WRONG)).all(axis=-1)).tolist() == [[4, 501 * 240 // 900]]


@pytest.mark.parametrize("layers", [4, 30])
def test_a_single_step(trained, layers):
    figure = trained(layers, steps=1).plot()
    figure.draw_without_rendering()
    assert "step 0" in figure.get_suptitle()
