"""Plans of `perf.bench`: which providers are compared on which workload, for how long, and the goals to meet.

Goals are judged by ratios of providers that were measured side by side in one run.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, NamedTuple

from perf import providers
from perf.providers import BELOW, CLIPPED, FLOAT32_COPY, LOOP, WITH_STATISTICS, Provider
from perf.results import Record, Run

COPY = "copy"
"""In place of a provider: a copy of as many bytes as the update must move."""


class Goal(NamedTuple):
    """A provider to be ahead of."""

    theirs: str
    limit: float  # least speed-up (their time over ours; over `COPY`, the share of its bandwidth), or most time
    kind: str = "speedup"  # or "time": ours over theirs
    clock: str = "step"  # or "host" or "device"
    ours: str = "fusedopt"
    headline: str = ""  # words behind the ratio where it stands among the first that a reader sees

    def __str__(self) -> str:
        who = "" if self.ours == "fusedopt" else f"{self.ours}: "
        if self.theirs == COPY:
            return f"{who}at least {self.limit:.0%} of a copy's bandwidth"
        if self.kind == "time":
            return f"{who}at most {self.limit:g} times the time of {self.theirs}"
        speed = "faster than" if self.limit == 1.0 else f"at least {self.limit:g} times as fast as"
        return f"{who}{'host time ' * (self.clock == 'host')}{speed} {self.theirs}"


class Comparison(NamedTuple):
    """Providers side by side on one workload, or a provider with every combination of values of constants."""

    workload: str
    rule: str
    share: float = 1.0  # of the time
    names: tuple[str, ...] | None = None  # None for all of the rule that need not be asked for
    goals: tuple[Goal, ...] = ()
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # paths of constants, and values to try besides their own

    def providers(self) -> list[Provider]:
        """Returns who is compared; of a sweep, the code as it stands comes first."""
        rows = [p for p in providers.of(self.rule, self.names) if self.names or not p.on_request]
        if not self.sweep:
            return rows
        values = [dict.fromkeys((resolve_name(path), *others)) for path, others in self.sweep]
        rows_of_sweep = []
        for combination in itertools.product(*values):
            constants = tuple(zip((path for path, _ in self.sweep), combination))
            label = ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in constants)
            rows_of_sweep += [replace(row, name=f"{row.name}, {label}", constants=constants) for row in rows]
        return rows_of_sweep

    @property
    def title(self) -> str:
        return " x ".join([self.rule, *(path.rpartition(".")[2] for path, _ in self.sweep)])


class Outcome(NamedTuple):
    """Result of a goal."""

    comparison: Comparison
    goal: Goal
    verdict: str  # "met", "missed" or "not measured: why"
    value: float | None = None  # median over the rounds of the ratio that the goal limits
    low: float | None = None  # the true median is in [low, high] with a probability of 95 %, if rounds are independent
    high: float | None = None
    fastest: float | None = None  # the ratio of the fastest steps of both


def outcome(comparison: Comparison, goal: Goal, run: Run) -> Outcome:
    """Returns the result of one goal."""
    group = run.comparisons.get((comparison.workload, comparison.rule), [])
    # A later record without a number does not replace one with a number.
    steps: dict[str, Record] = {r["provider"]: r for r in sorted(group, key=lambda r: r["status"] == "measured")}
    rounds, quantiles = "rounds_ms" if goal.clock == "step" else f"rounds_{goal.clock}_ms", f"{goal.clock}_ms"
    if goal.theirs == COPY and rounds in steps.get(goal.ours, {}) and run.bandwidth:
        need = run.floor_ms(steps[goal.ours])
        times = [need] * len(steps[goal.ours][rounds])
        steps[COPY] = {"status": "measured", rounds: times, quantiles: {"min": need}}
    for provider in (goal.ours, goal.theirs):
        status = steps[provider]["status"] if provider in steps else "did not run"
        if status != "measured":
            return Outcome(comparison, goal, f"not measured: {provider}: {status}")
    up, down = steps[goal.theirs], steps[goal.ours]
    if goal.kind == "time":
        up, down = down, up
    ratios = sorted(a / b for a, b in zip(up[rounds], down[rounds]) if a and b)
    value = statistics.median(ratios)
    # Two of the values that enclose the median of what they were drawn from with that probability.
    outer = max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))
    low, high = ratios[outer], ratios[-1 - outer]
    met = value <= goal.limit if goal.kind == "time" else value >= goal.limit
    # Unsure where chance could have made it so, or where too few rounds were there to say anything.
    unsure = ", unsure" * (len(ratios) < 5 or low <= goal.limit <= high)
    fastest = up[quantiles]["min"] / down[quantiles]["min"]
    return Outcome(comparison, goal, ("met" if met else "missed") + unsure, value, low, high, fastest)


_FUSED, _FOREACH = "torch fused", "torch foreach"
_CLIP_FUSED = f"clip_grad_norm_ + {_FUSED}"
_OURS = ("fusedopt",)
_FOR_CLIPPING = ("fusedopt", _CLIP_FUSED)
_FOR_HOSTS = ("fusedopt", _FUSED, _FOREACH)
_FOR_HOSTS_AND_GRAPHS = (*_FOR_HOSTS, "fusedopt, captured", f"{_FUSED}, captured")
_ORIGINALS = ("fusedopt", LOOP, _FOREACH)
_TRACKED, _MASTER = "fusedopt, statistics", "fusedopt, master_weights"
_WITH_STATISTICS = ("fusedopt", _TRACKED)
_IN_BFLOAT16 = (*_WITH_STATISTICS, _FUSED, "fusedopt, captured", f"{_FUSED}, captured", "flashoptim", "optimi")
_ON_A_CPU = ("gpt_50m", "matrices_50m", "tiny_2000")

_FASTER = Goal(_FUSED, 1.0)
_FASTER_CAPTURED = Goal("torch fused, captured", 1.0, ours="fusedopt, captured")
_MUCH_FASTER = Goal(_FUSED, 1.3, clock="device")
_FASTER_HOST = Goal(_FUSED, 1.0, clock="host")
_SHARE = Goal(COPY, 0.9, clock="device")
_SHARE_AT_1G = _SHARE._replace(headline="AdamW of 1.1 G parameters in float32")
_SHARE_AT_7B = _SHARE._replace(headline="AdamW of Llama-2 7B in bfloat16")
_SHARE_OF_ADAFACTOR = _SHARE._replace(headline="Adafactor of 1.1 G parameters in float32")
_AS_A_PLAIN_STEP = Goal("fusedopt", 1.05, "time", clock="device", ours=_TRACKED)
_STATISTICS = (Goal("fusedopt", 1.6, "time", ours=_TRACKED), Goal(WITH_STATISTICS, 1.5, ours=_TRACKED))
_MASTER_WEIGHTS = (Goal(FLOAT32_COPY, 1.0, "time", ours=_MASTER),)
_AS_FAST = "as fast as the loop of transformers 4.34:"
_CLIPPED_AS_FAST = "as fast as `clip_grad_norm_` and fused AdamW: AdamW with `max_grad_norm=`, not exceeded"

_FASTER_AT_7B = _FASTER._replace(headline="as fast as torch's fused AdamW: AdamW of Llama-2 7B in bfloat16")
_AS_THE_LOOP_AT_1G = Goal(LOOP, 5.0, headline=f"{_AS_FAST} Adafactor of 1.1 G parameters in float32")

_BLOCKS = (
    ("fusedopt_kernels.elementwise.BLOCK", (1024, 2048, 4096, 8192)),
    ("fusedopt_kernels.elementwise.THREADS", (128, 256, 512)),
)
_TILES = (
    ("fusedopt_kernels.adafactor.plan.BLOCK", (1024, 2048, 4096)),
    ("fusedopt_kernels.adafactor.plan.TILE_HEIGHT", (128, 256, 512)),
)
_SWEPT = ("llama_1g:bfloat16", "llama_1g", "gpt2")
_NORM = (("fusedopt_kernels.norm.BLOCK", (2048, 4096, 8192)),)

PLANS: dict[str, tuple[Comparison, ...]] = {
    "cpu": (
        Comparison(
            *("gpt_50m", "adamw", 0.2),
            goals=(Goal(_FUSED, 1.05, "time"), Goal(LOOP, 3.0, headline=f"{_AS_FAST} AdamW")),
        ),
        Comparison("tiny_2000", "adamw", 0.07, goals=(_FASTER,)),
        Comparison("tiny_300", "adamw", 0.03, _FOR_HOSTS, (_FASTER,)),
        Comparison(
            *("gpt_50m", "adafactor", 0.24),
            goals=(Goal(LOOP, 2.5, headline=f"{_AS_FAST} Adafactor"), Goal(_FOREACH, 4.0), Goal("timm", 1.0)),
        ),
        Comparison("gpt_50m", BELOW, 0.1, _FOR_CLIPPING, (Goal(_CLIP_FUSED, 1.15, headline=_CLIPPED_AS_FAST),)),
        Comparison("gpt_50m", CLIPPED, 0.1, _FOR_CLIPPING, (Goal(_CLIP_FUSED, 1.0),)),
        Comparison("matrices_50m", "adafactor", 0.16, _ORIGINALS, (Goal(LOOP, 2.5), Goal(_FOREACH, 4.0))),
        Comparison("matrices_50m", CLIPPED, 0.1, _FOR_CLIPPING, (Goal(_CLIP_FUSED, 1.1),)),
    ),
    "cuda": (
        Comparison("gpt2", "adamw", 0.15, goals=(_FASTER, _FASTER_CAPTURED)),
        Comparison(
            *("llama_1g", "adamw", 0.15),
            goals=(_SHARE_AT_1G, _FASTER, _FASTER_CAPTURED, _AS_A_PLAIN_STEP),
        ),
        Comparison(
            *("llama2_7b", "adamw", 0.15, _IN_BFLOAT16),
            goals=(_SHARE_AT_7B, _FASTER_AT_7B, _FASTER_CAPTURED, _MUCH_FASTER, _AS_A_PLAIN_STEP),
        ),
        Comparison("tiny_2000", "adamw", 0.1, _FOR_HOSTS_AND_GRAPHS, (_FASTER, _FASTER_CAPTURED, _FASTER_HOST)),
        Comparison("tiny_300", "adamw", 0.05, _FOR_HOSTS_AND_GRAPHS, (_FASTER_CAPTURED, _FASTER_HOST)),
        Comparison("llama_1g", "adafactor", 0.1, goals=(_SHARE_OF_ADAFACTOR, _AS_THE_LOOP_AT_1G)),
        Comparison("gpt2", "adafactor", 0.1, goals=(Goal(LOOP, 10.0),)),
        Comparison("gpt2", BELOW, 0.05, goals=(Goal(_CLIP_FUSED, 1.2),)),
        Comparison("llama_1g", BELOW, 0.05, (*_FOR_CLIPPING, "fusedopt, captured"), (_SHARE, Goal(_CLIP_FUSED, 1.2))),
        Comparison(
            *("llama_1g:bfloat16", "adamw", 0.05, (*_IN_BFLOAT16, _MASTER, FLOAT32_COPY)),
            goals=(_SHARE, _FASTER, *_MASTER_WEIGHTS),
        ),
        Comparison("llama_1g:bfloat16", "adafactor", 0.05, ("fusedopt", "fusedopt, captured", _FOREACH), (_SHARE,)),
    ),
    "cuda-rest": (
        *(Comparison(name, "adamw", 0.1) for name in ("bert_base", "resnet50", "vit_l")),
        Comparison("embedding_2g4", "adamw", 0.1, ("fusedopt", _FUSED)),
        Comparison("resnet50", "adafactor", 0.1),
        Comparison("gpt2", CLIPPED, 0.1),
        Comparison("llama2_7b", "adafactor", 0.1, ("fusedopt", _FOREACH)),
    ),
    "cuda-compiled": (
        Comparison("gpt2", "adafactor", 0.4, ("fusedopt", "torch compiled")),
        Comparison("gpt2", "adamw", 0.2, ("fusedopt", _FUSED, "torch compiled")),
        Comparison("gpt2", "adafactor", 0.4, ("fusedopt", f"{LOOP}, compiled"), (Goal(f"{LOOP}, compiled", 1.0),)),
    ),
    "sweeps": (
        *(Comparison(name, "adafactor", 1.5, _OURS, sweep=_TILES) for name in _SWEPT),
        *(Comparison(name, "adamw", 1.0, _OURS, sweep=_BLOCKS) for name in _SWEPT),
        Comparison("llama_1g", BELOW, 3.0, _OURS, sweep=_NORM),
    ),
    "statistics": tuple(
        Comparison(name, "adamw", 1.0, (*_WITH_STATISTICS, WITH_STATISTICS), _STATISTICS) for name in _ON_A_CPU
    ),
    "master-weights": tuple(
        Comparison(f"{name}:bfloat16", "adamw", 1.0, (_MASTER, FLOAT32_COPY), _MASTER_WEIGHTS) for name in _ON_A_CPU
    ),
    "smoke": (
        Comparison("smoke", "adamw", 1.0, ("fusedopt", _FUSED)),
        Comparison("smoke", "adamw", 1.0, _OURS, sweep=(("fusedopt_kernels.elementwise.BLOCK", (1024,)),)),
    ),
}
"""Comparisons in the order of their importance. In a sweep, the constants that won are those in the code."""


def of_device(device: str) -> list[Comparison]:
    """Returns the comparisons for a kind of device, "cpu" or "cuda", on which it is judged."""
    return [c for name, comparisons in PLANS.items() if name.partition("-")[0] == device for c in comparisons]


def goals_of(workload: str, rule: str, device: str) -> tuple[Goal, ...]:
    """Returns the goals for a workload and a rule on a kind of device."""
    return tuple(goal for c in of_device(device) if c[:2] == (workload, rule) for goal in c.goals)


def judge(run: Run, comparisons: Sequence[Comparison] | None = None) -> list[Outcome]:
    """Returns the outcome of every goal of these comparisons; by default of those for the run's kind of device."""
    chosen = of_device(run.device) if comparisons is None else comparisons
    return [outcome(comparison, goal, run) for comparison in chosen for goal in comparison.goals]
