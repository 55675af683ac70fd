"""`python -m perf.bench`: optimizers side by side on this machine, and which goals are met."""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from perf import measure, plans, providers, report, results, workloads
from perf.plans import Comparison
from perf.results import Record, Run


def run(
    comparisons: Sequence[Comparison], device: torch.device, seconds: float, sink: list[Record], out: Path | None = None
) -> None:
    """Runs comparisons one after the other, appends their records to `sink` and `out`, and prints each table."""
    end = time.perf_counter() + seconds
    left = sum(comparison.share for comparison in comparisons)

    def keep(*records: Record) -> None:
        sink.extend(records)
        if out:
            results.append(out, records)

    for comparison in comparisons:
        workload = workloads.get(comparison.workload)
        size = f"{workload.params:,} {workload.dtype_name} in {workload.tensors:,} tensors"
        print(f"\n{comparison.title}: {workload.about}, {size}")
        # Copies just before and after; the best of all is the ceiling of a run.
        keep(_copy(comparison, device))
        # A comparison that took longer than its share (a busy machine's first round) takes from those after it.
        share = max(0.0, end - time.perf_counter()) * comparison.share / left
        left -= comparison.share
        records = measure.compare(workload, comparison.providers(), device, share)
        keep(*({**r, "sweep": comparison.title} if comparison.sweep else r for r in records))
        keep(_copy(comparison, device))
        print(report.steps_table(records, Run(sink)), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _copy(comparison: Comparison, device: torch.device) -> Record:
    bandwidth = measure.copy_bandwidth(device, 0.001 if comparison.workload == "smoke" else None)
    return {"kind": "copy", "device": device.type, "bytes_per_second": bandwidth}


def once(comparison: Comparison, device: torch.device) -> bool:
    """Takes one step of ours after some that warm up; a profiler that starts switched off sees only that one."""
    problem = measure.Problem(workloads.get(comparison.workload), device, 2)
    candidate = measure.Candidate(providers.of(comparison.rule, ["fusedopt"])[0], problem)
    candidate.open()
    with torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
        candidate.one_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    finite = all(bool(torch.isfinite(p).all()) for p in problem.params)
    print(f"fusedopt, {comparison.rule}, {comparison.workload} on {device}: {'finite' if finite else 'NOT FINITE'}")
    return finite


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.bench", description=__doc__)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=where, help="default: a GPU if there is one")
    parser.add_argument("--plan", choices=plans.PLANS, help="which comparisons; default: the device's")
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
    comparisons = plans.PLANS[options.plan or device.type]
    if options.workloads:
        names = tuple(options.providers.split(";")) if options.providers else None
        pairs = itertools.product(options.workloads.split(","), options.rules.split(";"))
        comparisons = tuple(Comparison(*pair, 1.0, names, plans.goals_of(*pair, device.type)) for pair in pairs)
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
        results.append(options.out, records)
    print(results.machine(records[0]))
    load = records[0]["load"] or 0.0
    if load > 0.5:
        print(f"other programs keep {load:.1f} cores busy: times are too long and ratios less sure")
    run(comparisons, device, options.seconds, records, options.out)
    print(f"\n{Run(records).bandwidth_line}")
    if outcomes := plans.judge(Run(records), comparisons):
        print("\n" + report.goals_table(outcomes))
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
