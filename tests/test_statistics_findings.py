"""What stands out in the statistics of a step, and their table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.statistics import made, rows, train
from torch import nn

from fusedopt import AdamW
from fusedopt.statistics.findings import findings, kinds_of
from fusedopt.statistics.values import QUANTITIES

RATIO = QUANTITIES.index("update_to_weight")


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
    assert head.split()[::7] == ["parameter", "finding"] and head.split()[5] == "update/weight"
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
