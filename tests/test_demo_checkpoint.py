"""The demo resumes as if it had never stopped, or says why it cannot."""

import hashlib
import json
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
from helpers.demo import Killed, kill_at, metrics, weights, without_times

from fusedopt import cli
from fusedopt.demo import train
from fusedopt.demo.checkpoint import load_checkpoint
from fusedopt.demo.settings import CHECKPOINT, OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

RESUMED = {
    "cosine": {},
    "plateau": {"schedule": "reduce_lr_on_plateau"},
    "greedy": {"schedule": "greedy"},
    "bfloat16": {"dtype": "bfloat16"},
    "accumulated": {"accumulate": 2},
    **{name: {"optimizer": name} for name in OPTIMIZERS if name != "adamw"},
}


RESUMED_QUICKLY = ("cosine", "adafactor")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[pytest.mark.slow] * (name not in RESUMED_QUICKLY))
        for name, changes in RESUMED.items()
    ],
)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_survives_being_killed_at_random_moments():
    """`make faults KILLS=50` kills it more often."""
    script = Path(__file__).parent / "killed_demo.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, str(script), "5"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] == 5


def test_a_longer_run_continues_a_shorter(tiny, tmp_path):
    long = replace(tiny, steps=8, schedule="constant", out=str(tmp_path / "long"))
    train(long)
    train(replace(long, steps=4, out=tiny.out))
    train(replace(long, out=tiny.out), resume=True)
    assert_same(weights(tiny), weights(long))


@pytest.mark.slow
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
