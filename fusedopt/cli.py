"""The command line: `fusedopt demo`, `fusedopt plot`, `fusedopt info`."""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

import fusedopt
from fusedopt import backends, demo, demo_report
from fusedopt.plot_command import add_plot_command


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one sentence instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake of the user is one sentence on stderr and exit code 2.

    Args:
        arguments: Without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        print(f"fusedopt {options.command}: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfusedopt {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no exception of its own.
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def _sentence(error: Exception) -> str:
    if _out_of_memory(error):
        return "there is not enough memory for this; take a smaller model or a smaller batch"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fusedopt",
        description="The optimizers and schedules of Hugging Face transformers for PyTorch, fused into a handful of "
        "Triton launches.",
    )
    parser.add_argument("--version", action="version", version=f"fusedopt {fusedopt.__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="command", required=True, parser_class=_Parser
    )
    add_demo_command(commands)
    add_plot_command(commands)
    add_info_command(commands)
    return parser


def add_demo_command(commands: Any) -> None:
    """Adds `demo` to the sub-commands of an argument parser."""
    defaults = demo.Settings()
    rates = ", ".join(f"{name} {choice.lr:g}" for name, choice in demo.OPTIMIZERS.items() if choice.lr is not None)
    parser = commands.add_parser(
        "demo",
        help="train a small GPT twice, with the original's optimizer loop and with ours",
        description="Trains a small byte-level GPT twice, from the same weights and on the same batches: once with the "
        "loop of the original optimizer, once with ours. Then compares losses and the time that the optimizers took.",
        # What is not given stays away, so that --resume can tell it from what is.
        argument_default=argparse.SUPPRESS,
    )

    def option(name: str, text: str, default: Any = None, **keywords: Any) -> None:
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(name, help=text + shown, **keywords)

    option("--steps", "optimizer steps", defaults.steps, type=int, metavar="N")
    option("--batch-size", f"windows of {demo.CONTEXT} bytes per batch", defaults.batch_size, type=int, metavar="N")
    option("--accumulate", "batches per optimizer step", defaults.accumulate, type=int, metavar="N")
    option("--layers", "blocks of the model", defaults.layers, type=int, metavar="N")
    option("--width", "features per position of the model", defaults.width, type=int, metavar="N")
    option("--optimizer", "the optimizer", defaults.optimizer, choices=tuple(demo.OPTIMIZERS))
    option("--schedule", "how the learning rate changes", "cosine", choices=demo.SCHEDULES, metavar="NAME")
    option("--lr", f"learning rate that the schedule scales (default: {rates})", type=float, metavar="RATE")
    option("--dtype", "of weights, activations and gradients", defaults.dtype, choices=demo.DTYPES)
    option("--device", "auto takes the GPU if there is one", defaults.device, choices=demo.DEVICES)
    option("--seed", "of starting weights and batches", defaults.seed, type=int, metavar="N")
    option("--text", "file to learn from (default: the sources of Python's standard library)", metavar="PATH")
    option("--out", "folder for metrics.jsonl, demo.png and checkpoint.pt", defaults.out, metavar="DIR")
    option("--checkpoint-every", "steps between checkpoints; 0: only at the end", defaults.checkpoint_every, type=int,
           metavar="N")  # fmt: skip
    parser.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on from the checkpoint in DIR, bit for bit; options that are not given are those of that run",
    )
    parser.epilog = f"Schedules: {', '.join(demo.SCHEDULES)}."
    parser.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if name not in ("run", "command", "resume")}
    if options.resume:
        folder = given.get("out", demo.Settings().out)
        saved = demo.read_checkpoint(folder)["settings"]
        given = {**saved, **given, "out": folder}
    settings = demo.Settings(**given)
    out = Path(settings.out)
    try:
        outcome = demo.train(settings, resume=options.resume)
    except KeyboardInterrupt:
        print(
            f"\n`fusedopt demo --resume --out {out}` goes on from the last checkpoint, if there is one", file=sys.stderr
        )
        raise
    demo_report.save_picture(outcome, out / demo.PICTURE)
    print(f"\n{demo_report.table(outcome)}\n")
    print(f"picture   {out / demo.PICTURE}")
    print(f"numbers   {out / demo.METRICS}")


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


if __name__ == "__main__":
    sys.exit(main())
