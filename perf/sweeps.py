"""`python -m perf.sweeps`: the constants of the kernels, every value beside every other in one run.

A configuration is a provider that sets the constants before each of its steps; the constants in the code are those that
won, with the measurement beside them.
"""

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf import measure, providers, report, results, roofline, workloads
from perf.providers import Provider, Step
from perf.results import Record


class Knob(NamedTuple):
    """A constant of a module and the values to try; the module's own value is always among them."""

    module: str
    name: str
    values: tuple[Any, ...]

    def all_values(self) -> list[Any]:
        own = getattr(importlib.import_module(self.module), self.name)
        return [own, *(v for v in self.values if v != own)]


class Sweep(NamedTuple):
    """All combinations of some knobs on some workloads."""

    name: str
    rule: str
    workloads: tuple[str, ...]
    knobs: tuple[Knob, ...]
    provider: str = "fusedopt"


_ELEMENTWISE, _NORM, _PLAN = (f"fusedopt_kernels.{n}" for n in ("elementwise", "norm", "adafactor.plan"))
_MB = 1_000_000
_L2 = (Knob(_PLAN, "CACHE_BATCH_BYTES", (0, 10 * _MB, 20 * _MB, 30 * _MB, 40 * _MB, 50 * _MB)),)

SWEEPS = (
    Sweep(
        "adamw blocks",
        "adamw",
        ("llama_1g", "llama_1g:bfloat16", "gpt2"),
        (Knob(_ELEMENTWISE, "BLOCK", (1024, 2048, 4096, 8192)), Knob(_ELEMENTWISE, "THREADS", (128, 256, 512))),
    ),
    Sweep(
        "adafactor tiles",
        "adafactor",
        ("llama_1g", "gpt2"),
        (Knob(_PLAN, "BLOCK", (1024, 2048, 4096)), Knob(_PLAN, "TILE_HEIGHT", (128, 256, 512))),
    ),
    Sweep("L2 batches", "adafactor", ("llama_1g", "gpt2", "llama_1g:bfloat16"), _L2),
    Sweep("L2 batches, captured", "adafactor", ("llama_1g", "gpt2"), _L2, "fusedopt, captured"),
    Sweep("norm blocks", "adamw, norm below the limit", ("llama_1g",), (Knob(_NORM, "BLOCK", (2048, 4096, 8192)),)),
)


@dataclass(frozen=True)
class Configured(Provider):
    """Our provider with constants of its own."""

    knobs: tuple[tuple[str, str, Any], ...] = ()

    def start(self, params: list[torch.Tensor]) -> tuple[Step, torch.optim.Optimizer]:
        modules = [(importlib.import_module(module), name, value) for module, name, value in self.knobs]

        def set_all() -> None:
            for module, name, value in modules:
                setattr(module, name, value)

        set_all()
        step, optimizer = super().start(params)

        def configured() -> None:
            set_all()
            step()

        return configured, optimizer


def configurations(sweep: Sweep) -> list[Configured]:
    """One provider per combination of values; the first is the code as it stands."""
    (ours,) = providers.of(sweep.rule, [sweep.provider])
    fields = {name: getattr(ours, name) for name in Provider.__dataclass_fields__}
    made = []
    for values in itertools.product(*(knob.all_values() for knob in sweep.knobs)):
        settings = tuple((knob.module, knob.name, value) for knob, value in zip(sweep.knobs, values))
        label = ", ".join(f"{name}={value}" for _, name, value in settings)
        made.append(replace(Configured(**fields, knobs=settings), name=label))
    return made


def run(sweep: Sweep, device: torch.device, seconds: float, smoke: bool = False) -> list[Record]:
    """Measures every configuration on every workload of a sweep; the constants are as before afterwards."""
    records: list[Record] = []
    before = [(knob, knob.all_values()[0]) for knob in sweep.knobs]
    try:
        for name in ("smoke",) if smoke else sweep.workloads:
            rows = configurations(sweep)[: 2 if smoke else None]
            compared = measure.compare(workloads.get(name), rows, device, seconds / len(sweep.workloads))
            records += [{**record, "sweep": sweep.name} for record in compared]
    finally:
        for knob, value in before:
            setattr(importlib.import_module(knob.module), knob.name, value)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.sweeps", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=90.0, help="for all sweeps together (%(default)s)")
    parser.add_argument("--only", choices=[s.name for s in SWEEPS], help="one sweep")
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    parser.add_argument("--smoke", action="store_true", help="two configurations of one sweep on tiny tensors")
    parser.add_argument("--backend", default="auto", help="of our providers: auto, eager, triton")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    providers.BACKEND = options.backend
    chosen = [s for s in SWEEPS if options.only in (None, s.name)][: 1 if options.smoke else None]
    end = time.perf_counter() + options.seconds
    for index, sweep in enumerate(chosen):
        seconds = 0.0 if options.smoke else max(0.0, end - time.perf_counter()) / (len(chosen) - index)
        bandwidth = roofline.copy_bandwidth(device, 0.001 if options.smoke else None)
        head: list[Record] = [
            results.environment(device),
            {"kind": "copy", "device": device.type, "bytes_per_second": bandwidth},
        ]
        records = run(sweep, device, seconds, options.smoke)
        if options.out:
            with options.out.open("a") as file:
                results.write(head + records, file)
        for (workload, _), group in report.comparisons(records).items():
            print(f"\n{sweep.name}: {workload}\n{report.table(group, bandwidth)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
