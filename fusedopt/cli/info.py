"""The command `fusedopt info`: versions, devices, and the backend that serves each."""

import argparse
import platform
from importlib import import_module
from typing import Any

import torch

from fusedopt import backends
from fusedopt.columns import aligned


def add_info_command(commands: Any) -> None:
    """Adds `info` to the sub-commands of an argument parser."""
    parser = commands.add_parser(
        "info",
        help="print what is installed, which devices there are, and which backend serves each",
        description="Prints what is installed, which devices there are, and which backend serves each.",
    )
    parser.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> None:
    rows = [(name, _version(name), "") for name in ("fusedopt", "torch", "triton", "numpy", "matplotlib")]
    rows += [("python", platform.python_version(), ""), ("", "", ""), ("device", "name", "backend")]
    rows += [(str(device), name, backends.choose(device)) for device, name in _devices()]
    print("\n".join(aligned(rows, "<<<")))


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
