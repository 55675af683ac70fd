"""A long run of small models: what it adds to the time of a step and to memory, and the steps it counted.

python -m perf.long_run --steps 100000

With clipping, skipping, statistics of every tenth step and their history, and a schedule; every 97th step has a NaN.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion, StatisticsRecorder, get_linear_schedule_with_warmup
from perf.report import table

OPTIONS: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True, "skip_outliers": 50.0, "track_statistics": 10}

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda params: AdamW(params, lr=1e-3, weight_decay=0.1, **OPTIONS),
    "AdamW, bfloat16, master_weights": lambda params: AdamW(params, lr=1e-3, master_weights=True, **OPTIONS),
    "AdamWeightDecay": lambda params: AdamWeightDecay(params, 1e-3, weight_decay_rate=0.1, **OPTIONS),
    "Adafactor": lambda params: Adafactor(params, lr=1e-3, relative_step=False, **OPTIONS),
    "Lion, bfloat16, stochastic_rounding": lambda params: Lion(params, lr=1e-4, stochastic_rounding=True, **OPTIONS),
}

SPOILT = 97
"""Every so many steps there is a NaN."""


class Memory(NamedTuple):
    """What a process holds: objects that the collector knows, blocks of Python's allocator, resident KiB."""

    objects: int
    blocks: int
    resident: int

    @classmethod
    def now(cls) -> "Memory":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before, objects = 0, len(gc.get_objects())
        while objects != before:  # the collector lets go of tuples in tuples one level at a time
            gc.collect()
            before, objects = objects, len(gc.get_objects())
        return cls(objects, sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE") // 1024)

    def since(self, other: "Memory") -> "Memory":
        return Memory(*(mine - theirs for mine, theirs in zip(self, other)))

    def shown(self) -> dict[str, str]:
        """Returns the cells of a table, for memory that has grown."""
        return {"objects": f"{self.objects:+,}", "blocks": f"{self.blocks:+,}", "KiB": f"{self.resident:+,}"}


def median_ms(seconds: Iterable[float]) -> float:
    """Returns the median, in milliseconds."""
    return 1e3 * statistics.median(seconds)


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        new_ms, old_ms: median time of the processor for a step, of a new optimizer and of this one, in turn.
        grown: memory at the end beside that after a tenth of the run, when the history is full.
        counted: of the state.
        expected: steps that were not skipped.
    """

    new_ms: float
    old_ms: float
    grown: Memory
    counted: float
    expected: int


class Training:
    """A small model, its optimizer, a schedule of so many steps, and the history of statistics.

    Attributes:
        taken: steps so far.
    """

    def __init__(self, name: str, steps: int) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
        if "bfloat16" in name:
            self._model.to(torch.bfloat16)
        self._optimizer = OPTIMIZERS[name](self._model.named_parameters())
        self._recorder = StatisticsRecorder(self._optimizer, limit=max(2, min(1000, steps // 200)))
        self._schedule = get_linear_schedule_with_warmup(self._optimizer, steps // 10, steps)
        self._grads = [[torch.randn_like(p) for p in self._model.parameters()] for _ in range(7)]
        self._spoilt = [torch.full_like(g, torch.nan) for g in self._grads[0]]
        self.taken = 0

    def step(self) -> float:
        """Takes a step; returns its time of the processor in seconds."""
        grads = self._grads[self.taken % 7]
        self.taken += 1
        for p, g in zip(self._model.parameters(), grads if self.taken % SPOILT else self._spoilt):
            p.grad = g
        start = time.thread_time()
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return time.thread_time() - start

    def close(self) -> float:
        """Closes the history; returns the count of steps in the state."""
        self._recorder.close()
        (count,) = {state["step"].item() for state in self._optimizer.state.values()}
        return float(count)


def run(name: str, steps: int, quiet: bool = True) -> Outcome:
    """Trains a small model for so many steps, at least 20, the last thousand in turn with a new one."""
    compared = min(1000, steps // 4)
    old = Training(name, steps)
    for step in tqdm(range(steps - compared), name, leave=False, disable=quiet, mininterval=1.0):
        if step == steps // 10:
            before = Memory.now()
        old.step()
    grown = Memory.now().since(before)
    new = Training(name, steps)
    new_times, old_times = zip(*((new.step(), old.step()) for _ in range(compared)))
    new.close()
    return Outcome(median_ms(new_times), median_ms(old_times), grown, old.close(), steps - steps // SPOILT)


def main() -> int:
    """Prints a line per optimizer; 1 if one of them miscounted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="of each optimizer (default: %(default)s)")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS, metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, right = [], True
    for name in args.optimizers:
        run(name, 100)  # what is made once
        o = run(name, args.steps, quiet=False)
        times = {"new ms": f"{o.new_ms:.3f}", "old ms": f"{o.old_ms:.3f}"}
        rows.append({"": name, **times, **o.grown.shown(), "counted": f"{o.counted:,.0f} of {o.expected:,}"})
        right = right and o.counted == o.expected
    print(f"{args.steps:,} steps each: median time of the last ones, in turn with a new optimizer's, and growth\n")
    print(table(rows))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
