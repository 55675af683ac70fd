"""Goals: what the benchmarks are to show, as ratios of providers that were measured side by side in one run."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from perf.results import Record

_LOOP, _FUSED, _FOREACH = "transformers 4.34 loop", "torch fused", "torch foreach"
BELOW, CLIPPED = "adamw, norm below the limit", "adamw, clipped"
CLIP_FUSED = "clip_grad_norm_ + torch fused"


class Goal(NamedTuple):
    """One line to be ahead of: speed-up (theirs over ours), time (ours over theirs), or share of a copy's bandwidth."""

    device: str  # "cpu" or "cuda"
    workload: str
    rule: str
    theirs: str  # the provider to compare with; "copy" for the bandwidth of a copy
    limit: float  # least speed-up, most time, least bandwidth
    kind: str = "speedup"  # or "time" or "bandwidth"
    clock: str = "step"  # or "host" or "device"
    ours: str = "fusedopt"

    def __str__(self) -> str:
        where = f"{self.rule}, {self.workload}"
        if self.kind == "bandwidth":
            return f"{where}: at least {self.limit:.0%} of a copy's bandwidth"
        if self.kind == "time":
            return f"{where}: at most {self.limit:g} times the time of {self.theirs}"
        host = "host's time " if self.clock == "host" else ""
        speed = "faster than" if self.limit == 1.0 else f"at least {self.limit:g} times as fast as"
        return f"{where}: {host}{speed} {self.theirs}"


class Outcome(NamedTuple):
    """What came of a goal."""

    goal: Goal
    verdict: str  # "met", "missed" or "not measured: why"
    value: float | None = None  # median over the rounds of the ratio that the goal limits
    low: float | None = None  # the true median is in [low, high] with a probability of 95 %, if rounds are independent
    high: float | None = None
    fastest: float | None = None  # the ratio of the fastest steps of both


GOALS = (
    Goal("cpu", "gpt_50m", "adamw", _FUSED, 1.05, "time"),
    Goal("cpu", "gpt_50m", "adamw", _LOOP, 3.0),
    Goal("cpu", "tiny_2000", "adamw", _FUSED, 1.0),
    Goal("cpu", "tiny_300", "adamw", _FUSED, 1.0),
    Goal("cpu", "gpt_50m", "adafactor", _LOOP, 2.5),
    Goal("cpu", "gpt_50m", "adafactor", _FOREACH, 4.0),
    Goal("cpu", "gpt_50m", "adafactor", "timm", 1.0),
    Goal("cpu", "gpt_50m", BELOW, CLIP_FUSED, 1.15),
    Goal("cpu", "gpt_50m", CLIPPED, CLIP_FUSED, 1.0),
    Goal("cpu", "matrices_50m", "adafactor", _LOOP, 2.5),
    Goal("cpu", "matrices_50m", "adafactor", _FOREACH, 4.0),
    Goal("cpu", "matrices_50m", CLIPPED, CLIP_FUSED, 1.1),
    *(
        Goal("cuda", workload, "adamw", "copy", 0.9, "bandwidth", "device")
        for workload in ("llama_1g", "llama_1g:bfloat16", "llama2_7b")
    ),
    *(
        Goal("cuda", workload, "adamw", _FUSED + mode, 1.0, ours="fusedopt" + mode)
        for workload in ("gpt2", "llama_1g", "llama2_7b", "tiny_2000")
        for mode in ("", ", captured")
    ),
    *(Goal("cuda", workload, "adamw", _FUSED, 1.0, clock="host") for workload in ("tiny_300", "tiny_2000")),
    Goal("cuda", "llama2_7b", "adamw", _FUSED, 1.5, clock="device"),
    Goal("cuda", "gpt2", "adafactor", _LOOP, 10.0),
    Goal("cuda", "gpt2", "adafactor", f"{_LOOP}, compiled", 1.0),
    Goal("cuda", "llama_1g", "adafactor", _LOOP, 5.0),
    Goal("cuda", "llama_1g", "adafactor", "copy", 0.75, "bandwidth", "device"),
    Goal("cuda", "gpt2", BELOW, CLIP_FUSED, 1.2),
    Goal("cuda", "llama_1g", BELOW, CLIP_FUSED, 1.2),
)


def judge(records: Iterable[Record], device: str, goals: Iterable[Goal] = GOALS) -> list[Outcome]:
    """Returns the outcome of every goal for this kind of device."""
    steps: dict[tuple[str, ...], Record] = {}
    copies: list[float] = []
    for r in records:
        if r.get("kind") == "copy":
            copies.append(r["bytes_per_second"])
        elif r.get("kind") == "step":
            key = r["workload"], r["rule"], r["provider"]
            if r["status"] == "measured" or key not in steps:  # a later one without a number takes none away
                steps[key] = r
    return [_outcome(goal, steps, max(copies, default=None)) for goal in goals if goal.device == device]


def _outcome(goal: Goal, steps: dict[tuple[str, ...], Record], copy: float | None) -> Outcome:
    found = []
    for provider in (goal.ours, goal.theirs):
        record = steps.get((goal.workload, goal.rule, provider))
        if provider == "copy":
            if copy is None:
                return Outcome(goal, "not measured: no copy was")
        elif record is None:
            return Outcome(goal, f"not measured: {provider} did not run")
        elif record["status"] != "measured":
            return Outcome(goal, f"not measured: {provider}: {record['status']}")
        else:
            found.append(record)
    if copy is not None and goal.kind == "bandwidth":
        (ours,) = found
        need = ours["floor_bytes"] * ours["params"] / copy * 1e3
        times: Record = ours.get(f"{goal.clock}_ms") or ours["step_ms"]
        value, low, high, fastest = (need / times[q] for q in ("median", "p75", "p25", "min"))
        return Outcome(goal, "met" if value >= goal.limit else "missed", value, low, high, fastest)
    up, down = found if goal.kind == "time" else found[::-1]
    key = f"{goal.clock}_ms"
    if goal.clock == "host":
        ratios = [up[key][q] / down[key][q] for q in ("p10", "p25", "median", "p75", "p90")]
    else:
        rounds = "rounds_device_ms" if goal.clock == "device" else "rounds_ms"
        ratios = [a / b for a, b in zip(up[rounds], down[rounds]) if a and b]
    value = statistics.median(ratios)
    low, high = interval(ratios)
    met = value <= goal.limit if goal.kind == "time" else value >= goal.limit
    # Unsure where chance could have made it so, or where too few rounds were there to say anything.
    unsure = ", unsure" * (len(ratios) < 5 or low <= goal.limit <= high)
    return Outcome(goal, ("met" if met else "missed") + unsure, value, low, high, up[key]["min"] / down[key]["min"])


def interval(values: list[float]) -> tuple[float, float]:
    """Returns two of the values that enclose the median of what they were drawn from, with a probability of 95 %."""
    ordered = sorted(values)
    low = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
    return ordered[low], ordered[-1 - low]
