"""Goals are judged by ratios of providers that were measured side by side in one run."""

import math
import statistics
from typing import NamedTuple

from perf import plans
from perf.plans import COPY, Comparison, Goal
from perf.results import Record, Run


class Outcome(NamedTuple):
    """Result of a goal."""

    comparison: Comparison
    goal: Goal
    verdict: str  # "met", "missed" or "not measured: why"
    value: float | None = None  # median over the rounds of the ratio that the goal limits
    low: float | None = None  # the true median is in [low, high] with a probability of 95 %, if rounds are independent
    high: float | None = None
    fastest: float | None = None  # the ratio of the fastest steps of both


def judge(run: Run) -> list[Outcome]:
    """Returns the outcome of every goal for the kind of device that the run was on."""
    return [outcome(comparison, goal, run) for comparison, goal in plans.goals(run.device)]


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
