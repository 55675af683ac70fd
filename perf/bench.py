"""`python -m perf.bench`: optimizers side by side on this machine, and which goals are met."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from perf import goals, measure, providers, report, results, roofline, workloads
from perf.results import Record


class Contest(NamedTuple):
    """One comparison and its share of the time."""

    workload: str
    rule: str
    share: float
    names: tuple[str, ...] | None = None
    """Which providers; None for all of the rule, but for those that must be compiled for minutes."""


_BELOW, _CLIPPED = "adamw, norm below the limit", "adamw, clipped"
_FOR_CLIPPING = ("fusedopt", "clip_grad_norm_ + torch fused")
_FOR_HOSTS = ("fusedopt", "torch fused", "torch foreach")

PLANS: dict[str, tuple[Contest, ...]] = {
    "cpu": (
        Contest("gpt_50m", "adamw", 0.2),
        Contest("tiny_2000", "adamw", 0.07),
        Contest("tiny_300", "adamw", 0.03, _FOR_HOSTS),
        Contest("gpt_50m", "adafactor", 0.24),
        Contest("matrices_50m", "adafactor", 0.16, ("fusedopt", "transformers 4.34 loop", "torch foreach")),
        Contest("gpt_50m", _BELOW, 0.1, _FOR_CLIPPING),
        Contest("gpt_50m", _CLIPPED, 0.1, _FOR_CLIPPING),
        Contest("matrices_50m", _CLIPPED, 0.1, _FOR_CLIPPING),
    ),
    "cuda": (
        Contest("gpt2", "adamw", 0.15),
        Contest("llama_1g", "adamw", 0.15),
        Contest("tiny_2000", "adamw", 0.1),
        Contest(
            "llama2_7b",
            "adamw",
            0.2,
            (
                "fusedopt",
                "torch fused",
                "fusedopt, captured",
                "torch fused, captured",
                "fusedopt, master",
                "fusedopt, stochastic",
                "flashoptim",
                "optimi",
            ),
        ),
        Contest("gpt2", "adafactor", 0.15),
        Contest("llama_1g", "adafactor", 0.1),
        Contest("gpt2", _BELOW, 0.05),
        Contest("llama_1g", _BELOW, 0.05, (*_FOR_CLIPPING, "fusedopt, captured")),
        Contest("tiny_300", "adamw", 0.05, _FOR_HOSTS),
    ),
    "cuda-rest": (
        Contest("llama_1g:bfloat16", "adamw", 0.2),
        Contest("bert_base", "adamw", 0.1),
        Contest("resnet50", "adamw", 0.1),
        Contest("vit_l", "adamw", 0.1),
        Contest("embedding_2g4", "adamw", 0.1, ("fusedopt", "torch fused")),
        Contest("llama_1g:bfloat16", "adafactor", 0.1),
        Contest("resnet50", "adafactor", 0.1),
        Contest("gpt2", _CLIPPED, 0.1),
        Contest("llama2_7b", "adafactor", 0.1, ("fusedopt", "torch foreach")),
    ),
    "cuda-compiled": (
        Contest("gpt2", "adafactor", 0.4, ("fusedopt", "torch compiled")),
        Contest("gpt2", "adamw", 0.2, ("fusedopt", "torch fused", "torch compiled")),
        Contest("gpt2", "adafactor", 0.4, ("fusedopt", "transformers 4.34 loop, compiled")),
    ),
    "smoke": (
        Contest("smoke", "adamw", 0.4),
        Contest("smoke", "adafactor", 0.3),
        Contest("smoke", _CLIPPED, 0.3),
    ),
}
"""Comparisons in the order of their importance."""


def run(
    contests: Sequence[Contest], device: torch.device, seconds: float, sink: list[Record], out: Path | None
) -> None:
    """Runs comparisons one after the other, appends their records to `sink` and `out`, and prints each table."""
    file = out.open("a") if out else None
    end = time.perf_counter() + seconds
    left = sum(contest.share for contest in contests)

    def keep(records: list[Record]) -> None:
        sink.extend(records)
        if file:
            results.write(records, file)

    try:
        for contest in contests:
            keep([_copy(contest, device)])
            workload = workloads.get(contest.workload)
            rows = providers.of(contest.rule, list(contest.names) if contest.names else None)
            kind = str(workload.dtype).removeprefix("torch.")
            print(f"\n{contest.rule}: {workload.about}, {workload.params:,} {kind} in {workload.tensors:,} tensors")
            # A comparison that took longer than its share (a busy machine's first round) takes from those after it.
            share = max(0.0, end - time.perf_counter()) * contest.share / left
            left -= contest.share
            records = measure.compare(workload, rows, device, share, compiled=contest.names is not None)
            keep([*records, _copy(contest, device)])
            print(report.table(records, report.copy_bandwidth(sink)), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        if file:
            file.close()


def _copy(contest: Contest, device: torch.device) -> Record:
    """The bandwidth of a copy just before or after a comparison; the best of them is the ceiling of a run."""
    bandwidth = roofline.copy_bandwidth(device, 0.001 if contest.workload == "smoke" else None)
    return {"kind": "copy", "device": device.type, "bytes_per_second": bandwidth}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.bench", description=__doc__)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one"
    )
    parser.add_argument("--plan", choices=PLANS, help="which comparisons; default: the device's")
    parser.add_argument("--workloads", help="instead of a plan: names separated by commas, each also NAME:DTYPE")
    parser.add_argument("--rules", default="adamw", help="with --workloads: rules separated by semicolons")
    parser.add_argument("--providers", help="with --workloads: names separated by semicolons; default: all of the rule")
    parser.add_argument(
        "--seconds", type=float, default=95.0, help="time for the rounds of all comparisons together (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=min(2, torch.get_num_threads()), help="of torch on the CPU (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    parser.add_argument("--smoke", action="store_true", help="tiny tensors and no time: does everything run?")
    parser.add_argument("--backend", default="auto", help="of our providers: auto, eager, triton")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    providers.BACKEND = options.backend
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    contests = PLANS["smoke" if options.smoke else options.plan or device.type]
    if options.workloads:
        names = tuple(options.providers.split(";")) if options.providers else None
        contests = tuple(
            Contest(w, rule, 1.0, names) for w in options.workloads.split(",") for rule in options.rules.split(";")
        )
    try:
        for contest in contests:
            workloads.get(contest.workload), providers.of(contest.rule, list(contest.names or ()) or None)
    except ValueError as error:
        parser.error(str(error))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records: list[Record] = [results.environment(device)]
    if options.out:
        with options.out.open("a") as file:
            results.write(records, file)
    print(results.machine(records[0]))
    load = records[0]["load"] or 0.0
    if load > 0.5:
        print(f"other programs keep {load:.1f} cores busy: times are too long and ratios less sure")
    run(contests, device, 0.0 if options.smoke else options.seconds, records, options.out)
    bandwidth = report.copy_bandwidth(records)
    print(f"\nroofline: {(bandwidth or 0.0) / 1e9:.1f} GB/s, bytes read plus bytes written")
    run_here = {(contest.workload, contest.rule) for contest in contests}
    outcomes = [o for o in goals.judge(records, device.type) if (o.goal.workload, o.goal.rule) in run_here]
    if outcomes:
        print("\n" + report.goal_table(outcomes))
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
