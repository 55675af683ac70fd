"""Goals: what the benchmarks are to show, as ratios of providers that were measured side by side in one run."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from perf.results import Record


class Goal(NamedTuple):
    """One line to be ahead of.

    Attributes:
        device: "cpu" or "cuda".
        workload: a workload's name.
        rule: a rule.
        ours: our provider.
        theirs: the provider to compare with; "copy" for the bandwidth of a copy.
        limit: least speed-up (theirs over ours), most time (ours over theirs), or least share of a copy's bandwidth.
        kind: "speedup", "time" or "bandwidth".
        clock: which time: "step", "host" or "device".
    """

    device: str
    workload: str
    rule: str
    ours: str
    theirs: str
    limit: float
    kind: str = "speedup"
    clock: str = "step"

    def __str__(self) -> str:
        where = f"{self.rule}, {self.workload}"
        if self.kind == "bandwidth":
            return f"{where}: at least {self.limit:.0%} of a copy's bandwidth"
        if self.kind == "time":
            return f"{where}: at most {self.limit:g} times the time of {self.theirs}"
        clock = "host's time " if self.clock == "host" else ""
        return f"{where}: {clock}{self._speed()} {self.theirs}"

    def _speed(self) -> str:
        return "faster than" if self.limit == 1.0 else f"at least {self.limit:g} times as fast as"


class Outcome(NamedTuple):
    """What came of a goal.

    Attributes:
        goal: the goal.
        value: the median over rounds of the ratio that the goal limits, None where it could not be measured.
        low, high: between them lies the true median with a probability of 95 %, if rounds are independent.
        fastest: the ratio of the fastest steps of both.
        verdict: "met", "missed" or "not measured: why".
    """

    goal: Goal
    value: float | None
    low: float | None
    high: float | None
    fastest: float | None
    verdict: str


_LOOP, _FUSED, _FOREACH = "transformers 4.34 loop", "torch fused", "torch foreach"
_BELOW, _CLIPPED = "adamw, norm below the limit", "adamw, clipped"
_CLIP_FUSED = "clip_grad_norm_ + torch fused"

GOALS = (
    Goal("cpu", "gpt_50m", "adamw", "fusedopt", _FUSED, 1.05, "time"),
    Goal("cpu", "gpt_50m", "adamw", "fusedopt", _LOOP, 3.0),
    Goal("cpu", "tiny_2000", "adamw", "fusedopt", _FUSED, 1.0),
    Goal("cpu", "tiny_300", "adamw", "fusedopt", _FUSED, 1.0),
    Goal("cpu", "gpt_50m", "adafactor", "fusedopt", _LOOP, 2.5),
    Goal("cpu", "gpt_50m", "adafactor", "fusedopt", _FOREACH, 4.0),
    Goal("cpu", "gpt_50m", "adafactor", "fusedopt", "timm", 1.0),
    Goal("cpu", "gpt_50m", _BELOW, "fusedopt", _CLIP_FUSED, 1.15),
    Goal("cpu", "gpt_50m", _CLIPPED, "fusedopt", _CLIP_FUSED, 1.0),
    Goal("cpu", "matrices_50m", "adafactor", "fusedopt", _LOOP, 2.5),
    Goal("cpu", "matrices_50m", "adafactor", "fusedopt", _FOREACH, 4.0),
    Goal("cpu", "matrices_50m", _CLIPPED, "fusedopt", _CLIP_FUSED, 1.1),
    *(
        Goal("cuda", workload, "adamw", "fusedopt", "copy", 0.9, "bandwidth", "device")
        for workload in ("llama_1g", "llama_1g:bfloat16", "llama2_7b")
    ),
    *(
        Goal("cuda", workload, "adamw", ours, theirs, 1.0)
        for workload in ("gpt2", "llama_1g", "llama2_7b", "tiny_2000")
        for ours, theirs in (("fusedopt", _FUSED), ("fusedopt, captured", f"{_FUSED}, captured"))
    ),
    *(Goal("cuda", workload, "adamw", "fusedopt", _FUSED, 1.0, clock="host") for workload in ("tiny_300", "tiny_2000")),
    Goal("cuda", "llama2_7b", "adamw", "fusedopt", _FUSED, 1.5, clock="device"),
    Goal("cuda", "gpt2", "adafactor", "fusedopt", _LOOP, 10.0),
    Goal("cuda", "gpt2", "adafactor", "fusedopt", f"{_LOOP}, compiled", 1.0),
    Goal("cuda", "llama_1g", "adafactor", "fusedopt", _LOOP, 5.0),
    Goal("cuda", "llama_1g", "adafactor", "fusedopt", "copy", 0.75, "bandwidth", "device"),
    Goal("cuda", "gpt2", _BELOW, "fusedopt", _CLIP_FUSED, 1.2),
    Goal("cuda", "llama_1g", _BELOW, "fusedopt", _CLIP_FUSED, 1.2),
)


def judge(records: Iterable[Record], device: str) -> list[Outcome]:
    """The outcome of every goal for this kind of device."""
    records = list(records)
    steps: dict[tuple[str, str, str], Record] = {}
    for r in records:
        # A later comparison without a number takes none away.
        if r.get("kind") == "step" and (
            r["status"] == "measured" or (r["workload"], r["rule"], r["provider"]) not in steps
        ):
            steps[r["workload"], r["rule"], r["provider"]] = r
    copies = [r["bytes_per_second"] for r in records if r.get("kind") == "copy"]
    return [_outcome(goal, steps, copies) for goal in GOALS if goal.device == device]


def _outcome(goal: Goal, steps: dict[tuple[str, str, str], Record], copies: list[float]) -> Outcome:
    def find(provider: str) -> Record | str:
        record = steps.get((goal.workload, goal.rule, provider))
        if record is None:
            return f"{provider} did not run"
        return record if record["status"] == "measured" else f"{provider}: {record['status']}"

    ours = find(goal.ours)
    if isinstance(ours, str):
        return Outcome(goal, None, None, None, None, f"not measured: {ours}")
    if goal.kind == "bandwidth":
        if not copies:
            return Outcome(goal, None, None, None, None, "not measured: no copy was")
        return _bandwidth(goal, ours, max(copies))
    theirs = find(goal.theirs)
    if isinstance(theirs, str):
        return Outcome(goal, None, None, None, None, f"not measured: {theirs}")
    return _ratio(goal, ours, theirs)


def _bandwidth(goal: Goal, ours: Record, copy: float) -> Outcome:
    need = ours["floor_bytes"] * ours["params"] / copy * 1e3
    times: Record = ours.get(f"{goal.clock}_ms") or ours["step_ms"]
    value, low, high, fastest = (need / times[q] for q in ("median", "p75", "p25", "min"))
    return Outcome(goal, value, low, high, fastest, "met" if value >= goal.limit else "missed")


def _ratio(goal: Goal, ours: Record, theirs: Record) -> Outcome:
    up, down = (ours, theirs) if goal.kind == "time" else (theirs, ours)
    rounds = "rounds_device_ms" if goal.clock == "device" else "rounds_ms"
    key = f"{goal.clock}_ms"
    if goal.clock == "host":
        ratios = [up[key][q] / down[key][q] for q in ("p10", "p25", "median", "p75", "p90")]
    else:
        ratios = [a / b for a, b in zip(up[rounds], down[rounds]) if a and b]
    value = statistics.median(ratios)
    low, high = interval(ratios)
    return Outcome(
        goal, value, low, high, up[key]["min"] / down[key]["min"], _verdict(goal, value, low, high, len(ratios))
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Two of the values that enclose the median of what they were drawn from, with a probability of 95 %.

    Example:
        >>> interval([float(i) for i in range(100)])
        (40.0, 59.0)
    """
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))
    low = math.floor(len(ordered) / 2 - reach)
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, len(ordered) - 1 - low)]


def _verdict(goal: Goal, value: float, low: float, high: float, rounds: int) -> str:
    """Met or missed; unsure where chance could have made it so, or where too few rounds were there to say anything."""
    met = value <= goal.limit if goal.kind == "time" else value >= goal.limit
    unsure = rounds < 5 or low <= goal.limit <= high
    return ("met" if met else "missed") + ", unsure" * unsure
