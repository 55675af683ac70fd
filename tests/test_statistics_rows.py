"""What `track_statistics` adds to an optimizer: named rows, which follow groups and copies. Checkpoints have none."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from helpers.comparing import assert_same, same
from helpers.loops import Net, train
from helpers.measured import give_gradients, parameters
from torch import nn

from fusedopt import AdamW, AdamWeightDecay, Lion, register_step_in_backward
from fusedopt.backends.eager.measures import Measure
from fusedopt.statistics.values import QUANTITIES


def test_every_third_step():
    model = Net(0)
    optimizer = AdamW(model.parameters(), track_statistics=3)
    seen = []
    for seed in range(7):
        train(model, optimizer, 1, seed=seed)
        seen.append(optimizer.statistics.tensor)
    assert [same(*pair) for pair in pairwise(seen)] == [True, True, False, True, True, False]
    assert optimizer.tracker.measured_steps == 3


def test_nothing_without_the_option(monkeypatch):
    monkeypatch.delattr(Measure, "add")
    model = Net(0)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    assert optimizer.statistics is None


@pytest.mark.parametrize("wrong", [-1, 0.5, "every", None, torch.tensor(1)])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="track_statistics must be True, False, or a whole number"):
        AdamW([nn.Parameter(torch.ones(2))], track_statistics=wrong)


def test_keras_half():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamWeightDecay([p], track_statistics=True)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.statistics.to_dict()["grad_norm/0.0"] == pytest.approx(3**0.5)


def test_names_and_a_dict_for_a_logger():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    named = AdamW(model.named_parameters(), track_statistics=True)
    assert named.statistics.tensor.shape == (4, len(QUANTITIES)) and named.statistics.tensor.isnan().all()
    assert named.statistics.to_dict() == {}
    model[0](torch.ones(3)).sum().backward()
    named.step()
    logged = named.statistics.to_dict()
    assert set(logged) == {f"{q}/0.{name}" for q in QUANTITIES for name in ("weight", "bias")}  # those with a gradient
    assert all(type(value) is float for value in logged.values())
    assert logged["grad_norm/0.weight"] == pytest.approx(6**0.5)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    assert Lion(groups, track_statistics=True).statistics.names == ["0.0", "0.1", "1.0", "1.1"]


def test_the_worst_layers_come_first():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    optimizer = AdamW(model.named_parameters(), lr=1e-3, track_statistics=True)
    with torch.no_grad():
        model[3].weight *= 100.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert optimizer.statistics.table() == "no step was measured yet"
    optimizer.step()
    lines = optimizer.statistics.table(rows=2).splitlines()
    assert lines[1].startswith("3.weight") and lines[-1] == "... and 4 more"
    model[1].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert repr(optimizer.statistics).splitlines()[1].startswith("1.weight")


def test_numbers_stay_with_their_parameters():
    a, b = (nn.Parameter(torch.full((4,), size)) for size in (1.0, 2.0))
    optimizer = AdamW([("a", a), ("b", b)], track_statistics=10)
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    (group,) = optimizer.param_groups
    group["params"].reverse()
    group["param_names"].reverse()
    group["params"].append(nn.Parameter(torch.ones(2)))  # without a name
    logged = optimizer.statistics.to_dict()
    assert (logged["weight_norm/a"], logged["weight_norm/b"]) == (2.0, 4.0)
    assert optimizer.statistics.names == ["b", "a", "0.2"] and "0.2" not in optimizer.statistics.table()


def test_parameters_without_data():
    lazy = AdamW(nn.LazyLinear(3).parameters(), track_statistics=True)
    assert lazy.statistics.tensor.shape == (2, len(QUANTITIES)) and lazy.statistics.to_dict() == {}
    p = nn.Parameter(torch.ones(2))
    mixed = AdamW([*nn.Linear(3, 3, device="meta").parameters(), p], track_statistics=True)
    p.grad = torch.ones(2)
    mixed.step()
    assert mixed.statistics.tensor[:, 0].isnan().tolist() == [True, True, False]
    assert str(AdamW([{"params": []}], track_statistics=True).statistics) == "no step was measured yet"


def test_a_group_that_is_added():
    params = parameters(torch.float32)
    optimizer = AdamW(params[:3], track_statistics=True)
    give_gradients(params, 1)
    optimizer.step()
    optimizer.add_param_group({"params": params[3:]})
    assert optimizer.statistics.tensor[:, 1].isnan().tolist() == [False] * 3 + [True] * 5
    optimizer.step()
    assert optimizer.statistics.tensor[:, 1].isnan().tolist() == [False] * 7 + [True]


def test_a_group_that_is_added_between_backward_and_step():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = AdamW(model[0].parameters(), track_statistics=True)
    register_step_in_backward(optimizer, model)
    model(torch.ones(3)).sum().backward()
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.step()
    assert optimizer.statistics.tensor[2:, 0].isfinite().all()


@pytest.mark.parametrize("through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_tracks_its_own_steps(through):
    model = Net(0)
    optimizer = AdamW(model.parameters(), track_statistics=2)
    train(model, optimizer, 1)
    before = optimizer.statistics.tensor
    other = through(optimizer)
    assert other.tracker.every == 2 and other.statistics.tensor.isnan().all()
    params = [p for group in other.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    other.step()
    assert not other.statistics.tensor.isnan().any()
    assert_same(optimizer.statistics.tensor, before)


def test_checkpoints_know_nothing_of_it():
    model = Net(0)
    tracked, plain = AdamW(model.parameters(), track_statistics=True), AdamW(model.parameters())
    train(model, tracked, 1)
    saved = tracked.state_dict()
    assert saved["param_groups"] == plain.state_dict()["param_groups"]
    plain.load_state_dict(saved)
    assert plain.statistics is None
