"""The command `fusedopt demo`: its options, and the report at its end."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from fusedopt import demo
from fusedopt.cli.threads import WAITING
from fusedopt.demo import report
from fusedopt.demo.checkpoint import load_checkpoint
from fusedopt.demo.settings import CHECKPOINT, METRICS, PICTURE, SCHEDULES

NOT_SETTINGS = ("run", "command", "resume", "statistics")


def add_demo_command(commands: Any) -> None:
    """Adds `demo` to the sub-commands of an argument parser."""
    waiting = " ".join(f"{name}={value}" for name, value in WAITING.items())
    parser = commands.add_parser(
        "demo",
        help="train a small GPT twice, with the original's optimizer loop and with ours",
        description="Trains a small byte-level GPT twice, from the same weights and on the same batches: once with the "
        "loop of the original optimizer, once with ours. Then compares losses and the time that the optimizers took.",
        epilog=f"Schedules: {', '.join(SCHEDULES)}. Threads: as many as torch takes, one per core; OMP_NUM_THREADS "
        "says otherwise. On Linux they sleep soon when they wait for each other, so that other programs may run beside "
        f"the demo: {waiting}, unless the environment sets that variable or OMP_WAIT_POLICY.",
        # Options that are not given are left out, so that --resume takes them from the checkpoint.
        argument_default=argparse.SUPPRESS,
    )
    for field in fields(demo.Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", **field.metadata["option"])
    parser.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on from the checkpoint in DIR, bit for bit; options that are not given are those of that run",
    )
    parser.add_argument(
        "--statistics",
        action="store_true",
        default=False,
        help="draw update-to-weight ratio and gradient norm of every parameter, too",
    )
    parser.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401 - if it is missing, that should be known before the training

    given = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    if options.resume:
        folder = given.get("out", demo.Settings.out)
        given = {**load_checkpoint(Path(folder) / CHECKPOINT)["settings"], **given, "out": folder}
    settings = demo.Settings(**given)
    out = Path(settings.out)
    try:
        outcome = demo.train(settings, resume=options.resume, statistics=options.statistics)
    except KeyboardInterrupt:
        print(
            f"\n`fusedopt demo --resume --out {out}` goes on from the last checkpoint, if there is one", file=sys.stderr
        )
        raise
    report.save_picture(outcome, out / PICTURE)
    print(f"\n{report.table(outcome)}\n")
    print(f"picture   {out / PICTURE}")
    print(f"numbers   {out / METRICS}")
