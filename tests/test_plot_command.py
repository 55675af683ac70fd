"""`fusedopt plot`: the pictures that it writes, and what it refuses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from fusedopt.cli.plot import add_plot_command
from fusedopt.schedules.plotting import plot_gallery

mpl = pytest.importorskip("matplotlib")


# The command


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_plot_command(parser.add_subparsers(required=True))
    args = parser.parse_args(["plot", *arguments])
    return args.run(args)


def is_a_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000


@pytest.mark.parametrize("name", ["linear", "constant", "cosine_with_min_lr", "warmup_stable_decay", "greedy"])
def test_the_command_draws_a_name_with_what_it_needs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(name, "--warmup-steps", "5", "--training-steps", "40", "--lr", "0.01") == 0
    assert is_a_picture(tmp_path / f"{name}.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--all"],
        pytest.param(["linear", "--verify"], marks=pytest.mark.slow),
        ["warmup_stable_decay", "--verify", "--training-steps", "30", "--set", "decay_type=1-sqrt"],
        ["cosine", "cosine_with_restarts", "--set", "num_cycles=4"],
        ["cosine_with_min_lr", "--set", "min_lr=1e-4"],
        pytest.param(["cosine_warmup_with_min_lr", "--set", "min_lr=1e-4", "--verify"], marks=pytest.mark.slow),
        ["warmup_stable_decay", "--set", "num_stable_steps=100"],
        ["greedy", "--set", "smooth=true"],
    ],
    ids=" ".join,
)
def test_the_command_says_what_it_wrote(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "picture.png"
    assert run_command(*arguments, "-o", str(path)) == 0
    assert capsys.readouterr().out == f"wrote {path}\n" and is_a_picture(path)
    assert not recwarn.list


@pytest.mark.slow
def test_what_is_set_takes_the_place_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.cli import plot as plot_command

    drawn: list[Any] = []
    monkeypatch.setattr(plot_command, "plot_schedule", lambda what, **_: drawn.append(what) or plot_gallery(1, 9))
    run_command("cosine_with_min_lr", "--set", "min_lr=1e-4", "-o", str(tmp_path / "x.png"))
    run_command("warmup_stable_decay", "--set", "num_stable_steps=100", "-o", str(tmp_path / "x.png"))
    assert drawn == [
        [("cosine_with_min_lr", {"num_warmup_steps": 100, "num_training_steps": 1000, "min_lr": 1e-4})],
        [("warmup_stable_decay", {"num_warmup_steps": 100, "num_decay_steps": 200, "num_stable_steps": 100})],
    ]


def test_a_format_that_needs_a_missing_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"cannot write .*picture\.pgf: .* choose another"):
        run_command("linear", "-o", str(tmp_path / "picture.pgf"))
    assert not list(tmp_path.iterdir())


def test_other_formats(tmp_path: Path) -> None:
    assert run_command("linear", "-o", str(tmp_path / "picture.svg")) == 0
    assert "<svg" in (tmp_path / "picture.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no schedule named; give one of linear, .*, or --all"),
        (["lineal"], "choose one of linear"),
        (["--all", "linear"], "leave out names"),
        (["linear", "cosine", "--verify"], "got 2; name one"),
        (["greedy", "--verify"], "follows a metric.*name another"),
        (["linear", "--set", "num_cycles=2"], "unexpected keyword argument 'num_cycles'; see the schedule's function"),
        (["linear", "--set", "num_cycles"], "--set takes KEY=VALUE, got 'num_cycles'"),
        (["cosine", "--set", "last_epoch=5"], "a picture is of a new run, without last_epoch"),
        (["cosine", "--verify", "--set", "num_warmup_steps=5"], "give num_warmup_steps as --warmup-steps"),
        (["greedy", "--set", "factor=abc"], "factor must be a number, got 'abc'"),
        (["greedy", "--set", "factor=nan"], "factor must be a number, got nan"),
        (["greedy", "--set", "factor=0"], "factor must be > 0, got 0"),
        (["linear", "--warmup-steps", "-3"], "--warmup-steps must be >= 0, got -3"),
        (["linear", "--training-steps", "nan"], "--training-steps must be a finite number, got nan"),
        (["linear", "--lr", "-1"], "--lr must be finite and >= 0, got -1"),
        (["greedy", "--training-steps", "1e9"], "num_steps must be <= 1000000 for a metric-driven"),
        (["polynomial", "--set", "lr_end=1"], "lr_end must be below"),
        (["linear", "-o", "picture.gifx"], "its name must end in one of .*png"),
        (["linear", "-o", "no/such/folder/x.png"], "there is no folder no/such/folder; make it first"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_the_command_refuses_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        run_command(*arguments)
    assert caught.match(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["schedules.png", "verification.png"])
def test_the_pictures_of_the_docs_are_there_and_small(name: str) -> None:
    assert is_a_picture(Path(__file__).parents[1] / "docs" / "img" / name)
