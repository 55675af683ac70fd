"""`python -m perf.bench`: optimizers side by side on this machine, and which goals are met."""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf import goals, measure, providers, report, results, workloads
from perf.goals import BELOW, CLIP_FUSED, CLIPPED
from perf.providers import Provider
from perf.results import Record

Knob = tuple[str, str, tuple[Any, ...]]
"""A constant of a module of the kernels, and the values to try beside its own."""


class Comparison(NamedTuple):
    """Providers side by side on one workload, or a provider with every combination of values of constants."""

    workload: str
    rule: str
    share: float = 1.0  # of the time
    names: tuple[str, ...] | None = None  # None for all of the rule, but for those that must be compiled for minutes
    sweep: tuple[Knob, ...] = ()

    def providers(self) -> list[Provider]:
        """Returns who is compared; of a sweep, the code as it stands comes first."""
        rows = providers.of(self.rule, self.names)
        if not self.sweep:
            return rows
        own = [getattr(import_module(module), name) for module, name, _ in self.sweep]
        values = [[first, *(v for v in knob[2] if v != first)] for first, knob in zip(own, self.sweep)]
        made = []
        for combination in itertools.product(*values):
            constants = tuple((module, name, value) for (module, name, _), value in zip(self.sweep, combination))
            label = ", ".join(f"{name}={value}" for _, name, value in constants)
            made += [replace(row, name=f"{row.name}, {label}", constants=constants) for row in rows]
        return made

    @property
    def title(self) -> str:
        return " x ".join([self.rule, *(name for _, name, _ in self.sweep)])


_OURS = ("fusedopt",)
_FOR_CLIPPING = ("fusedopt", CLIP_FUSED)
_FOR_HOSTS = ("fusedopt", "torch fused", "torch foreach")
_CAPTURED = ("fusedopt", "torch fused", "fusedopt, captured", "torch fused, captured")

_ELEMENTWISE, _NORM, _PLAN = (f"fusedopt_kernels.{n}" for n in ("elementwise", "norm", "adafactor.plan"))
_BLOCKS = ((_ELEMENTWISE, "BLOCK", (1024, 2048, 4096, 8192)), (_ELEMENTWISE, "THREADS", (128, 256, 512)))
_TILES = ((_PLAN, "BLOCK", (1024, 2048, 4096)), (_PLAN, "TILE_HEIGHT", (128, 256, 512)))
_L2 = ((_PLAN, "CACHE_BATCH_BYTES", tuple(10_000_000 * i for i in range(6))),)

PLANS: dict[str, tuple[Comparison, ...]] = {
    "cpu": (
        Comparison("gpt_50m", "adamw", 0.2),
        Comparison("tiny_2000", "adamw", 0.07),
        Comparison("tiny_300", "adamw", 0.03, _FOR_HOSTS),
        Comparison("gpt_50m", "adafactor", 0.24),
        Comparison("matrices_50m", "adafactor", 0.16, ("fusedopt", "transformers 4.34 loop", "torch foreach")),
        Comparison("gpt_50m", BELOW, 0.1, _FOR_CLIPPING),
        Comparison("gpt_50m", CLIPPED, 0.1, _FOR_CLIPPING),
        Comparison("matrices_50m", CLIPPED, 0.1, _FOR_CLIPPING),
    ),
    "cuda": (
        Comparison("gpt2", "adamw", 0.15),
        Comparison("llama_1g", "adamw", 0.15),
        Comparison("tiny_2000", "adamw", 0.1),
        Comparison("llama2_7b", "adamw", 0.2, (*_CAPTURED, "flashoptim", "optimi")),
        Comparison("gpt2", "adafactor", 0.15),
        Comparison("llama_1g", "adafactor", 0.1),
        Comparison("gpt2", BELOW, 0.05),
        Comparison("llama_1g", BELOW, 0.05, (*_FOR_CLIPPING, "fusedopt, captured")),
        Comparison("tiny_300", "adamw", 0.05, _FOR_HOSTS),
    ),
    "cuda-rest": (
        Comparison("llama_1g:bfloat16", "adamw", 0.2),
        *(Comparison(name, "adamw", 0.1) for name in ("bert_base", "resnet50", "vit_l")),
        Comparison("embedding_2g4", "adamw", 0.1, ("fusedopt", "torch fused")),
        Comparison("llama_1g:bfloat16", "adafactor", 0.1),
        Comparison("resnet50", "adafactor", 0.1),
        Comparison("gpt2", CLIPPED, 0.1),
        Comparison("llama2_7b", "adafactor", 0.1, ("fusedopt", "torch foreach")),
    ),
    "cuda-compiled": (
        Comparison("gpt2", "adafactor", 0.4, ("fusedopt", "torch compiled")),
        Comparison("gpt2", "adamw", 0.2, ("fusedopt", "torch fused", "torch compiled")),
        Comparison("gpt2", "adafactor", 0.4, ("fusedopt", "transformers 4.34 loop, compiled")),
    ),
    "sweeps": (
        *(Comparison(name, "adamw", 1.0, _OURS, _BLOCKS) for name in ("llama_1g", "llama_1g:bfloat16", "gpt2")),
        *(Comparison(name, "adafactor", 1.5, _OURS, _TILES) for name in ("llama_1g", "gpt2")),
        *(Comparison(name, "adafactor", 1.0, _OURS, _L2) for name in ("llama_1g", "gpt2", "llama_1g:bfloat16")),
        *(Comparison(name, "adafactor", 1.5, ("fusedopt, captured",), _L2) for name in ("llama_1g", "gpt2")),
        Comparison("llama_1g", BELOW, 3.0, _OURS, ((_NORM, "BLOCK", (2048, 4096, 8192)),)),
    ),
    "smoke-sweeps": (Comparison("smoke", "adamw", 1.0, _OURS, ((_ELEMENTWISE, "BLOCK", (1024,)),)),),
}
"""Comparisons in the order of their importance. In a sweep, the constants that won are those in the code."""


