"""The demo: it learns, writes its files, and resumes as if it had never stopped."""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.comparing import assert_same

from fusedopt import cli
from fusedopt.demo import Outcome, Settings, report, train, training
from fusedopt.demo.checkpoint import load_checkpoint
from fusedopt.demo.model import GPT
from fusedopt.demo.settings import CHECKPOINT, CONTEXT, DTYPES, METRICS, OPTIMIZERS, SCHEDULES
from fusedopt.demo.text import DEFAULT_BYTES, Text, read_text
from fusedopt.files import write_atomically

TINY = Settings(steps=4, batch_size=2, layers=2, width=16, device="cpu", checkpoint_every=0)


@pytest.fixture(autouse=True)
def one_thread():
    """In a model this small, threads only wait for each other, the longer the more tests run at the same time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run that takes a tenth of a second, with its own text."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"%d green bottles hanging on the wall; " % (n % 7) for n in range(100)))
    return replace(TINY, text=str(text), out=str(tmp_path / "out"))


# Largest difference of the two losses in 20 tiny steps. Measured: 0 with the right formula, 7.5e-5 with decay on the
# wrong side of the update or with a beta that is off by 0.001.
AGREES = 1e-5


def without_times(records):
    return [{name: value for name, value in record.items() if name != "optimizer_ms"} for record in records]


def metrics(settings):
    return [json.loads(line) for line in (Path(settings.out) / METRICS).read_text().splitlines()]


def weights(settings):
    return load_checkpoint(Path(settings.out) / CHECKPOINT)["runs"]


class Killed(BaseException):
    """Ends a run; no handler catches it."""


def kill_at(monkeypatch, step):
    """Makes the next run end in the middle of `step`, when its second training has its gradients."""
    ticks = iter(range(1, 10**6))

    def clock(device):
        if next(ticks) > 4 * (step - 1) + 2:  # two readings for each of the two runs
            raise Killed
        return time.perf_counter()

    monkeypatch.setattr(training, "clock", clock)


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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_statistics_change_no_number_and_are_in_the_picture(tiny, tmp_path, optimizer):
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


def test_statistics_of_a_resumed_run_begin_where_it_goes_on(tiny):
    train(replace(tiny, steps=2))
    longer = replace(tiny, steps=9)
    outcome = train(longer, resume=True, statistics=True)
    assert outcome.statistics.steps.tolist() == [3, 8]
    assert train(longer, resume=True, statistics=True).statistics is None  # it is finished
    report.save_picture(outcome, Path(tiny.out) / "demo.png")


def test_of_a_long_run_a_hundred_steps_are_measured(tiny, monkeypatch):
    monkeypatch.setattr(training, "STATISTICS_STEPS", 2)
    assert train(replace(tiny, steps=23), statistics=True).statistics.steps.tolist() == [1, 13]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_drives_both_runs(tiny, schedule):
    records = train(replace(tiny, schedule=schedule)).records
    rates = {run: [record["lr"] for record in records if record["run"] == run] for run in ("eager", "fused")}
    assert rates["eager"] == rates["fused"]
    assert max(rates["eager"]) > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_agrees_with_its_reference(tiny, optimizer):
    outcome = train(replace(tiny, steps=20, optimizer=optimizer))
    eager, fused = (report.Curves(outcome.records, run) for run in ("eager", "fused"))
    assert fused.train_loss[-1] < fused.train_loss[0]
    assert report.largest_difference(eager, fused)[0] < AGREES
    assert len(report.figure(outcome).axes) == 3


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


RESUMED = {
    "cosine": {},
    "plateau": {"schedule": "reduce_lr_on_plateau"},
    "greedy": {"schedule": "greedy"},
    "bfloat16": {"dtype": "bfloat16"},
    "accumulated": {"accumulate": 2},
    **{name: {"optimizer": name} for name in OPTIMIZERS if name != "adamw"},
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, changes):
    straight = replace(tiny, steps=10, **changes)
    stopped = replace(straight, out=str(tmp_path / "stopped"), checkpoint_every=4)
    train(straight)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step=7)
        train(stopped)
    assert max(record["step"] for record in metrics(stopped)) >= 6, "the run should be killed after its checkpoint"
    outcome = train(stopped, resume=True)

    assert without_times(metrics(stopped)) == without_times(metrics(straight))
    assert outcome.records == metrics(stopped)
    assert_same(weights(stopped), weights(straight))


def test_survives_sigkill(tiny, tmp_path):
    straight = replace(tiny, steps=60)
    stopped = replace(straight, out=str(tmp_path / "stopped"))
    command = [sys.executable, "-m", "fusedopt", "demo", "--steps=60", "--checkpoint-every=1", "--device=cpu"]
    command += ["--layers=2", "--width=16", "--batch-size=2", f"--text={tiny.text}", f"--out={stopped.out}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = Path(stopped.out) / CHECKPOINT
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL) if os.name == "posix" else process.kill()
    assert process.wait() != 0, "the run ended before it could be killed"

    train(stopped, resume=True)
    train(straight)
    assert without_times(metrics(stopped)) == without_times(metrics(straight))
    assert_same(weights(stopped), weights(straight))


def test_a_longer_run_continues_a_shorter(tiny, tmp_path):
    long = replace(tiny, steps=8, schedule="constant", out=str(tmp_path / "long"))
    train(long)
    train(replace(long, steps=4, out=tiny.out))
    train(replace(long, out=tiny.out), resume=True)
    assert_same(weights(tiny), weights(long))


def test_a_longer_run_follows_its_own_schedule(tiny, tmp_path):
    long = replace(tiny, steps=40, schedule="linear", out=str(tmp_path / "long"))
    train(long)
    train(replace(long, steps=20, out=tiny.out))
    train(replace(long, out=tiny.out), resume=True)
    rates = [[record["lr"] for record in metrics(settings) if record["step"] > 20] for settings in (tiny, long)]
    assert rates[0] == rates[1]


def test_resuming_a_finished_run_changes_nothing(tiny):
    before = train(tiny).records
    assert train(tiny, resume=True).records == before == metrics(tiny)


def test_a_checkpoint_has_what_earlier_versions_wrote(tiny):
    """With other names or values, their runs could not be resumed."""
    train(tiny)
    checkpoint = load_checkpoint(Path(tiny.out) / CHECKPOINT)
    assert list(checkpoint) == ["settings", "identity", "step", "records", "batches", "runs"]
    assert checkpoint["settings"] == {
        "steps": 4,
        "batch_size": 2,
        "accumulate": 1,
        "layers": 2,
        "width": 16,
        "optimizer": "adamw",
        "schedule": None,
        "lr": None,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "text": tiny.text,
        "out": tiny.out,
        "checkpoint_every": 0,
    }
    resolved = {"schedule": "cosine", "lr": 0.002, "text": hashlib.sha256(Path(tiny.text).read_bytes()).hexdigest()}
    may_change = ("steps", "out", "checkpoint_every")
    kept = {name: value for name, value in checkpoint["settings"].items() if name not in may_change}
    assert checkpoint["identity"] == kept | resolved
    assert {name: list(run) for name, run in checkpoint["runs"].items()} == {
        name: ["model", "optimizer", "scheduler"] for name in ("eager", "fused")
    }


REFUSED_TO_RESUME = {
    "another width": ({"width": 8}, r"width was 16 in the checkpoint, now 8"),
    "another seed": ({"seed": 1}, r"seed was 0 in the checkpoint, now 1"),
    "another lr": ({"lr": 0.5}, r"lr was 0\.002 in the checkpoint, now 0\.5"),
    "another text": ({"text": None}, r"text was another one"),
    "fewer steps": ({"steps": 3}, r"4 steps are done, steps=3 asks for fewer"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_TO_RESUME.values(), ids=REFUSED_TO_RESUME)
def test_refuses_to_resume_another_run(tiny, changes, message):
    train(tiny)
    before = metrics(tiny)
    with pytest.raises(ValueError, match=message):
        train(replace(tiny, **changes), resume=True)
    assert metrics(tiny) == before


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", "another dict"], ids=str)
def test_refuses_files_that_are_no_checkpoint(tiny, content):
    path = Path(tiny.out) / CHECKPOINT
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save({"state": 1}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt (does not exist|is damaged|is no checkpoint)"):
        train(tiny, resume=True)


DAMAGE = {
    "settings": lambda c: c.update(settings=[1]),
    "an unknown setting": lambda c: c["settings"].update(colour="blue"),
    "a setting of another kind": lambda c: c["settings"].update(steps="four"),
    "identity": lambda c: c.update(identity=None),
    "step": lambda c: c.update(step="four"),
    "a step too many": lambda c: c.update(step=c["step"] + 1),
    "records": lambda c: c.update(records=None),
    "a record that is a number": lambda c: c["records"].__setitem__(0, 1),
    "a record without loss": lambda c: c["records"][0].pop("train_loss"),
    "batches": lambda c: c.update(batches=None),
    "batches of another generator": lambda c: c.update(batches=torch.zeros(3, dtype=torch.uint8)),
    "runs": lambda c: c.update(runs={}),
    "a run without model": lambda c: c["runs"]["fused"].pop("model"),
    "weights": lambda c: c["runs"]["fused"]["model"].popitem(),
    "moments": lambda c: c["runs"]["fused"]["optimizer"]["state"][0].update(exp_avg=torch.ones(2)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence_that_names_the_file(tiny, damage, capsys):
    train(tiny)
    path = Path(tiny.out) / CHECKPOINT
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    before = metrics(tiny)
    capsys.readouterr()
    assert cli.main(["demo", "--resume", "--out", str(tiny.out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said and f"cannot resume: {path}" in said
    assert metrics(tiny) == before


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the ne")
        if moment == "while writing":
            raise Killed

    def fsync(descriptor):
        raise Killed

    if moment == "before renaming":
        monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Killed):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    write_atomically(tmp_path / "here", lambda file: file.write(b"new"))
    assert (tmp_path / "here").is_symlink() and (tmp_path / "there").read_bytes() == b"new"


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "in an error of a library"])
def test_a_full_disk_names_the_file(tmp_path, wrapped):
    def write(file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if wrapped:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as C++ does
            raise

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "file", write)
    assert caught.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


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


class TestText:
    def test_default_is_python_source_and_always_the_same(self):
        text = read_text()
        assert text == read_text()
        assert 10**6 < len(text) <= DEFAULT_BYTES
        assert b"\nimport " in text

    @pytest.mark.parametrize("path", ["nowhere", "."])
    def test_unreadable(self, tmp_path, path):
        with pytest.raises(ValueError, match="cannot read the text"):
            read_text(str(tmp_path / path))

    def test_parts_do_not_overlap(self):
        train_part, held_out = b"t" * 900, b"h" * 100
        text = Text(train_part + held_out, context=8)
        generator = torch.Generator().manual_seed(0)
        tokens, targets = text.batch(2000, generator)
        assert set(tokens.unique().tolist()) | set(targets.unique().tolist()) == {ord("t")}
        tokens, targets = text.held_out(50)
        assert set(tokens.unique().tolist()) | set(targets.unique().tolist()) == {ord("h")}

    def test_targets_follow_tokens(self):
        text = Text(bytes(range(250)), context=16)
        tokens, targets = text.batch(32, torch.Generator().manual_seed(0))
        assert_same(targets, tokens + 1)
        assert len(tokens[:, 0].unique()) > 10

    def test_places_in_a_text_longer_than_float32_can_count(self):
        """Places are computed in integers, for any size; no text of that size is made."""
        text = Text(b"x" * 200, context=4)
        size = 10**9 + 7
        asked = []

        class Windows:
            def __len__(self):
                return size

            def __getitem__(self, places):
                asked.extend(places.tolist())
                return torch.zeros(len(places), 5, dtype=torch.uint8)

        text._held_out = Windows()
        text.held_out(64)
        assert asked == [k * (size - 1) // 63 for k in range(64)]
        assert asked[0] == 0 and asked[-1] == size - 1
        asked.clear()
        text.held_out(1)
        assert asked == [0]

    @pytest.mark.parametrize("size", [0, 1, 89])
    def test_too_small(self, size):
        with pytest.raises(ValueError, match=f"the text has {size} bytes, too few .* 90 are needed"):
            Text(b"x" * size, context=8)
        Text(b"x" * 90, context=8)


def test_the_model_does_not_look_ahead():
    torch.manual_seed(0)
    model = GPT(layers=2, width=64, context=12)
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = torch.randint(256, (5,))
    before, after = model(tokens), model(changed)
    assert_same(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


class TestReport:
    def records(self, eager, fused):
        return [
            {"run": run, "step": step, "train_loss": loss, "val_loss": loss, "lr": 0.1, "optimizer_ms": ms}
            for run, losses, ms in (("eager", eager, 3.0), ("fused", fused, 1.5))
            for step, loss in enumerate(losses, start=1)
        ]

    def outcome(self, *losses):
        return Outcome(TINY, 1000, 10, 64, "eager", self.records(*losses))

    def test_table(self):
        outcome = self.outcome([5.0, 4.0, 3.0], [5.0, 4.25, 3.125])
        lines = report.table(outcome).splitlines()
        rows = lines[2:10]
        assert len({len(row) for row in rows}) == 1, "columns do not line up"
        cells = {row[:32].strip(): row[32:].split() for row in rows}
        assert cells["train loss, last step"] == ["3.0000", "3.1250"]
        assert cells["validation loss, step 1"] == ["5.0000", "5.0000"]
        assert cells["optimizer, ms per step (median)"] == ["3.000", "1.500"]
        assert cells["optimizer, speed ratio"] == ["1.00", "2.00"]
        assert cells["device"] == ["cpu", "cpu"]
        assert lines[-1] == "largest difference between the two loss curves: 0.25, at step 2"

    def test_losses_that_are_not_finite_are_named(self):
        nan = math.nan
        lines = report.table(self.outcome([5.0, nan, nan], [5.0, 4.0, math.inf])).splitlines()
        assert "reference loop: the loss is not finite from step 2 on" in lines[-2]
        assert "fusedopt: the loss is not finite from step 3 on" in lines[-1]

    @pytest.mark.parametrize("losses", [[5.0, 4.0, 3.0], [5.0], [math.nan]], ids=["three", "one", "nan"])
    def test_picture(self, tmp_path, losses):
        outcome = self.outcome(losses, losses)
        assert len(report.figure(outcome).axes) == 3
        report.save_picture(outcome, tmp_path / "demo.png")
        assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("eager", "fused", "title"),
        [
            ([5.0, 4.0, 3.0], [5.0, 4.001, 3.0], "one curve on top of the other"),
            ([3.0], [3.0], "one curve on top of the other"),
            ([5.0, 4.0, 3.0], [5.0, 4.5, 3.1], "two curves, furthest apart at step 2"),
            ([math.nan] * 3, [math.inf] * 3, "no loss is finite"),
            ([5.0, math.nan, 3.0], [5.0, math.nan, 3.0], "not finite from step 2 on (reference loop and fusedopt)"),
            ([5.0, 4.0, 3.0], [5.0, 4.0, math.inf], "not finite from step 3 on (fusedopt)"),
        ],
        ids=["same", "one step", "apart", "nothing finite", "both broken", "one broken"],
    )
    def test_the_title_of_the_losses_says_what_there_is_to_see(self, eager, fused, title):
        figure = report.figure(self.outcome(eager, fused))
        assert figure.axes[0].get_title(loc="left") == f"Loss, nats per byte: {title}"
        assert "nan" not in " ".join(text.get_text() for text in figure.axes[0].texts)

    def test_the_legend_lies_beside_the_losses(self):
        rising = [1.0, 2.0, 3.0]
        figure = report.figure(self.outcome(rising, rising))
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend().get_window_extent()
        assert not legend.overlaps(figure.axes[0].bbox)
        assert figure.bbox.x1 >= legend.x1 and figure.bbox.y1 >= legend.y1
