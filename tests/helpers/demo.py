"""Runs of the demo that take a tenth of a second, and their files."""

import json
import time
from pathlib import Path

from fusedopt.demo import Settings, training
from fusedopt.demo.checkpoint import load_checkpoint
from fusedopt.demo.settings import CHECKPOINT, METRICS

TINY = Settings(steps=4, batch_size=2, layers=2, width=16, device="cpu", checkpoint_every=0)


def without_times(records):
    return [{name: value for name, value in record.items() if name != "optimizer_ms"} for record in records]


def metrics(settings):
    return [json.loads(line) for line in (Path(settings.out) / METRICS).read_text().splitlines()]


def weights(settings):
    return load_checkpoint(Path(settings.out) / CHECKPOINT)["runs"]


class Killed(BaseException):
    """Ends a run; no handler catches it."""


def kill_at(monkeypatch, step):
    """Makes the next run end in the middle of `step`, when its second training has its gradients."""
    ticks = iter(range(1, 10**6))

    def clock(device):
        if next(ticks) > 4 * (step - 1) + 2:  # two readings for each of the two runs
            raise Killed
        return time.perf_counter()

    monkeypatch.setattr(training, "clock", clock)