def run(
    comparisons: Sequence[Comparison], device: torch.device, seconds: float, sink: list[Record], out: Path | None = None
) -> None:
    """Runs comparisons one after the other, appends their records to `sink` and `out`, and prints each table."""
    end = time.perf_counter() + seconds
    left = sum(comparison.share for comparison in comparisons)

    def keep(records: list[Record]) -> None:
        sink.extend(records)
        if out:
            with out.open("a") as file:
                results.write(records, file)

    for comparison in comparisons:
        # Just before and after; the best of all is the ceiling of a run.
        size = 0.001 if comparison.workload == "smoke" else None
        keep([{"kind": "copy", "device": device.type, "bytes_per_second": measure.copy_bandwidth(device, size)}])
        workload = workloads.get(comparison.workload)
        kind = str(workload.dtype).removeprefix("torch.")
        print(f"\n{comparison.title}: {workload.about}, {workload.params:,} {kind} in {workload.tensors:,} tensors")
        # A comparison that took longer than its share (a busy machine's first round) takes from those after it.
        share = max(0.0, end - time.perf_counter()) * comparison.share / left
        left -= comparison.share
        compiled = comparison.names is not None
        records = measure.compare(workload, comparison.providers(), device, share, compiled=compiled)
        keep([{**r, "sweep": comparison.title} for r in records] if comparison.sweep else records)
        keep([{"kind": "copy", "device": device.type, "bytes_per_second": measure.copy_bandwidth(device, size)}])
        print(report.steps_table(records, report.copy_bandwidth(sink)), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def once(comparison: Comparison, device: torch.device) -> bool:
    """Takes one step of ours after some that warm up; a profiler that starts switched off sees that one alone."""
    problem = measure.Problem(workloads.get(comparison.workload), device, 2)
    problem.set_grads()
    step, _ = providers.of(comparison.rule, _OURS)[0].start(problem.params)
    for _ in range(3):
        problem.set_grads()
        step()
    problem.set_grads()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    finite = all(bool(torch.isfinite(p).all()) for p in problem.params)
    print(f"fusedopt, {comparison.rule}, {comparison.workload} on {device}: {'finite' if finite else 'NOT FINITE'}")
    return finite


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.bench", description=__doc__)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=where, help="default: a GPU if there is one")
    parser.add_argument("--plan", choices=PLANS, help="which comparisons; default: the device's")
    parser.add_argument("--workloads", help="instead of a plan: names separated by commas, each also NAME:DTYPE")
    parser.add_argument("--rules", default="adamw", help="with --workloads: rules separated by semicolons")
    parser.add_argument("--providers", help="with --workloads: names separated by semicolons; default: all of the rule")
    parser.add_argument("--seconds", type=float, default=95.0, help="for all comparisons together (%(default)s)")
    threads = min(2, torch.get_num_threads())
    parser.add_argument("--threads", type=int, default=threads, help="of torch on the CPU (%(default)s)")
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    parser.add_argument("--backend", default="auto", help="of our providers: auto, eager, triton")
    parser.add_argument("--once", action="store_true", help="only one step of ours, for a profiler or a sanitizer")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    providers.BACKEND = options.backend
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    comparisons = PLANS[options.plan or device.type]
    if options.workloads:
        names = tuple(options.providers.split(";")) if options.providers else None
        pairs = itertools.product(options.workloads.split(","), options.rules.split(";"))
        comparisons = tuple(Comparison(workload, rule, 1.0, names) for workload, rule in pairs)
    try:
        for comparison in comparisons:
            workloads.get(comparison.workload), comparison.providers()
    except ValueError as error:
        parser.error(str(error))
    if options.once:
        return 0 if all([once(comparison, device) for comparison in comparisons]) else 1
    start = time.perf_counter()
    records: list[Record] = [results.environment(device)]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            results.write(records, file)
    print(results.machine(records[0]))
    load = records[0]["load"] or 0.0
    if load > 0.5:
        print(f"other programs keep {load:.1f} cores busy: times are too long and ratios less sure")
    run(comparisons, device, options.seconds, records, options.out)
    print(f"\nroofline: {(report.copy_bandwidth(records) or 0.0) / 1e9:.1f} GB/s, bytes read plus bytes written")
    here = {(comparison.workload, comparison.rule) for comparison in comparisons if not comparison.sweep}
    outcomes = [o for o in goals.judge(records, device.type) if (o.goal.workload, o.goal.rule) in here]
    if outcomes:
        print("\n" + report.goals_table(outcomes))
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
