"""Results are JSON lines: first what the machine and the software are, then one record per measurement."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fusedopt import files

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "perf" / "results"
"""One folder per GPU, with the files that `python -m perf.evidence` wrote there, and one for the CPU."""

OTHERS = ("timm", "torch-optimi", "flashoptim", "torchao", "bitsandbytes", "transformers")
"""Packages whose optimizers are measured, where they are installed."""


def environment(device: torch.device) -> Record:
    """Returns the first record of a file: date, commit, versions, processor and, on a GPU, its name and driver."""
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    record: Record = {
        "kind": "environment",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed.get("triton"),
        "cpu": (_output("grep", "-m1", "model name", "/proc/cpuinfo") or platform.machine()).rpartition(": ")[2],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _busy_cores(),
        "device": device.type,
        "others": {name: installed[name] for name in OTHERS if name in installed},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": _output("nvidia-smi", "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return record


def machine(record: Record) -> str:
    """Returns one line that says where a record's numbers come from.

    Example:
        >>> machine({"cpu": "A CPU", "threads": 2, "torch": "2.13.0", "date": "2026-01-01", "commit": "abc"})
        'A CPU, 2 threads, torch 2.13.0, 2026-01-01, commit abc'
    """
    gpu = record.get("gpu")
    versions = ("torch", "triton", "driver") if gpu else ("torch",)
    parts = [gpu or f"{record['cpu']}, {record['threads']} threads"]
    parts += [f"{name} {record[name]}" for name in versions if record.get(name)]
    return ", ".join([*parts, record["date"], *([f"commit {record['commit']}"] if record.get("commit") else [])])


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds records to a file, so that what is measured is not lost with what comes after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        files.append(file, "".join(json.dumps(record) + "\n" for record in records).encode())


def read(path: Path) -> list[Record]:
    """Returns the records of a file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Run:
    """Records, by what they are of."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        head = next(iter(self.of("environment")), None)
        self.machine = machine(head) if head else ""
        self.device: str = head["device"] if head else "cpu"
        # The best copy, in bytes per second.
        self.bandwidth: float | None = max((r["bytes_per_second"] for r in self.of("copy")), default=None)
        # Steps by workload and rule or sweep, in the order of their measurement.
        self.comparisons: dict[tuple[str, str], list[Record]] = {}
        for r in self.of("step"):
            self.comparisons.setdefault((r["workload"], str(r.get("sweep", r["rule"]))), []).append(r)

    @property
    def bandwidth_line(self) -> str:
        """The ceiling of the run, in words."""
        return f"roofline: {(self.bandwidth or 0.0) / 1e9:.1f} GB/s, bytes read plus bytes written"

    def of(self, kind: str) -> list[Record]:
        return [r for r in self.records if r.get("kind") == kind]

    def floor_ms(self, step: Record) -> float | None:
        """Returns the time in which the best copy moves the fewest bytes of this update; None if there was no copy."""
        return step["floor_bytes"] * step["params"] / self.bandwidth * 1e3 if self.bandwidth else None


def _commit() -> str | None:
    """Returns what git says, or the variable COMMIT where it is set, for a tree without its repository."""
    if named := os.environ.get("COMMIT"):
        return named
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "fusedopt", "kernels")
    return commit and commit + " with changes" * bool(changed)


def _busy_cores(seconds: float = 0.5) -> float | None:
    """Returns how many cores programs keep busy at present; None where there is no /proc/stat."""
    if not (stat := Path("/proc/stat")).exists():
        return None

    def ticks() -> list[int]:
        return list(map(int, stat.read_text().split(maxsplit=8)[1:8]))  # user, nice, system, idle, waiting, interrupts

    before = ticks()
    time.sleep(seconds)
    passed = [now - then for now, then in zip(ticks(), before)]
    busy = sum(passed) - passed[3] - passed[4]
    return round((os.cpu_count() or 1) * busy / max(1, sum(passed)), 1)


def _output(*command: str) -> str | None:
    """Returns the output of a command, or None if it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
