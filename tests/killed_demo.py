"""Kills `fusedopt demo` at random moments, resumes it, and compares what it leaves with an uninterrupted run's.

    python tests/killed_demo.py KILLS [SEED]

Each run is a process of its own, forked from this one, which has everything imported. Every other kill comes while a
checkpoint is being written, the others at any time. A run is resumed, and killed again, until it has reached its end.
"""

import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from helpers.comparing import assert_same

from fusedopt import cli
from fusedopt.demo.checkpoint import load_checkpoint
from fusedopt.demo.settings import CHECKPOINT, METRICS, PICTURE

STEPS = 12
OPTIONS = f"--steps={STEPS} --checkpoint-every=1 --layers=1 --width=16 --batch-size=2 --device=cpu".split()
LEFT_BY_A_RUN = {CHECKPOINT, METRICS, PICTURE}
BEING_WRITTEN = {f"{name}.tmp" for name in LEFT_BY_A_RUN}


def start(out: Path, *options: str) -> int:
    """Returns the id of a new process that runs the demo."""
    child = os.fork()
    if child == 0:
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os._exit(cli.main(["demo", f"--out={out}", *options]))
        finally:
            os._exit(99)
    return child


def version(path: Path) -> tuple[int, int] | None:
    """Returns what tells a file from what was there before under its name; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def end(child: int) -> int:
    """Waits for a process; returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def options_for(out: Path, text: Path) -> list[str]:
    """Those of a new run, or of one that goes on from its checkpoint."""
    return ["--resume"] if (out / CHECKPOINT).exists() else [*OPTIONS, f"--text={text}"]


def kill(out: Path, options: list[str], comes: Callable[[float], bool]) -> bool:
    """Kills a run as soon as `comes(seconds since its start)`; returns False if it ended before."""
    child, began = start(out, *options), time.monotonic()
    while not comes(time.monotonic() - began):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0, out.with_suffix(".log").read_text()
            return False
        time.sleep(1e-4)  # and leave the processor to it
    os.kill(child, signal.SIGKILL)
    return end(child) == -signal.SIGKILL


def check(out: Path) -> None:
    """Asserts that a killed run has left a checkpoint that can be loaded, and no file that the next one would leave."""
    names = set(os.listdir(out)) if out.exists() else set()
    assert names <= LEFT_BY_A_RUN | BEING_WRITTEN, f"a killed run left {names}"
    steps = 0
    if METRICS in names:  # The last line may be torn.
        steps = max((json.loads(line)["step"] for line in (out / METRICS).read_bytes().splitlines()[:-1]), default=0)
    if CHECKPOINT in names:
        assert load_checkpoint(out / CHECKPOINT)["step"] >= steps - 1
    else:
        assert steps <= 1, f"the checkpoint of step {steps - 1} is missing"


def content(out: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The weights and states of a run's checkpoint, and its records but for times."""
    lines = (out / METRICS).read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "optimizer_ms"} for line in lines]
    return load_checkpoint(out / CHECKPOINT)["runs"], records


def main(kills: int, seed: int) -> None:
    chance = random.Random(seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_bytes(b"".join(b"%d green bottles hanging on the wall; " % (n % 7) for n in range(100)))
        straight = Path(folder) / "straight"
        with redirect_stdout(None), redirect_stderr(io.StringIO()):  # in this process: what it imports, all others have
            assert cli.main(["demo", f"--out={straight}", *options_for(straight, text)]) == 0
        expected = content(straight)
        began = time.monotonic()
        assert not kill(straight, [*OPTIONS, f"--text={text}"], lambda passed: False)
        duration = time.monotonic() - began

        done = writing = runs = 0
        while done < kills:
            out, runs = Path(folder) / f"run{runs}", runs + 1
            while done < kills:
                temporary, moment = out / f"{CHECKPOINT}.tmp", chance.uniform(0.0, duration)
                old = None, version(temporary)  # an earlier kill may have left one
                at_a_write = done % 2 == 1
                later = chance.uniform(0.0, 0.5 * duration)

                def comes(passed: float) -> bool:
                    return passed > later and version(temporary) not in old if at_a_write else passed > moment  # noqa: B023

                if not kill(out, options_for(out, text), comes):
                    break
                done += 1
                writing += version(temporary) not in old
                check(out)
                print(f"\r{done} of {kills} kills, {writing} of them in a write", end="", file=sys.stderr, flush=True)
            assert end(start(out, *options_for(out, text))) == 0, out.with_suffix(".log").read_text()
            assert set(os.listdir(out)) == LEFT_BY_A_RUN, f"a resumed run left {os.listdir(out)}"
            assert_same(content(out), expected)
        print(file=sys.stderr)
        print(json.dumps({"kills": done, "in a write": writing, "runs": runs, "seed": seed}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
