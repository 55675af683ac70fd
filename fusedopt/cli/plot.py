"""The command `fusedopt plot`: draws schedules, and the rates of training loops that use them."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from fusedopt import checks
from fusedopt.files import write_atomically
from fusedopt.schedules import SchedulerType, example_arguments, get_scheduler, needs_metric
from fusedopt.schedules.checks import count
from fusedopt.schedules.plotting import plot_gallery, plot_schedule, plot_verification
from fusedopt.schedules.recorder import LRRecorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_plot_command(commands: Any) -> None:
    """Adds `plot` to the sub-commands of an argument parser.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_plot_command(parser.add_subparsers())
        >>> parser.parse_args(["plot", "linear", "--lr", "0.001"]).names
        ['linear']
    """
    parser = commands.add_parser(
        "plot",
        help="draw learning-rate schedules",
        description="Draw one learning-rate schedule, several to compare, or all of them. "
        f"Names: {', '.join(kind.value for kind in SchedulerType)}.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="a schedule's name; several are drawn together")
    parser.add_argument("--all", action="store_true", help="draw every schedule, side by side")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="use the schedule in a training loop, rightly and with each classic mistake, and draw the rates",
    )
    parser.add_argument("--warmup-steps", type=number, metavar="STEPS", help="default: a tenth of the training")
    parser.add_argument("--training-steps", type=number, metavar="STEPS", help="default: 1000, with --verify 60")
    parser.add_argument("--lr", type=float, default=1e-3, help="initial learning rate (default: %(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the schedule itself, say num_cycles=3; may be repeated",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="default: named after what is drawn")
    parser.set_defaults(run=run_plot)


def number(text: str) -> float:
    """Returns an int if the text is one, else a float; errors of argparse have the name of this function."""
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def run_plot(args: argparse.Namespace) -> int:
    """Draws into a file, and prints its name.

    Raises:
        ValueError: an argument makes no picture.
    """
    figure, stem = _figure_for(args)
    output = args.output or Path(f"{stem}.png")
    _save(figure, output)
    print(f"wrote {output}")
    return 0


def _figure_for(args: argparse.Namespace) -> tuple[Figure, str]:
    """Returns the figure, and the name of its file without suffix."""
    checks.finite_non_negative("--lr", args.lr)
    total = args.training_steps if args.training_steps is not None else (60 if args.verify else 1000)
    total = count("--training-steps", total)
    warm_up = count("--warmup-steps", args.warmup_steps if args.warmup_steps is not None else total // 10)
    if args.all:
        if args.names or args.verify or args.set:
            raise ValueError("--all draws every schedule by itself; leave out names, --verify and --set")
        return plot_gallery(round(warm_up), round(total)), "schedules"
    if not args.names:
        raise ValueError(f"no schedule named; give one of {', '.join(kind.value for kind in SchedulerType)}, or --all")
    counts = {"num_warmup_steps": warm_up, "num_training_steps": total}
    specific = {name: _arguments(name, counts, args) for name in args.names}
    try:
        if args.verify:
            if len(args.names) > 1:
                raise ValueError(f"--verify trains with one schedule, got {len(args.names)}; name one")
            (name,) = args.names
            return _verification(name, args.lr, round(total), specific[name]), "verification"
        return plot_schedule(list(specific.items()), lr=args.lr), "-".join(args.names)
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"{error}; see the schedule's function for the arguments that --set may give") from error


_WORDS = ("mode", "threshold_mode", "warmup_type", "decay_type")
"""Arguments that are words instead of numbers."""

_INSTEAD_OF = {"min_lr": "min_lr_rate", "num_stable_steps": "num_training_steps"}
"""Arguments of --set, and the argument of the example that each excludes."""


def _arguments(name: str, counts: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Returns all arguments of a schedule: those of --set, else those of the example."""
    own = dict(_key_and_value(text) for text in args.set)
    for key in own:
        if key in counts:
            raise ValueError(
                f"--set takes a schedule's own arguments; give {key} as --{key.removeprefix('num_').replace('_', '-')}"
            )
        if key in ("optimizer", "last_epoch"):
            raise ValueError(f"--set takes a schedule's own arguments; a picture is of a new run, without {key}")
    for key, value in own.items():
        if isinstance(value, str) and key not in _WORDS:
            raise ValueError(f"{key} must be a number, got {value!r}")
    replaced = {_INSTEAD_OF.get(key) for key in own}
    ours = {**counts, **example_arguments(name, round(counts["num_training_steps"]), args.lr)}
    return {key: value for key, value in ours.items() if key not in replaced} | own


def _key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}; say num_cycles=3")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        parsed = number(value)
    except ValueError:
        return key, value
    if math.isnan(parsed):
        raise ValueError(f"{key} must be a number, got {value}")
    return key, parsed


def _save(figure: Figure, output: Path) -> None:
    known = sorted(figure.canvas.get_supported_filetypes())
    if output.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"cannot write {output}: its name must end in one of .{', .'.join(known)}")
    if not output.parent.is_dir():
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}; make it first")
    suffix = output.suffix.lstrip(".").lower()

    def write(file: BinaryIO) -> None:
        # By the name: some formats are text, and some are written by another program.
        figure.savefig(file.name, format=suffix)
        if suffix == "png":
            _thin_out(file)

    try:
        write_atomically(output, write)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}; choose another file with -o") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot write {output}: {error}; choose another format, say .png") from error


def _thin_out(picture: BinaryIO) -> None:
    """Shrinks a PNG to a third: lines and letters need no more colours than a palette has."""
    from PIL import Image

    with Image.open(picture.name) as image:
        thin = image.convert("RGB").quantize(colors=128, dither=Image.Dither.NONE)
    thin.save(picture.name, format="png", optimize=True)


# What a training loop calls in step `n` of `total`: o steps the optimizer, s the scheduler, n makes a new scheduler.
_LOOPS: dict[str, Callable[[int, int], str]] = {
    "as it should be": lambda n, total: "os",
    "stepped before the optimizer": lambda n, total: "so",
    "stepped twice per step": lambda n, total: "oss",
    "stepped once per epoch": lambda n, total: "o" if n % max(2, total // 10) else "os",
    "never stepped": lambda n, total: "o",
    "started anew on resume": lambda n, total: "nos" if n == total // 2 + 1 else "os",  # no state_dict was loaded
}


def _verification(name: str, lr: float, total: int, arguments: dict[str, Any]) -> Figure:
    """Runs each loop, and draws the rates that its optimizer used over those that were meant."""
    from matplotlib.figure import Figure

    if needs_metric(name):
        raise ValueError(f"schedule {name!r} follows a metric, so there is no curve to verify against; name another")
    warm_up, length = arguments.pop("num_warmup_steps"), arguments.pop("num_training_steps", None)
    figure = Figure(figsize=(12.6, 6.8), dpi=100, layout="constrained")
    labelled: dict[str, Any] = {}
    for ax, (title, calls) in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, _LOOPS.items()):
        optimizer = torch.optim.SGD([torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)], lr=lr)
        recorder = LRRecorder(optimizer)
        make_scheduler = partial(get_scheduler, name, optimizer, warm_up, length, arguments)
        scheduler: Any = make_scheduler()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of")  # the mistake is made on purpose
            for call in "".join(calls(n, total) for n in range(1, total + 1)):
                if call == "n":
                    scheduler = make_scheduler()
                else:
                    (optimizer if call == "o" else scheduler).step()
        plot_verification(recorder, scheduler.lr_lambdas[0], ax, title=title, legend=False)
        ax.label_outer()
        labelled |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=len(labelled), frameon=False)
    return figure
