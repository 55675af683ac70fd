"""Your clipping costs more than your Adam: launches counted, and times of a run of `perf.bench`."""

from pathlib import Path

from perf import report, results
from perf.primers import Primer, launches
from perf.providers import BELOW
from perf.report import Panel
from perf.results import Run

CLIP = "clip_grad_norm_ + torch fused"
RESULTS = results.COMMITTED / "cpu" / "results.jsonl"
OURS = 3
"""Launches of a step with `max_grad_norm`: the norm, the prologue, the update."""


def run(path: Path = RESULTS, workload: str = "gpt_50m") -> Primer:
    measured = Run(results.read(path))
    times = {
        (rule, r["provider"]): float(r["step_ms"]["median"])
        for rule in ("adamw", BELOW)
        for r in measured.comparisons[workload, rule]
        if r["status"] == "measured"
    }
    bars = {
        "torch fused": times["adamw", "torch fused"],
        CLIP.replace(" + ", "\n+ "): times[BELOW, CLIP],
        "fusedopt": times["adamw", "fusedopt"],
        "fusedopt,\nmax_grad_norm": times[BELOW, "fusedopt"],
    }
    rows = []
    for model, name in launches.MODELS.items():
        sizes = launches.sizes_of(name)
        for limit in launches.limits():
            counts = launches.fused_adamw(sizes, limit), launches.clipping(sizes, limit), OURS
            rows.append(_row(f"{model}, launches, torch {limit.name}", *map(str, counts)))
    fused, both, _, ours = bars.values()
    rows.append(_row(f"{workload}, ms per step", *(f"{ms:.1f}" for ms in (fused, both - fused, ours))))
    panel = Panel("AdamW on 49.9 M float32 parameters, norm below the limit", {k: [v] for k, v in bars.items()})
    return Primer(rows, report.bars_picture([panel], "ms per step", note=measured.machine))


def _row(what: str, adam: str, clip: str, ours: str) -> dict[str, str]:
    return {"": what, "fused AdamW": adam, "clip_grad_norm_": clip, "fusedopt with max_grad_norm, in all": ours}
