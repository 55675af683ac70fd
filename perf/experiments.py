"""The small experiments of the performance notebook: what a step moves, how its time grows, what memory it takes."""

from collections.abc import Sequence

import torch

from perf import measure, providers, traffic, workloads
from perf.roofline import Traffic
from perf.workloads import Workload

Curves = dict[str, list[tuple[float, float]]]
"""Provider to points (x, milliseconds per step)."""

SCALING = ("fusedopt", "torch fused", "torch foreach", "transformers 4.34 loop")


def moved(rule: str, names: Sequence[str], side: int = 256) -> dict[str, Traffic]:
    """Bytes per parameter and step of some providers, counted operation by operation on matrices of side x side.

    Example:
        >>> loop = moved("adamw", ["transformers 4.34 loop"])["transformers 4.34 loop"]
        >>> loop.read, loop.written
        (48.0, 32.0)
    """
    workload = Workload("counted", "matrices to count on", ((side, side),) * 4)
    rows = {}
    for provider in providers.of(rule, list(names)):
        if provider.missing(torch.device("cpu")) is None:
            counted = traffic.count(provider, workload)
            rows[provider.name] = Traffic(counted.read / workload.params, counted.written / workload.params)
    return {name: rows[name] for name in names if name in rows}


def operations(rule: str, names: Sequence[str], workload: Workload) -> dict[str, int]:
    """Operations that touch memory in one step, each a launch in a for-loop on a GPU. Shapes are cut down to count."""
    small = workloads.Workload("counted", "", tuple(tuple(min(2, d) for d in s) for s in workload.shapes))
    rows = [p for p in providers.of(rule, list(names)) if p.missing(torch.device("cpu")) is None]
    counted = {p.name: traffic.count(p, small).operations for p in rows}
    return {name: counted[name] for name in names if name in counted}


def scaling(sizes: Sequence[Workload], xs: Sequence[float], device: torch.device, seconds: float) -> Curves:
    """Median step time of AdamW on one workload per x."""
    rows = providers.of("adamw", list(SCALING))
    curves: Curves = {}
    for workload, x in zip(sizes, xs):
        for record in measure.compare(workload, rows, device, seconds / len(sizes)):
            if record["status"] == "measured":
                curves.setdefault(record["provider"], []).append((x, record["step_ms"]["median"]))
    return curves


def memory(rule: str, names: Sequence[str], dtype: torch.dtype = torch.float32) -> dict[str, tuple[float, float]]:
    """Bytes per parameter of state and of a step's temporaries, on four equal matrices."""
    workload = Workload("weighed", "matrices to weigh", ((256, 256),) * 4, dtype)
    rows = {}
    for provider in providers.of(rule, list(names)):
        if provider.missing(torch.device("cpu")) is not None:
            continue
        problem = measure.Problem(workload, torch.device("cpu"), 1)
        contestant = measure.Contestant(provider, problem)
        contestant.open()
        facts = contestant.facts
        rows[provider.name] = (facts["state_bytes"] / workload.params, facts["temporary_bytes"] / workload.params)
    return {name: rows[name] for name in names if name in rows}
