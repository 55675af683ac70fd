"""The table of weight decay in bfloat16: every row is there, what it says is measured, and documents show it."""

from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from perf import decay, report, results
from perf.decay import ROWS, Row
from perf.providers import Provider
from perf.results import Run

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def row(optimizer, name):
    (found,) = [r for r in ROWS if (r.optimizer, r.provider.name) == (optimizer, name)]
    return found


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="counted in Triton's interpreter, which is off where there is a GPU"
)
@pytest.mark.parametrize(
    ("optimizer", "policy", "bytes_"),
    [
        ("AdamW", "rounded to nearest", 14),
        ("AdamW", "stochastic_rounding", 14),
        ("AdamW", "master_weights", 26),
        ("AdamW", "master_weights, state_dtype=bfloat16", 18),
        ("Lion", "rounded to nearest", 10),
        ("Lion", "stochastic_rounding", 10),
        ("Lion", "master_weights", 18),
        ("Lion", "master_weights, state_dtype=bfloat16", 14),
    ],
)
def test_bytes_that_a_step_moves(optimizer, policy, bytes_, monkeypatch):
    """Weight, gradient and moments once each way but for the gradient; the remainder both ways, 2 bytes each."""
    monkeypatch.setattr(decay, "SHAPE", (64, 64))
    assert decay.moved(row(optimizer, f"fusedopt, {policy}")) == pytest.approx(bytes_, abs=0.01)


@pytest.mark.parametrize(
    ("name", "left", "state"),
    [
        ("torch, fused", 1.0, 4),
        ("torch, fused, float32 weights", decay.RIGHT, 8),
        ("fusedopt, rounded to nearest", 1.0, 4),
        ("fusedopt, master_weights", decay.RIGHT, 10),
    ],
)
def test_what_is_left_of_weights(name, left, state, monkeypatch):
    monkeypatch.setattr(decay, "SHAPE", (32, 64))
    record = decay.run(row("AdamW", name), CPU)
    assert record["status"] == "measured"
    assert record["left"] == pytest.approx(left, rel=1e-3)
    assert record["bytes"]["state"] == pytest.approx(state, abs=0.01)


def test_a_state_that_is_made_of_several_tensors_has_the_bytes_of_all():
    assert decay._bytes(TwoTensor(torch.zeros(4), torch.zeros(4))) == 32
    assert decay._bytes(3) == 0


def test_who_does_not_run_is_in_the_table_with_the_reason():
    def refuses(params):
        raise NotImplementedError("needs a GPU\nof some kind")

    rows = [
        Row("AdamW", Provider(path, "AdamW", make)) for path, make in [("absent", "no_such.AdamW"), ("no", refuses)]
    ]
    records = [decay.run(r, CPU) for r in rows]
    assert [r["status"] for r in records] == [
        "missing: no_such.AdamW is not there",
        "failed: NotImplementedError: needs a GPU",
    ]
    table = report.decay_table(Run(records), markdown=True)
    assert "| AdamW | no | failed: NotImplementedError: needs a GPU |  |  |  |" in table


@pytest.mark.parametrize("name", ["README.md", "docs/low-precision.md"])
def test_the_documented_table_is_that_of_the_committed_run(name):
    run = Run(results.read(results.COMMITTED / "h100" / "low_precision.jsonl"))
    document = (ROOT / name).read_text()
    assert report.between_marks(document, run) == document, "run the command that stands below the table"


def test_the_committed_run_has_every_row():
    run = Run(results.read(results.COMMITTED / "h100" / "low_precision.jsonl"))
    assert [(r["optimizer"], r["provider"]) for r in run.of("decay")] == [(r.optimizer, r.provider.name) for r in ROWS]
    ours = [r for r in run.of("decay") if r["provider"].startswith("fusedopt")]
    assert [abs(r["left"] - r["right"]) < 1e-3 for r in ours] == ["nearest" not in r["provider"] for r in ours]
