"""The command line: help, `info`, and one sentence for every mistake."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import fusedopt
from fusedopt import cli, demo
from fusedopt.cli import info
from fusedopt.cli.threads import WAITING, share_the_cores
from fusedopt.demo import training

ROOT = Path(__file__).parent.parent

TINY = ["--steps=2", "--layers=1", "--width=8", "--batch-size=2", "--device=cpu"]


def run(*arguments):
    """Returns the exit code, however the command ends."""
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
    for name, default in asdict(demo.Settings()).items():
        assert f"--{name.replace('_', '-')}" in printed
        assert default is None or f"(default: {default})" in printed
    assert "--resume" in printed


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
    "misspelt schedule": ["demo", "--schedule", "cosin"],
    "rate that is no number": ["demo", "--lr", "nan"],
    "negative steps": ["demo", "--steps", "-3"],
    "unknown dtype": ["demo", "--dtype", "int8"],
    "unknown device": ["demo", "--device", "tpu"],
    "missing text": ["demo", "--text", "{folder}/missing"],
    "folder as text": ["demo", "--text", "{folder}"],
    "short text": ["demo", "--text", "{folder}/short"],
    "file as folder": ["demo", *TINY, "--out", "{folder}/short/out"],
    "nothing to resume": ["demo", "--resume", "--out", "{folder}/missing"],
    "too much memory": ["demo", "--width", "100000", "--out", "{folder}/out"],
    "file as output folder": ["demo", *TINY, "--out", "{folder}/short"],
    "folder that nobody can make": ["demo", *TINY, "--out", "/proc/nowhere/out"],
    "unknown schedule to plot": ["plot", "steep"],
    "folder as picture": ["plot", "linear", "-o", "{folder}/folder.png"],
    "file of an unknown kind": ["plot", "linear", "-o", "{folder}/picture.gifx"],
    "rate that is no number to plot": ["plot", "linear", "--lr", "nan"],
    "argument that is no number": ["plot", "greedy", "--set", "factor=nan"],
}


def out_of_memory(*sizes):
    # The message of torch's allocator for the CPU.
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence(arguments, tmp_path, capsys, monkeypatch):
    if "100000" in arguments:  # a machine that has the memory must not try
        monkeypatch.setattr(training, "GPT", out_of_memory)
    (tmp_path / "short").write_text("short")
    (tmp_path / "folder.png").mkdir()
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


def test_an_interrupted_demo_names_the_command_that_resumes_it(monkeypatch, capsys):
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


@pytest.mark.slow
def test_resuming_keeps_the_options_that_are_not_given(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert run("demo", *TINY, "--seed=7", "--out", out) == 0
    assert run("demo", "--resume", "--steps=3", "--out", out) == 0
    with open(os.path.join(out, "metrics.jsonl")) as file:
        assert [json.loads(line)["step"] for line in file] == [1, 1, 2, 2, 3, 3]
    assert run("demo", "--resume", "--width=16", "--out", out) == 2
    assert "width was 8 in the checkpoint, now 16" in capsys.readouterr().err


@pytest.mark.slow
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
    """Two devices, the second a GPU without triton."""

    def import_module(name):
        if name == "triton":
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(info, "import_module", import_module)
    monkeypatch.setattr(info.backends, "has_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert ["triton", "not", "installed"] in map(str.split, printed.splitlines())
    assert printed.splitlines()[-1].split() == ["cuda:0", "NVIDIA", "H200", "eager"]


def in_a_process(*arguments, code=None, before="", stdout=subprocess.PIPE, **environment):
    """Runs the command in a process of its own, as a shell does."""
    path = os.pathsep.join(filter(None, (before, str(ROOT), str(ROOT / "kernels"))))
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, *(["-c", code] if code else ["-m", "fusedopt"]), *arguments]
    return subprocess.run(command, env=variables, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)


def test_a_misspelt_schedule_is_answered_with_the_nearest(capsys):
    assert run("demo", "--schedule", "cosin") == 2
    assert "did you mean 'cosine'?" in capsys.readouterr().err
    assert run("plot", "lineal") == 2
    assert "did you mean 'linear'?" in capsys.readouterr().err


def test_ctrl_c_while_torch_is_imported_is_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = in_a_process("info", before=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fusedopt: interrupted\n")


@pytest.mark.slow
def test_the_package_is_imported_when_a_name_is_asked_for():
    code = (
        "import sys, fusedopt; assert fusedopt.__version__ and 'torch' not in sys.modules;"
        "assert 'AdamW' in dir(fusedopt); assert fusedopt.AdamW and 'torch' in sys.modules;"
        "assert fusedopt.schedules.LinearSchedule is fusedopt.LinearSchedule;"
        "from fusedopt import *; assert Adafactor is fusedopt.Adafactor and __version__;"
        "assert not hasattr(fusedopt, 'SGD')"
    )
    done = in_a_process(code=code)
    assert done.returncode == 0, done.stderr
    assert set(fusedopt.__all__) <= set(dir(fusedopt))


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of posix")
class TestOutputThatCannotBeWritten:
    @pytest.mark.slow
    def test_the_reader_has_closed_the_pipe(self):
        """As in `fusedopt --help | head -1`, where the reader closes the pipe at once."""
        read, write = os.pipe()
        os.close(read)
        try:
            done = in_a_process("--help", stdout=write)
        finally:
            os.close(write)
        assert (done.returncode, done.stderr) == (141, "")

    @pytest.mark.slow
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
    @pytest.mark.parametrize("arguments", [["--help"], ["info"]], ids=" ".join)
    def test_the_output_goes_to_a_full_disk(self, arguments):
        with open("/dev/full", "w") as full:
            done = in_a_process(*arguments, stdout=full)
        assert done.returncode == 2
        assert done.stderr.endswith(": cannot write the output: No space left on device\n")
        assert len(done.stderr.splitlines()) == 1

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
    def test_a_picture_goes_to_a_full_disk(self, tmp_path, capsys):
        os.symlink("/dev/full", tmp_path / "full.png")
        assert run("plot", "linear", "-o", str(tmp_path / "full.png")) == 2
        assert f"cannot write {tmp_path / 'full.png'}: No space left" in capsys.readouterr().err
        assert os.listdir(tmp_path) == ["full.png"]
        assert os.path.exists("/dev/full") and not os.path.isfile("/dev/full")

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [100, 20_000, 60_000])
    def test_the_disk_fills_up_during_a_demo(self, limit, tmp_path):
        """Metrics, checkpoint or picture do not fit: one sentence names the file, and no part of it is left."""
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
            "from fusedopt.cli import main; sys.exit(main())"
        )
        out = tmp_path / "out"
        (tmp_path / "text").write_bytes(b"hello " * 400)
        done = in_a_process("demo", *TINY, "--text", str(tmp_path / "text"), "--out", str(out), code=code)
        name = {100: "metrics.jsonl", 20_000: "checkpoint.pt", 60_000: "checkpoint.pt"}[limit]
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == f"fusedopt demo: cannot write {out / name}: File too large"
        assert "Traceback" not in done.stderr
        assert not list(out.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["plot", "linear", "-o", "{folder}/caf\xe9.png"], marks=pytest.mark.slow),
        ["demo", "--text", "caf\xe9"],
    ],
)
def test_an_ascii_terminal_shows_every_output(arguments, tmp_path):
    done = in_a_process(*(word.format(folder=tmp_path) for word in arguments), PYTHONIOENCODING="ascii")
    assert done.returncode == {"plot": 0, "demo": 2}[arguments[0]]
    assert "caf\\xe9" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trained = []
    monkeypatch.setattr(demo, "train", lambda *arguments, **keywords: trained.append(1))
    assert run("demo", *TINY) == 2
    assert capsys.readouterr().err == "fusedopt demo: matplotlib is not installed; run: pip install matplotlib\n"
    assert not trained


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, WAITING), *(({name: "7"}, {name: "7"}) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"))],
    ids=str,
)
def test_threads_sleep_soon_unless_the_environment_says_how_they_wait(given, expected):
    environment = dict(given)
    share_the_cores(environment)
    assert environment == expected


@pytest.mark.slow
def test_only_the_command_line_sets_how_threads_wait(tmp_path, capsys):
    code = "import os, sys; {}; sys.exit('GOMP_SPINCOUNT' in os.environ)"
    variables = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_WAIT_POLICY")}
    variables["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    for program, expected in (
        ("import fusedopt; fusedopt.AdamW; from fusedopt.cli import main; main(['info'])", 0),  # torch is there already
        ("from fusedopt.cli import main; main(['info'])", 1),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(program)], env=variables, stdout=subprocess.DEVNULL, timeout=120
        )
        assert done.returncode == expected, program
    assert run("demo", "--help") == 0
    assert f"GOMP_SPINCOUNT={WAITING['GOMP_SPINCOUNT']}" in capsys.readouterr().out
