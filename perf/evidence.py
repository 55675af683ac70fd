"""`python -m perf.evidence --out DIR --minutes M`: everything there is to learn from a GPU machine, in bounded time.

Runs from a bare checkout (`PYTHONPATH=.:kernels`) without a package registry. Each part is a process of its own, so
that a fault in one of them, which costs it the device, costs the others nothing. What only checks runs side by side,
and is over before anything is measured.

In DIR: `results.jsonl` and `sweeps.jsonl` (measurements), `static.jsonl` (registers, spills, bytes),
`counters.jsonl` (bytes that the hardware counted), `low_precision.jsonl` (weight decay in bfloat16), `parts.jsonl`
(what ran, how it ended, how long it took), `log.txt` (all output), `report.md` and `performance.png`.
"""

import argparse
import asyncio
import glob
import importlib.util
import itertools
import os
import shlex
import shutil
import signal
import site
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from perf import counters, results
from perf.results import ROOT, Record


class Part(NamedTuple):
    """One process. It is left out if the first word of its command is not a program on this machine, see `program`."""

    name: str
    command: str  # "{python}", "{out}" and "{seconds}" (what it may plan for) are filled in
    seconds: float  # most time it gets
    enough: float = 15.0  # least seconds left for the part to be worth starting
    checks: bool = False  # True if it measures no time: neighbours that only check run at the same time


_BENCH = "{python} -m perf.bench --seconds {seconds} --out {out}"
_ONCE = "{python} -m perf.bench --once"


def _counted(workload: str, rule: str) -> str:
    """Returns a step under ncu."""
    rule = shlex.quote(rule)
    step = f"{_ONCE} --workloads {workload} --rules {rule}"
    ncu = f"ncu --clock-control none --profile-from-start off --csv --metrics {','.join(counters.METRICS)} {step}"
    return f"{ncu} | {{python}} -m perf.counters --workload {workload} --rule {rule} --out {{out}}/counters.jsonl"


def _checked(tool: str, rule: str) -> str:
    """Returns a step under a tool of compute-sanitizer.

    Without torch's cache every tensor is an allocation of its own, whose borders and contents the tool knows.
    """
    step = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {_ONCE} --workloads smoke,smoke:bfloat16 --rules {shlex.quote(rule)}"
    return f"compute-sanitizer --error-exitcode 1 --target-processes all --tool {tool} {step}"


_CHECKED_RULES = ("adamw", "adamw, clipped", "adafactor", "lion")
SANITIZERS = {"memcheck": 60, "racecheck": 90, "initcheck": 60}
"""The tools of compute-sanitizer, with most seconds for each rule: accesses out of bounds, races in shared memory, and
reads of what nothing has written."""

_TOOLKITS = ("{root}/nvidia/*/bin", "{root}/triton/backends/nvidia/bin", "{cuda}/bin", "/usr/local/cuda*/bin")
"""Where programs of the CUDA toolkit are that are not on the path: in wheels, and where the toolkit is installed."""

_PYTEST = "{python} -m pytest -q --tb=short -p no:cacheprovider"
_WORKERS = " -n 8" * (importlib.util.find_spec("xdist") is not None)
_ONE_PROCESS = f"{_PYTEST} tests/test_one_process.py"
_STATIC = "{python} -m perf.static_report --out {out}/static.jsonl"

GPU_PARTS = (
    Part("steps on the device", f"{_ONCE} --workloads smoke", 60),
    Part("tests that need a GPU", f"{_PYTEST}{_WORKERS} -m gpu tests", 150, checks=True),
    Part("NCCL on one process", _ONE_PROCESS, 60, checks=True),
    Part(
        "kernel tests on the device", f"{_PYTEST}{_WORKERS} -m 'not gpu' tests -k 'triton or kernel'", 180, checks=True
    ),
    Part("weight decay in bfloat16", "{python} -m perf.decay --out {out}/low_precision.jsonl", 120, checks=True),
    *(
        Part(f"{tool}, {rule}", _checked(tool, rule), seconds, checks=True)
        for tool, seconds in SANITIZERS.items()
        for rule in _CHECKED_RULES
    ),
    Part("benchmarks", f"{_BENCH}/results.jsonl --plan cuda", 330),
    Part("counters", _counted("gpt2", "adamw"), 60),
    Part("counters, adafactor", _counted("gpt2", "adafactor"), 60),
    Part("counters, bfloat16", _counted("llama_1g:bfloat16", "adamw"), 60),
    Part("sweeps", f"{_BENCH}/sweeps.jsonl --plan sweeps", 180),
    Part("more benchmarks", f"{_BENCH}/results.jsonl --plan cuda-rest", 300),
    Part("compiled eager loops", f"{_BENCH}/results.jsonl --plan cuda-compiled", 400, enough=120.0),
    Part("static report", _STATIC, 90),
)
"""In the order of their importance: what is not reached in time is what is missed least."""

