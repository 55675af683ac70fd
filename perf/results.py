"""Results are JSON lines: first what the machine and the software are, then one record per measurement."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "perf" / "results"
"""One folder per GPU, with the files that `python -m perf.evidence` wrote there, and one for the CPU."""


def environment(device: torch.device) -> Record:
    """Returns the first record of a file: date, commit, versions, processor and, on a GPU, its name and driver."""
    others = ("timm", "torch-optimi", "flashoptim", "torchao", "bitsandbytes", "transformers")
    record: Record = {
        "kind": "environment",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "device": device.type,
        "others": {name: version for name in others if (version := _version(name))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
        record |= {"multiprocessors": properties.multi_processor_count}
        record |= {"l2_bytes": getattr(properties, "L2_cache_size", None)}
        record |= {"driver": driver and driver.splitlines()[0], "cuda": torch.version.cuda or torch.version.hip}
    return record


def machine(record: Record) -> str:
    """Returns one line that says where a record's numbers come from.

    Example:
        >>> machine({"cpu": "A CPU", "threads": 2, "torch": "2.13.0", "date": "2026-01-01", "commit": "abc"})
        'A CPU, 2 threads, torch 2.13.0, 2026-01-01, commit abc'
    """
    gpu = record.get("gpu")
    parts = [gpu or f"{record['cpu']}, {record['threads']} threads", f"torch {record['torch']}"]
    parts += [f"triton {record['triton']}"] if gpu else []
    parts += [f"driver {record['driver']}"] if record.get("driver") else []
    return ", ".join([*parts, record["date"], *([f"commit {record['commit']}"] if record.get("commit") else [])])


def write(records: Iterable[Record], file: TextIO) -> None:
    """Appends records and hands them to the operating system, so that what is measured is not lost."""
    for record in records:
        file.write(json.dumps(record) + "\n")
    file.flush()


def read(path: Path) -> list[Record]:
    """Returns the records of a file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def committed() -> dict[str, list[Record]]:
    """Returns the committed results of GPUs: name of the folder to the records in its `results.jsonl`."""
    found = {path.parent.name: read(path) for path in sorted(COMMITTED.glob("*/results.jsonl"))}
    return {name: records for name, records in found.items() if records and records[0].get("gpu")}


def _commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "fusedopt", "kernels")
    return commit and commit + " with changes" * bool(changed)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
