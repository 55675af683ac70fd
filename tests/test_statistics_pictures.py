"""Pictures of a history of statistics: lines for a few parameters, a heat map for many."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers.statistics import made, rows

from fusedopt import StatisticsRecorder, plot_statistics
from fusedopt.statistics.values import QUANTITIES


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("layers", [4, 30])
def test_a_single_step(trained, layers):
    figure = trained(layers, steps=1).plot()
    figure.draw_without_rendering()
    assert "step 0" in figure.get_suptitle()