_INTERPRETED = "--device cpu --backend triton"

SMOKE_PARTS = (
    Part("steps on the device", f"env TRITON_INTERPRET=1 {_ONCE} --workloads smoke {_INTERPRETED}", 60),
    Part("benchmarks", f"env TRITON_INTERPRET=1 {_BENCH}/results.jsonl --plan smoke {_INTERPRETED} --seconds 0", 60),
    Part("static report", f"{_STATIC} --smoke", 60),
    Part("a process group of one process", _ONE_PROCESS, 60),
)
"""The same road, a few steps long: runs on any machine, in Triton's interpreter."""

SECONDS_TO_END = 20.0
"""For a part that is stopped: pytest names the tests that have failed."""

REPORT = Part(
    "report",
    "{python} -m perf.report {out}/*.jsonl --markdown --picture {out}/performance.png > {out}/report.md",
    seconds=20,
)
"""At the end, in time that is kept for it."""


def run(parts: Sequence[Part], out: Path, minutes: float) -> list[Record]:
    """Runs parts until the time is over, and returns what came of them, which it writes after each."""
    return asyncio.run(_all(parts, out, time.monotonic() + 60 * minutes))


async def _all(parts: Sequence[Part], out: Path, end: float) -> list[Record]:
    found: list[Record] = []
    for _, group in itertools.groupby(parts, key=lambda part: part.checks or part.name):
        found += await asyncio.gather(*(_run(part, out, end) for part in group))
    return found


async def _run(part: Part, out: Path, end: float) -> Record:
    start = time.monotonic()
    left = end - start
    tool, _, words = part.command.partition(" ")
    tool = tool.format(python=sys.executable)
    path = program(tool)
    if path is None:
        outcome = f"left out: {tool} is not there"
    elif left < part.enough:
        outcome = "left out: no time was left"
    else:
        outcome = await _process(part._replace(command=f"{path} {words}"), out, min(part.seconds, left))
    record = {"kind": "part", "part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    results.append(out / "parts.jsonl", [record])
    print(f"{part.name}: {outcome} ({record['seconds']:.0f} s)", flush=True)
    return record


def program(name: str) -> str | None:
    """Returns the path of a program: on the path, in a wheel, or in a CUDA toolkit; None if it is not there."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    roots = [*filter(None, sys.path), *site.getsitepackages()]
    folders = dict.fromkeys(folder.format(root=root, cuda=cuda) for folder in _TOOLKITS for root in roots)
    files = (file for folder in folders for file in sorted(glob.glob(f"{folder}/{name}")))
    return next(filter(None, map(shutil.which, itertools.chain([name], files))), None)


async def _process(part: Part, out: Path, seconds: float) -> str:
    """Returns how the process ended, which gets no more than these seconds; adds to the log what it printed."""
    # Some time goes to imports and compilation, which the part itself does not plan for.
    command = part.command.format(python=sys.executable, out=out, seconds=int(max(5, 0.75 * seconds - 15)))
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)  # kernels run on the device, and are compiled for others
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as printed:
        process = await asyncio.create_subprocess_shell(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=printed, start_new_session=True
        )
        try:
            code = await asyncio.wait_for(process.wait(), seconds)
        except asyncio.TimeoutError:
            await _interrupted(process)
            return f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the part and what it started
            await process.wait()
            printed.seek(0)
            with (out / "log.txt").open("ab") as log:
                log.write(f"\n$ {command}\n".encode() + printed.read())
    return "done" if code == 0 else f"failed with exit code {code}"


async def _interrupted(process: asyncio.subprocess.Process) -> None:
    """Lets a process say what it has found so far."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), SECONDS_TO_END)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", metavar="PART", choices=[p.name for p in GPU_PARTS], help="only these")
    parser.add_argument("--smoke", action="store_true", help="the same road with tiny tensors, without a GPU too")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke runs every part on tiny tensors, `make bench` measures the CPU")
    out = options.out.resolve()
    parts = SMOKE_PARTS if options.smoke else GPU_PARTS
    chosen = [part for part in parts if options.parts is None or part.name in options.parts]
    outcomes = run(chosen, out, options.minutes - REPORT.seconds / 60)
    run([REPORT], out, REPORT.seconds / 60)  # If it fails, the measurements are there all the same.
    return 0 if all(outcome["outcome"].startswith(("done", "left out")) for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
