"""A disk that is full, or may not be written to: a sentence names the file, the old one is as it was, no part left."""

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loops import Net, train

from fusedopt import AdamW, cli, files
from fusedopt.demo.settings import CHECKPOINT, METRICS, PICTURE
from fusedopt.statistics.recorder import StatisticsRecorder

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = ["demo", "--steps=2", "--batch-size=2", "--layers=1", "--width=8", "--device=cpu", "--checkpoint-every=1"]


def plot(folder: Path) -> None:
    refuse(cli.main(["plot", "linear", "-o", str(folder / "linear.png")]))


def plot_as_text(folder: Path) -> None:
    refuse(cli.main(["plot", "linear", "-o", str(folder / "linear.svg")]))


def verify(folder: Path) -> None:
    refuse(cli.main(["plot", "linear", "--verify", "--training-steps=10", "-o", str(folder / "verify.png")]))


def run_the_demo(folder: Path) -> None:
    refuse(cli.main([*DEMO, f"--out={folder}"]))


def resume_the_demo(folder: Path) -> None:
    refuse(cli.main(["demo", "--resume", "--steps=3", f"--out={folder}"]))


def draw_statistics(folder: Path) -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), track_statistics=True)
    recorder = StatisticsRecorder(optimizer)
    train(model, optimizer, 2)
    recorder.plot(folder / "statistics.png")


def keep_results(folder: Path) -> None:
    from perf import results

    results.append(folder / "results.jsonl", [{"name": "x" * 3000}] * 3)


def fill_a_page(folder: Path) -> None:
    files.write_text(folder / "page.md", "numbers\n" * 1000)


def refuse(code: int) -> None:
    """Raises OSError for the exit code of a command that could not write."""
    assert code in (0, 2)
    if code:
        raise OSError


# What writes files, and which; those that a command has to find there before come from `run_the_demo`.
WRITERS: dict[Callable[[Path], None], tuple[str, ...]] = {
    plot: ("linear.png",),
    plot_as_text: ("linear.svg",),
    verify: ("verify.png",),
    run_the_demo: (METRICS, CHECKPOINT, PICTURE),
    resume_the_demo: (METRICS, CHECKPOINT, PICTURE),
    draw_statistics: ("statistics.png",),
    keep_results: ("results.jsonl",),
    fill_a_page: ("page.md",),
}

# A command answers with exit code 2 and a sentence, a function with an OSError that names the file.
COMMANDS = (plot, plot_as_text, verify, run_the_demo, resume_the_demo)

QUICK = (plot_as_text, run_the_demo, keep_results, fill_a_page)

every_writer = pytest.mark.parametrize(
    "write",
    [pytest.param(write, marks=[] if write in QUICK else pytest.mark.slow) for write in WRITERS],
    ids=lambda write: write.__name__,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


def prepare(write: Callable[[Path], None], folder: Path) -> dict[str, bytes]:
    """Puts old files where new ones go; returns their contents."""
    if write is resume_the_demo:
        run_the_demo(folder)
    else:
        for name in WRITERS[write]:
            (folder / name).write_bytes(b"old\n")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def fails(write: Callable[[Path], None], folder: Path, capsys: Any) -> bool:
    """Returns whether it could not write, which it has said in a sentence with the name of the file."""
    capsys.readouterr()
    try:
        write(folder)
    except OSError as error:
        said = capsys.readouterr().err.splitlines()[-1] if write in COMMANDS else str(error)
        assert any(str(folder / name) in said for name in WRITERS[write]), said
        assert "Traceback" not in said
        return True
    return False


def check(write: Callable[[Path], None], folder: Path, before: dict[str, bytes]) -> None:
    """Asserts that each file is the old one or a whole new one, and that there are no others."""
    after = contents(folder)
    assert after.keys() <= {*before, *WRITERS[write]}
    for name, content in after.items():
        if content == before.get(name):
            continue
        if name == CHECKPOINT:
            torch.load(folder / name, weights_only=True)
        elif name == METRICS:  # It grows line by line.
            assert content in (b"",) or content.endswith(b"}\n")
        else:
            assert content.endswith((b"IEND\xaeB`\x82", b"</svg>\n", b"numbers\n", b'"}\n')), (
                f"a part of {name} is left"
            )


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may become larger, as if the disk were full."""
    import resource

    tempfile.gettempdir()  # Python writes a file to find it; what torch imports later asks for it
    before, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, action)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of files")
@every_writer
def test_a_disk_that_fills_up(write, folder, capsys):
    before = prepare(write, folder)
    failed = 0
    for size in (0, 1, 4096, 9000, 33_000):
        with room_for(size):
            failed += fails(write, folder, capsys)
        check(write, folder, before)
        if write is resume_the_demo and CHECKPOINT in contents(folder):
            assert contents(folder)[CHECKPOINT] == before[CHECKPOINT] or size > 4096
    assert failed >= 2
    assert not fails(write, folder, capsys)
    check(write, folder, before)


@pytest.mark.slow
@every_writer
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_the_last_moment(write, call, folder, capsys, monkeypatch):
    """Some file systems find room for what was written only when it has to reach the disk."""
    if write is keep_results:
        pytest.skip("it adds to a file, and waits for no disk")
    before = prepare(write, folder)
    real, at = getattr(os, call), 0
    while True:
        calls = iter(range(10**6))

        def sometimes(*arguments: Any) -> Any:
            if next(calls) == at:  # noqa: B023
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, sometimes)
            failed = fails(write, folder, capsys)
        check(write, folder, before)
        if not failed:
            break
        at += 1
        if write is resume_the_demo:
            for name in os.listdir(folder):
                (folder / name).unlink()
            for name, content in before.items():
                (folder / name).write_bytes(content)
    assert at >= 1


@every_writer
@pytest.mark.parametrize(
    "kind", ["a file in the place of the folder", "a folder in the place of the file", "read-only"]
)
def test_a_place_that_cannot_be_written_to(write, kind, folder, tmp_path, capsys, monkeypatch):
    before = {} if kind != "read-only" and write is not resume_the_demo else prepare(write, folder)
    if kind == "a folder in the place of the file":
        if write is resume_the_demo:
            pytest.skip("there is no checkpoint to go on from")
        for name in WRITERS[write]:
            (folder / name).mkdir()
        assert fails(write, folder, capsys)
        assert set(os.listdir(folder)) == set(WRITERS[write])
    elif kind == "read-only":
        real: Any = open

        def read_only(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(file, (str, Path)) and str(file).startswith(str(folder)) and set(mode) & set("wa+x"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
            return real(file, mode, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", read_only)
            patch.setattr("io.open", read_only)
            assert fails(write, folder, capsys)
        assert contents(folder) == {name: c for name, c in before.items() if name in os.listdir(folder)}
        if write is not run_the_demo:  # A new run takes the checkpoint of an earlier one away first.
            assert contents(folder) == before
    else:
        place = tmp_path / "file"
        place.write_bytes(b"old")
        if write is resume_the_demo:
            pytest.skip("there is no checkpoint to go on from")
        with pytest.raises((OSError, AssertionError)):
            write(place)
        assert place.read_bytes() == b"old"


def test_a_folder_that_cannot_be_brought_to_the_disk_is_no_error(tmp_path, monkeypatch):
    """On some network file systems a folder has no fsync, and a folder may be one that nobody may read."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"first\n")
    with open(path, "ab", buffering=0) as file:
        with room_for(9), pytest.raises(OSError, match="File too large") as caught:
            files.append(file, b"second\n")
        files.append(file, b"third\n")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"first\nthird\n"
