"""The command `fusedopt demo`: its options, and what it says in the end."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fusedopt.cli.threads import WAITING
from fusedopt.demo import report as demo_report
from fusedopt.demo import training as demo
from fusedopt.demo.text import LARGEST_TEXT
from fusedopt.schedules import SchedulerType


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
    option("--schedule", "how the learning rate changes", "cosine", type=schedule, metavar="NAME")
    option("--lr", f"learning rate that the schedule scales (default: {rates})", type=float, metavar="RATE")
    option("--dtype", "of weights, activations and gradients", defaults.dtype, choices=demo.DTYPES)
    option("--device", "auto takes the GPU if there is one", defaults.device, choices=demo.DEVICES)
    option("--seed", "of starting weights and batches", defaults.seed, type=int, metavar="N")
    text = f"file to learn from, {LARGEST_TEXT // 10**6} MB of it at most"
    option("--text", f"{text} (default: the sources of Python's standard library)", metavar="PATH")
    option("--out", "folder for metrics.jsonl, demo.png and checkpoint.pt", defaults.out, metavar="DIR")
    option("--checkpoint-every", "steps between checkpoints; 0: only at the end", defaults.checkpoint_every, type=int,
           metavar="N")  # fmt: skip
    parser.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on from the checkpoint in DIR, bit for bit; options that are not given are those of that run",
    )
    waiting = " ".join(f"{name}={value}" for name, value in WAITING.items())
    parser.epilog = (
        f"Schedules: {', '.join(demo.SCHEDULES)}. Threads: as many as torch takes, one per core; OMP_NUM_THREADS says "
        "otherwise. On Linux they sleep soon when they wait for each other, so that other programs may run beside the "
        f"demo: {waiting}, unless the environment sets that variable or OMP_WAIT_POLICY."
    )
    parser.set_defaults(run=run_demo)


def schedule(name: str) -> str:
    """The name of a schedule; argparse turns the error into one of its own."""
    try:
        return SchedulerType(name).value
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_demo(options: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401 - whether it is there is better known before the training than after it

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
