"""A long run of small models: time per step and memory at its beginning and at its end, and the steps it counted.

python -m perf.long_run --steps 100000

With clipping, skipping, statistics of every tenth step and their history, and a schedule; every 97th step has a NaN.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
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


def ends_ms(seconds: Sequence[float], number: int) -> tuple[float, float]:
    """Returns the medians of the first and of the last so many times, in milliseconds."""
    return 1e3 * statistics.median(seconds[:number]), 1e3 * statistics.median(seconds[-number:])


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        first_ms, last_ms: median time of the processor for a step, of the first and of the last thousand steps.
        grown: memory at the end beside that after a tenth of the run, when the history is full.
        counted: of the state.
        expected: steps that were not skipped.
    """

    first_ms: float
    last_ms: float
    grown: Memory
    counted: float
    expected: int


def run(name: str, steps: int, quiet: bool = True) -> Outcome:
    """Trains a small model for so many steps, at least 20."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    if "bfloat16" in name:
        model = model.to(torch.bfloat16)
    optimizer = OPTIMIZERS[name](model.named_parameters())
    recorder = StatisticsRecorder(optimizer, limit=max(2, min(1000, steps // 200)))
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(7)]
    spoilt = [torch.full_like(g, torch.nan) for g in grads[0]]
    took = array("d", [0.0]) * steps  # no objects of its own, and all of its memory from the beginning
    for step in tqdm(range(steps), name, leave=False, disable=quiet, mininterval=1.0):
        if step == steps // 10:
            before = Memory.now()
        for p, g in zip(model.parameters(), grads[step % 7] if (step + 1) % SPOILT else spoilt):
            p.grad = g
        start = time.thread_time()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        took[step] = time.thread_time() - start
    grown = Memory.now().since(before)
    recorder.close()
    (count,) = {state["step"].item() for state in optimizer.state.values()}
    return Outcome(*ends_ms(took, min(1000, steps // 4)), grown, count, steps - steps // SPOILT)


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
        times = {"first ms": f"{o.first_ms:.3f}", "last ms": f"{o.last_ms:.3f}"}
        rows.append({"": name, **times, **o.grown.shown(), "counted": f"{o.counted:,.0f} of {o.expected:,}"})
        right = right and o.counted == o.expected
    print(f"{args.steps:,} steps each: median time of the first and the last thousand, growth after the first tenth\n")
    print(table(rows))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
