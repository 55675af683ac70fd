"""`python -m perf.evidence --out DIR --minutes M`: everything there is to learn from a GPU machine, in bounded time.

Runs from a bare checkout (`PYTHONPATH=.:kernels`) without a package registry. Each part is a process of its own, so
that a fault in one of them, which costs it the device, costs the others nothing; each writes before the next starts.
In DIR: `results.jsonl` and `sweeps.jsonl` (measurements), `static.jsonl` (registers, spills, bytes), `log.txt` (all
output), `summary.json` (what ran, how it ended, how long it took), `report.md` and `performance.png`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from perf.results import ROOT

RESERVE = 10.0
"""Seconds kept for the report at the end."""


class Part(NamedTuple):
    """One process.

    Attributes:
        name: in the summary.
        command: "{python}", "{out}" and "{seconds}" (what it may plan for) are filled in.
        seconds: most time it gets.
        tool: a program without which the part is left out.
        enough: least seconds left for the part to be worth starting.
    """

    name: str
    command: str
    seconds: float
    tool: str | None = None
    enough: float = 15.0


_METRICS = ",".join(
    (
        "gpu__time_duration.sum",
        "dram__bytes_read.sum",
        "dram__bytes_write.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__warps_active.avg.pct_of_peak_sustained_active",
        "launch__registers_per_thread",
    )
)
_NCU = "ncu --clock-control none --profile-from-start off --csv --metrics " + _METRICS + " {python} -m perf.one_step"
_SANITIZE = "compute-sanitizer --error-exitcode 1 --tool {tool} {{python}} -m perf.one_step smoke {rule}"
_BENCH = "{python} -m perf.bench --out {out}/results.jsonl --seconds {seconds}"

GPU_PARTS = (
    Part("steps on the device", "{python} -m perf.one_step smoke adamw", 60),
    Part("tests that need a GPU", "{python} -m pytest -q -x -m gpu tests", 120),
    Part("benchmarks", f"{_BENCH} --plan cuda", 330),
    Part("static report", "{python} -m perf.static_report --out {out}/static.jsonl", 90),
    Part("sweeps", "{python} -m perf.sweeps --out {out}/sweeps.jsonl --seconds {seconds}", 180),
    Part("kernel tests on the device", "{python} -m pytest -q -m 'not gpu' tests -k 'triton or kernel'", 150),
    Part("more benchmarks", f"{_BENCH} --plan cuda-rest", 300),
    Part("compiled eager loops", f"{_BENCH} --plan cuda-compiled", 400, enough=120.0),
    Part("memcheck", _SANITIZE.format(tool="memcheck", rule="adamw"), 60, "compute-sanitizer"),
    Part("memcheck, adafactor", _SANITIZE.format(tool="memcheck", rule="adafactor"), 60, "compute-sanitizer"),
    Part("racecheck, adafactor", _SANITIZE.format(tool="racecheck", rule="adafactor"), 90, "compute-sanitizer"),
    Part("counters", f"{_NCU} gpt2 adamw", 60, "ncu"),
    Part("counters, adafactor", f"{_NCU} gpt2 adafactor", 60, "ncu"),
    Part("counters, bfloat16", f"{_NCU} llama_1g:bfloat16 adamw", 60, "ncu"),
)
"""In the order of their importance: what is not reached in time is what is missed least."""

_SMOKE = "--smoke --backend triton --workloads smoke --providers 'fusedopt;torch fused'"

SMOKE_PARTS = (
    Part("steps on the device", "{python} -m perf.one_step smoke adamw", 60),
    Part("benchmarks", f"{{python}} -m perf.bench --out {{out}}/results.jsonl {_SMOKE}", 60),
    Part(
        "static report", "env -u TRITON_INTERPRET {python} -m perf.static_report --out {out}/static.jsonl --smoke", 60
    ),
    Part("sweeps", "{python} -m perf.sweeps --out {out}/sweeps.jsonl --smoke --backend triton", 60),
    Part("counters", f"{_NCU} smoke adamw", 60, "no-such-profiler"),
)
"""The same road, a few steps long: runs on any machine, in Triton's interpreter where there is no GPU."""


def run(parts: Sequence[Part], out: Path, minutes: float) -> list[dict[str, object]]:
    """Runs parts until the time is over, and returns the summary, which it rewrites after each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes - RESERVE
    summary: list[dict[str, object]] = []
    for part in parts:
        left = end - time.monotonic()
        if part.tool and not shutil.which(part.tool):
            outcome, seconds = f"left out: {part.tool} is not there", 0.0
        elif left < part.enough:
            outcome, seconds = "left out: no time was left", 0.0
        else:
            start = time.monotonic()
            outcome = _run(part, out, min(part.seconds, left))
            seconds = time.monotonic() - start
        summary.append({"part": part.name, "outcome": outcome, "seconds": round(seconds, 1)})
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{part.name}: {outcome} ({seconds:.0f} s)", flush=True)
    return summary


def _run(part: Part, out: Path, seconds: float) -> str:
    # Some time goes to imports and compilation, which the part itself does not plan for.
    command = part.command.format(python=sys.executable, out=out, seconds=int(max(5, 0.75 * seconds - 15)))
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    with (out / "log.txt").open("a") as log:
        log.write(f"\n$ {command}\n")
        log.flush()
        process = subprocess.Popen(
            command, shell=True, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"stopped after {seconds:.0f} s"
        except BaseException:
            _end(process)
            raise
    return "done" if code == 0 else f"failed with exit code {code}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a part and what it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def report(out: Path) -> str:
    """Tables of everything in a folder of evidence, and the picture beside them."""
    from perf import pictures, results
    from perf import report as reports

    text = ["# What was measured", "```", (out / "summary.json").read_text().strip(), "```"]
    for name in ("results.jsonl", "sweeps.jsonl"):
        if (out / name).exists():
            records = results.read(out / name)
            text += [f"## {name}", reports.text(records, markdown=True)]
            if name == "results.jsonl" and any(r.get("status") == "measured" for r in records):
                pictures.steps(records).savefig(out / "performance.png", dpi=130)
    written = "\n\n".join(text) + "\n"
    (out / "report.md").write_text(written)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="the same road with tiny tensors, without a GPU too")
    options = parser.parse_args(arguments)
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not options.smoke:
        parser.error("there is no GPU here; --smoke runs every part on tiny tensors, `make bench` measures the CPU")
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    summary = run(SMOKE_PARTS if options.smoke else GPU_PARTS, options.out.resolve(), options.minutes)
    try:
        report(options.out)
    except Exception as error:  # The measurements are written; a picture must not turn them into a failure.
        print(f"no report: {type(error).__name__}: {error}")
    return 0 if all(str(s["outcome"]).startswith(("done", "left out")) for s in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
