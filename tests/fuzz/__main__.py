"""`python -m fuzz --minutes 30` (`make fuzz MINUTES=30`): random examples until the time is over.

Prints a line for each round: minutes, examples and steps so far, failures, and the options that repeat it, alone with
`--rounds 1`. A failure is told at once, shrunk for two minutes at most, also beyond the end of the time, and printed as
Python that does it once more, with PYTHONPATH=.:kernels:tests and TRITON_INTERPRET=1. It is kept in `.hypothesis/fuzz`,
and the next round of the same optimizer on the same backend tries it first. Returns 1 if something failed.
"""

import argparse
import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import run_state_machine_as_test

from fuzz import drawn
from fuzz.machine import machine
from fuzz.watch import Enough, Watch

DATABASE = Path(".hypothesis/fuzz")
STEPS = 15
"""Events of an example."""

EXAMPLES = {"eager": 40, "triton": 6}
"""Examples of a round, by the backend that they begin on: in the interpreter, a step takes a hundred times as long."""

IMPORTS = """
from math import inf, nan

import torch
from torch import tensor

from fuzz.events import Run
from fuzz.setups import Grads, Group, Setup, Spec
"""
"""Of an example that is printed."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="fuzzes the optimizers until the time is over")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first round")
    parser.add_argument("--optimizers", nargs="+", choices=drawn.NAMES, default=drawn.NAMES)
    parser.add_argument("--on", nargs="+", choices=list(EXAMPLES), default=list(EXAMPLES), help="backends")
    parser.add_argument("--rounds", type=int, help="so many rounds at most")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_printoptions(precision=17)  # of options that are tensors
    watch = Watch()
    database = DirectoryBasedExampleDatabase(DATABASE)
    began, number, failures = time.monotonic(), 0, 0
    first = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    while (passed := time.monotonic() - began) < 60.0 * options.minutes and number != options.rounds:
        # The first round of each optimizer is eager, the second interpreted, and so on.
        name = options.optimizers[number % len(options.optimizers)]
        backend = options.on[number // len(options.optimizers) % len(options.on)]
        again = f"--seed {first + number} --optimizers {name} --on {backend}"
        print(
            f"{passed / 60:5.1f} min  {watch.examples:6d} examples  {watch.steps:7d} steps  "
            f"{failures} failures  next: {again}",
            flush=True,
        )
        watch.begin_round()
        backends = ("eager",) if backend == "eager" else ("triton", "eager")
        under_test = seed(first + number)(machine(name, backends, large=backend == "eager", watch=watch))
        number += 1
        try:
            run_state_machine_as_test(
                under_test,
                settings=settings(
                    max_examples=EXAMPLES[backend],
                    stateful_step_count=STEPS,
                    database=database,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    phases=(Phase.reuse, Phase.generate, Phase.shrink),
                    report_multiple_bugs=False,
                    verbosity=Verbosity.quiet,
                ),
            )
        except (Exception, Enough) as error:
            failures += 1
            traceback.print_exception(watch.error or error, file=sys.stdout)
            ended = "after shrinking for long enough" if isinstance(error, Enough) else f"with {type(error).__name__}"
            print(f"\n{again} failed, {ended}; its shortest example:", IMPORTS, *watch.failing, "", sep="\n")
            sys.stdout.flush()
    minutes = (time.monotonic() - began) / 60
    print(f"{minutes:5.1f} min  {watch.examples:6d} examples  {watch.steps:7d} steps  {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
