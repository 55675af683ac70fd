"""The command `fusedopt info`: what is installed, and what would serve the devices there are."""

import argparse
import platform
from importlib import import_module
from typing import Any

import torch

from fusedopt import backends


def add_info_command(commands: Any) -> None:
    """Adds `info` to the sub-commands of an argument parser."""
    parser = commands.add_parser(
        "info",
        help="print what is installed, which devices there are, and which backend serves each",
        description="Prints what is installed, which devices there are, and which backend serves each.",
    )
    parser.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> None:
    versions = [(name, _version(name)) for name in ("fusedopt", "torch", "triton", "numpy", "matplotlib")]
    for name, version in [*versions, ("python", platform.python_version())]:
        print(f"{name:<12}{version}")
    rows = [("device", "name", "backend")]
    rows += [(str(device), name, backends.choose(device)) for device, name in _devices()]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    print()
    for device, name, backend in rows:
        print(f"{device:<{max(first, 9)}}   {name:<{second}}   {backend}")


def _version(module: str) -> str:
    try:
        return str(import_module(module).__version__)
    except ImportError:
        return "not installed"


def _devices() -> list[tuple[torch.device, str]]:
    threads = torch.get_num_threads()
    found = [(torch.device("cpu"), f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}")]
    for index in range(torch.cuda.device_count()):
        found.append((torch.device("cuda", index), torch.cuda.get_device_name(index)))
    return found
