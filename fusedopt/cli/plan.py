"""The command `fusedopt plan`: what a run would take of a GPU, by optimizer."""

import argparse
import json
import re
from typing import Any

from fusedopt.plan import PRESETS, plan_run
from fusedopt.plan.families import FAMILIES

_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def add_plan_command(commands: Any) -> None:
    """Adds `plan` to the sub-commands of an argument parser."""
    presets = "\n".join(f"  {name:12}{title}" for name, (title, _) in PRESETS.items())
    parser = commands.add_parser(
        "plan",
        help="print what a run would take of a GPU, by optimizer",
        description="Prints the memory that weights, gradients and optimizer states take of one GPU, and what a step\n"
        "of the optimizer moves, for every optimizer and precision. Needs no GPU, and downloads nothing.",
        epilog=f"presets:\n{presets}\n\nmodel types of a config.json:\n  {', '.join(FAMILIES)}\n\n"
        "examples:\n  fusedopt plan llama-8b --fits 80GB\n"
        "  fusedopt plan llama-405b --fsdp 64 --tp 8 --bandwidth 3.0TB/s --clip\n"
        "  fusedopt plan path/to/config.json --fsdp 16 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a preset, or the config.json of a transformers model")
    parser.add_argument(
        "--fsdp", type=int, default=1, metavar="N", help="GPUs that fully_shard spreads parameters over"
    )
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="GPUs of tensor parallelism; N divides the heads"
    )
    parser.add_argument(
        "--bandwidth", type=bandwidth, metavar="RATE", help="of a GPU's memory, say 3.0TB/s: adds milliseconds"
    )
    parser.add_argument(
        "--fits", type=memory, metavar="SIZE", help="memory of a GPU, say 80GB or 80GiB: marks what fits"
    )
    parser.add_argument(
        "--clip", action="store_true", help="with max_grad_norm: the step needs the norm of all gradients"
    )
    parser.add_argument("--statistics", action="store_true", help="with track_statistics: every step is measured")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of a table")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> None:
    """Prints the plan.

    Raises:
        ValueError: the model is not known, or cannot be split so.
    """
    plan = plan_run(
        options.model,
        fsdp=options.fsdp,
        tp=options.tp,
        bandwidth=options.bandwidth,
        memory=options.fits,
        max_grad_norm=1.0 if options.clip else None,
        track_statistics=options.statistics,
    )
    print(json.dumps(plan.data(), indent=2) if options.json else plan)


def memory(text: str) -> float:
    """Returns bytes.

    Example:
        >>> memory("80GB"), memory("1.5 GiB")
        (80000000000.0, 1610612736.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([kMGT]i?|)B?", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GB or 80GiB")
    return float(found[1]) * _FACTORS.get(found[2], 1)


def bandwidth(text: str) -> float:
    """Returns bytes per second.

    Example:
        >>> bandwidth("3.0TB/s")
        3000000000000.0
    """
    try:
        return memory(text.strip().removesuffix("/s"))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a bandwidth such as 3.0TB/s") from None
