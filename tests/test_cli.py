"""The command line: help, information, and one sentence for every mistake."""

import importlib
import json
import os

import pytest
import torch

from fusedopt import cli, demo

TINY = ["--steps=2", "--layers=1", "--width=8", "--batch-size=2", "--device=cpu"]


def run(*arguments):
    """The exit code, however the command ends."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code


def test_help_names_the_commands(capsys):
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for command in ("demo", "plot", "info"):
        assert f"\n    {command} " in printed


def test_demo_help_shows_options_and_defaults(capsys):
    assert run("demo", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    defaults = demo.Settings()
    for name in ("steps", "batch_size", "layers", "width", "optimizer", "dtype", "device", "seed", "out"):
        assert f"--{name.replace('_', '-')}" in printed
        assert f"(default: {getattr(defaults, name)})" in printed
    for option in ("--lr", "--text", "--checkpoint-every", "--resume", "--accumulate"):
        assert option in printed


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("fusedopt ")


MISTAKES = {
    "no command": [],
    "unknown command": ["train"],
    "unknown option": ["demo", "--epochs", "3"],
    "no number": ["demo", "--steps", "many"],
    "no steps": ["demo", "--steps", "0"],
    "negative rate": ["demo", "--lr", "-1"],
    "rate that is not finite": ["demo", "--lr", "inf"],
    "unknown optimizer": ["demo", "--optimizer", "sgd"],
    "unknown schedule": ["demo", "--schedule", "steep"],
    "unknown dtype": ["demo", "--dtype", "int8"],
    "unknown device": ["demo", "--device", "tpu"],
    "missing text": ["demo", "--text", "{folder}/missing"],
    "folder as text": ["demo", "--text", "{folder}"],
    "short text": ["demo", "--text", "{folder}/short"],
    "file as folder": ["demo", *TINY, "--out", "{folder}/short/out"],
    "nothing to resume": ["demo", "--resume", "--out", "{folder}/missing"],
    "too much memory": ["demo", "--width", "100000", "--out", "{folder}/out"],
    "unknown schedule to plot": ["plot", "steep"],
}


def out_of_memory(*sizes):
    # What torch's allocator for the CPU says.
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence(arguments, tmp_path, capsys, monkeypatch):
    if "100000" in arguments:  # a machine that has the memory must not try
        monkeypatch.setattr(demo, "GPT", out_of_memory)
    (tmp_path / "short").write_text("short")
    assert run(*(argument.format(folder=tmp_path) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fusedopt")
    assert len(printed.err.splitlines()) == 1
    assert 20 < len(printed.err) < 400


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("a defect")

    monkeypatch.setattr(demo, "train", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run("demo", *TINY)


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupt)
    assert run("demo", *TINY, "--out", "runs/mine") == 130
    assert "fusedopt demo --resume --out runs/mine" in capsys.readouterr().err


def test_demo_leaves_table_picture_numbers_and_checkpoint(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("demo", *TINY, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "validation loss, last step" in printed
    assert str(out / "demo.png") in printed
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "demo.png", "metrics.jsonl"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


def test_resume_keeps_the_options_that_are_not_given(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert run("demo", *TINY, "--seed=7", "--out", out) == 0
    assert run("demo", "--resume", "--steps=3", "--out", out) == 0
    with open(os.path.join(out, "metrics.jsonl")) as file:
        assert [json.loads(line)["step"] for line in file] == [1, 1, 2, 2, 3, 3]
    assert run("demo", "--resume", "--width=16", "--out", out) == 2
    assert "width was 8 in the checkpoint, now 16" in capsys.readouterr().err


def test_resume_finds_a_folder_that_was_moved(tmp_path):
    assert run("demo", *TINY, "--out", str(tmp_path / "here")) == 0
    os.rename(tmp_path / "here", tmp_path / "there")
    assert run("demo", "--resume", "--out", str(tmp_path / "there")) == 0
    assert not (tmp_path / "here").exists()


def test_info(capsys):
    assert run("info") == 0
    printed = capsys.readouterr().out
    for name in ("fusedopt", "torch", "triton", "numpy", "matplotlib"):
        assert f"\n{name}" in "\n" + printed
    assert torch.__version__ in printed
    assert printed.splitlines()[-1 - torch.cuda.device_count()].split()[0] == "cpu"


def test_info_without_triton_on_a_gpu(monkeypatch, capsys):
    """Two devices, the second a GPU that no kernel can serve."""

    def import_module(name):
        if name == "triton":
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(cli, "import_module", import_module)
    monkeypatch.setattr(cli.backends, "has_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert "triton      not installed" in printed
    assert printed.splitlines()[-1].split() == ["cuda:0", "NVIDIA", "H200", "eager"]
