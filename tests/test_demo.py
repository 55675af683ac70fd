"""The demo: it learns, writes its files, and refuses settings that make no sense."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.comparing import assert_same
from helpers.demo import TINY, metrics, weights, without_times

from fusedopt.demo import report, train, training
from fusedopt.demo.model import GPT
from fusedopt.demo.settings import CONTEXT, DTYPES, OPTIMIZERS, SCHEDULES

pytestmark = pytest.mark.usefixtures("one_thread")

# Largest difference of the two losses in 20 tiny steps. Measured: 0 with the right formula, 7.5e-5 with decay on the
# wrong side of the update or with a beta that is off by 0.001.
AGREES = 1e-5


def test_learns_and_both_runs_agree(tiny):
    outcome = train(replace(tiny, steps=60, batch_size=8, lr=1e-2))
    eager, fused = (report.Curves(outcome.records, run) for run in ("eager", "fused"))
    assert eager.val_loss[-1] < eager.val_loss[0] - 2
    assert eager.steps == fused.steps == list(range(1, 61))
    assert eager.val_steps == fused.val_steps == [1, 25, 50, 60]
    # The same formula in another order of float32 operations, amplified by 60 steps of training.
    assert report.largest_difference(eager, fused)[0] < 1e-2
    assert outcome.parameters == sum(p.numel() for p in GPT(2, 16, CONTEXT).parameters())


def test_a_wrong_optimizer_shows_in_the_difference(tiny, monkeypatch):
    right = OPTIMIZERS["adamw"]
    wrong = right._replace(ours=lambda params, **options: right.ours(params, **{**options, "convention": "torch"}))
    monkeypatch.setitem(OPTIMIZERS, "adamw", wrong)
    outcome = train(replace(tiny, steps=20))
    eager, fused = (report.Curves(outcome.records, run) for run in ("eager", "fused"))
    assert report.largest_difference(eager, fused)[0] > 5 * AGREES


def test_records(tiny):
    outcome = train(tiny)
    assert metrics(tiny) == outcome.records
    assert [(record["run"], record["step"]) for record in outcome.records[:3]] == [
        ("eager", 1),
        ("fused", 1),
        ("eager", 2),
    ]
    for record in outcome.records:
        assert set(record) - {"val_loss"} == {"run", "step", "train_loss", "lr", "optimizer_ms"}
        assert ("val_loss" in record) == (record["step"] in (1, 4))
        assert record["optimizer_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_statistics_change_no_number_and_are_in_the_picture(tiny, optimizer):
    tiny = replace(tiny, optimizer=optimizer, steps=6)
    plain = train(tiny)
    weights_of_plain = weights(tiny)
    outcome = train(tiny, statistics=True)
    assert without_times(outcome.records) == without_times(plain.records) and plain.statistics is None
    assert_same([run["model"] for run in weights(tiny).values()], [run["model"] for run in weights_of_plain.values()])
    assert outcome.statistics.steps.tolist() == [1, 6]
    assert {"position", "blocks.0.grow.bias"} < set(outcome.statistics.names)
    assert [ax.get_title(loc="left") for ax in report.figure(outcome).axes if ax.get_title(loc="left")][-2:] == [
        "update/weight",
        "gradient norm",
    ]


@pytest.mark.slow
def test_statistics_of_a_resumed_run_begin_where_it_goes_on(tiny):
    train(replace(tiny, steps=2))
    longer = replace(tiny, steps=9)
    outcome = train(longer, resume=True, statistics=True)
    assert outcome.statistics.steps.tolist() == [3, 8]
    assert train(longer, resume=True, statistics=True).statistics is None  # it is finished
    report.save_picture(outcome, Path(tiny.out) / "demo.png")


def test_of_a_long_run_not_every_fifth_step_is_measured(tiny, monkeypatch):
    monkeypatch.setattr(training, "STATISTICS_STEPS", 2)
    assert train(replace(tiny, steps=23), statistics=True).statistics.steps.tolist() == [1, 13]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_drives_both_runs(tiny, schedule):
    records = train(replace(tiny, schedule=schedule)).records
    rates = {run: [record["lr"] for record in records if record["run"] == run] for run in ("eager", "fused")}
    assert rates["eager"] == rates["fused"]
    assert max(rates["eager"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_agrees_with_its_reference(tiny, optimizer):
    outcome = train(replace(tiny, steps=20, optimizer=optimizer))
    eager, fused = (report.Curves(outcome.records, run) for run in ("eager", "fused"))
    assert fused.train_loss[-1] < fused.train_loss[0]
    assert report.largest_difference(eager, fused)[0] < AGREES
    assert len(report.figure(outcome).axes) == 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tiny, dtype):
    train(replace(tiny, dtype=dtype))
    state = weights(tiny)["fused"]["model"]
    assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}


def test_accumulation_averages_batches(tiny):
    """Two batches of two windows have the loss of one batch of the same four windows."""
    whole = train(replace(tiny, steps=2, batch_size=4, lr=0.0)).records
    parts = train(replace(tiny, steps=2, batch_size=2, accumulate=2, lr=0.0)).records
    # A mean of means, in float32.
    assert [r["train_loss"] for r in parts] == pytest.approx([r["train_loss"] for r in whole], rel=1e-6)


OUT_OF_RANGE = [
    {"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"layers": 0}, {"width": -1}, {"width": 10**9}, {"seed": -1},
    {"seed": 2**63}, {"checkpoint_every": -1}, {"optimizer": "sgd"}, {"schedule": "Linear"}, {"dtype": "int8"},
    {"device": "tpu"}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf},
]  # fmt: skip


@pytest.mark.parametrize("changes", OUT_OF_RANGE, ids=str)
def test_settings_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(TINY, **changes)


@pytest.mark.parametrize("changes", [{"lr": 1e-3}, {"schedule": "linear"}], ids=str)
def test_relative_steps_leave_no_rate_to_set(changes):
    with pytest.raises(ValueError, match="has a learning rate of its own"):
        replace(TINY, optimizer="adafactor_relative", **changes)


def test_device_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert replace(TINY, device="auto").torch_device.type == "cpu"
    with pytest.raises(ValueError, match="finds no CUDA"):
        replace(TINY, device="cuda")
