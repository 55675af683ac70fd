"""Time of one step: providers side by side on the same parameters, round after round, until the seconds are spent.

Each round gives every provider a few steps, in an order that moves on by one from round to round, so that a noisy
minute meets all of them. Each step gets gradients at other addresses than the step before, as in a training loop that
sets gradients to None, and all tensors together are larger than the caches unless the workload is small by intention.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType

from perf import gate, roofline, traffic
from perf.providers import Provider, Step
from perf.results import Record
from perf.workloads import Workload

ROUND_SECONDS = 0.05
"""A provider's share of a round; at least `MIN_STEPS` steps, of which the first only warms up."""

SLOW, RARELY = 2.0, 6
"""Who takes more than so many times the fastest's time is in every so many-th round: close ratios need many rounds."""

MIN_STEPS = 3


class Sample(NamedTuple):
    """One step, in milliseconds.

    Attributes:
        step: from its begin to its end: what a user waits for.
        host: until `step()` returned.
        device: of the device alone, the host being ahead; None on a CPU.
    """

    step: float
    host: float
    device: float | None = None


Clock = Callable[[Step], Sample]


def cpu_clock(step: Step) -> Sample:
    start = time.perf_counter()
    step()
    milliseconds = (time.perf_counter() - start) * 1e3
    return Sample(milliseconds, milliseconds)


class CudaClock:
    """Two looks at a step: with an idle device, and queued behind work that keeps the device busy meanwhile."""

    def __init__(self) -> None:
        self._cycles = 2_000_000  # about a millisecond; follows the host's time per step
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, step: Step) -> Sample:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._begin.record()
        step()
        self._end.record()
        host = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        idle = self._begin.elapsed_time(self._end)
        self._cycles = max(self._cycles, int(host * 3_000_000))
        torch.cuda._sleep(self._cycles)
        self._begin.record()
        step()
        self._end.record()
        torch.cuda.synchronize()
        return Sample(max(idle, host), host, self._begin.elapsed_time(self._end))


class Problem:
    """Parameters and several sets of gradients, the same for all providers."""

    def __init__(self, workload: Workload, device: torch.device, sets: int) -> None:
        self.workload, self.device = workload, device
        with torch.no_grad():
            self.params = [self._normal(shape, 0.02).requires_grad_() for shape in workload.shapes]
            self.sets = [[self._normal(shape, 0.01) for shape in workload.shapes] for _ in range(sets)]
        self._turns = itertools.cycle(range(sets))
        self._turn = 0
        self._norm = self._norm_of(0)

    def _normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return self.workload.empty_like(shape, self.device).normal_(std=std)

    def _norm_of(self, turn: int) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.sets[turn], 2, torch.float32)))

    def hand_out(self, turn: int | None = None) -> None:
        """Gives every parameter its gradient out of the next set, as a tensor object of its own."""
        self._turn = next(self._turns) if turn is None else turn
        for p, g in zip(self.params, self.sets[self._turn]):
            p.grad = g.detach()

    def restore(self) -> None:
        """Gives back to the set handed out last the norm that a clipping loop took from it."""
        torch._foreach_mul_(self.sets[self._turn], self._norm / self._norm_of(self._turn))


@dataclass
class Contestant:
    """A provider at work on a problem, and what was measured of it."""

    provider: Provider
    problem: Problem
    rounds: list[list[Sample]] = field(default_factory=list)
    step: Step | None = None
    optimizer: torch.optim.Optimizer | None = None
    facts: Record = field(default_factory=dict)

    def open(self) -> None:
        """Makes the optimizer and lets it warm up: state, compilation, capture."""
        if self.step is not None:
            return
        self.problem.hand_out(0)
        before = _allocated(self.problem.device)
        self.step, self.optimizer = self.provider.start(self.problem.params)
        self._one_step(_untimed)
        if self.facts:
            return
        self.facts["state_bytes"] = _state_bytes(self.optimizer)
        facts = _cuda_facts if self.problem.device.type == "cuda" else _cpu_facts
        self.facts |= facts(self, before)

    def close(self) -> None:
        self.step = self.optimizer = None
        gc.collect()

    def burst(self, clock: Clock, seconds: float) -> None:
        """One round's steps; the first finds the caches full of another provider's tensors and is not counted."""
        self.open()
        self._one_step(clock)
        samples: list[Sample] = []
        until = time.perf_counter() + seconds
        while len(samples) < MIN_STEPS - 1 or time.perf_counter() < until:
            samples.append(self._one_step(clock))
        self.rounds.append(samples)

    def median_ms(self) -> float:
        return statistics.median([s.step for samples in self.rounds for s in samples] or [0.0])

    def _one_step(self, clock: Clock) -> Sample:
        assert self.step is not None
        if self.provider.mode != "captured":
            self.problem.hand_out()
        sample = clock(self.step)
        if self.provider.before is not None:
            self.problem.restore()
        return sample


def compare(
    workload: Workload,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    clock: Clock | None = None,
    compiled: bool = True,
) -> list[Record]:
    """One record per provider: a provider that is missing, wrong or fails gets a record that says so, and no time.

    Args:
        workload: what they update.
        providers: of one rule.
        device: where.
        seconds: how long the rounds may last in all, beyond one round.
        clock: how a step is timed; default by the device.
        compiled: whether to measure what torch.compile makes of a step too, which takes minutes to compile.
    """
    records: dict[str, Record] = {}
    ready: list[Provider] = []
    for provider in providers:
        record = records[provider.name] = _head(workload, provider, device)
        if provider.mode == "compiled" and not compiled and provider.missing(device) is None:
            record["status"] = "skipped: takes minutes to compile, has a plan of its own"
            continue
        status = _gate(record, provider, workload, device)
        if status is None:
            ready.append(provider)
        else:
            record["status"] = status
    if ready:
        for record in _timed(workload, ready, device, seconds, clock or default_clock(device)):
            records[record["provider"]] |= record
    return list(records.values())


def default_clock(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else cpu_clock


def quantiles(values: Sequence[float]) -> Record:
    """Minimum, tenths and quarters, and how many values there were.

    Example:
        >>> quantiles([3.0, 1.0, 2.0])["median"]
        2.0
    """
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    names = {"min": 0.0, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9}
    return {**{name: round(at(share), 6) for name, share in names.items()}, "n": len(ordered)}


def _head(workload: Workload, provider: Provider, device: torch.device) -> Record:
    return {
        "kind": "step",
        "workload": workload.name,
        "rule": provider.rule,
        "provider": provider.name,
        "ours": provider.ours,
        "mode": provider.mode,
        "device": device.type,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "params": workload.params,
        "tensors": workload.tensors,
        "floor_bytes": roofline.floor(provider.rule, workload.dtype, provider.storage).total,
        "status": "measured",
    }


def _gate(record: Record, provider: Provider, workload: Workload, device: torch.device) -> str | None:
    """Why a provider is not timed, or None; notes the error in the record."""
    missing = provider.missing(device)
    if missing:
        return f"missing: {missing}"
    try:
        verdict = gate.check(provider, workload, device)
    except Exception as error:
        return f"failed: {_first_line(error)}"
    record |= {"error": verdict.error, "error_allowed": verdict.allowed}
    if not verdict.passed:
        return f"wrong here: off by {verdict.error:.2g} of the largest movement, allowed {verdict.allowed:.2g}"
    return None


def _timed(
    workload: Workload, providers: Sequence[Provider], device: torch.device, seconds: float, clock: Clock
) -> list[Record]:
    problem = Problem(workload, device, _gradient_sets(workload, device))
    together = _fit_together(workload, len(providers), device)
    contestants = [Contestant(provider, problem) for provider in providers]
    failures: dict[str, str] = {}
    end = time.perf_counter() + seconds
    number = 0
    while number == 0 or (contestants and time.perf_counter() < end):
        turn = number % len(contestants)
        bound = SLOW * min(contestant.median_ms() for contestant in contestants)
        for contestant in [*contestants[turn:], *contestants[:turn]]:
            if number > 1 and number % RARELY and contestant.median_ms() > bound:
                contestant.rounds.append([])
                continue
            try:
                contestant.burst(clock, ROUND_SECONDS)
            except Exception as error:
                failures[contestant.provider.name] = f"failed: {_first_line(error)}"
                contestant.close()
            if not together:
                contestant.close()
        contestants = [c for c in contestants if c.provider.name not in failures]
        number += 1
    records: list[Record] = [{"provider": name, "status": status} for name, status in failures.items()]
    return records + [_record(contestant, len(problem.sets)) for contestant in contestants]


def _record(contestant: Contestant, gradient_sets: int) -> Record:
    samples = [sample for samples in contestant.rounds for sample in samples]
    record: Record = {
        "provider": contestant.provider.name,
        "status": "measured",
        "gradient_sets": 1 if contestant.provider.mode == "captured" else gradient_sets,
        "step_ms": quantiles([s.step for s in samples]),
        "host_ms": quantiles([s.host for s in samples]),
        # Ratios are taken round by round: what disturbs the machine disturbs neighbours alike.
        "rounds_ms": [_median(s.step for s in samples) for samples in contestant.rounds],
        **contestant.facts,
    }
    device = [s.device for s in samples if s.device is not None]
    if device:
        record["device_ms"] = quantiles(device)
        record["rounds_device_ms"] = [_median(s.device or 0.0 for s in samples) for samples in contestant.rounds]
    return record


def _median(times: Iterable[float]) -> float | None:
    """None for a round that a provider sat out."""
    listed = list(times)
    return round(statistics.median(listed), 6) if listed else None


def _gradient_sets(workload: Workload, device: torch.device) -> int:
    size = workload.params * workload.dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 6e9
    # One parameter, its gradients, AdamW's state, and as much again for temporaries of the loops' largest tensor.
    return next((sets for sets in (3, 2) if (sets + 3.2) * size < 0.9 * free), 1)


def _fit_together(workload: Workload, providers: int, device: torch.device) -> bool:
    """Whether the states of all providers fit beside each other; else they are made anew in each round."""
    size = workload.params * workload.dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 6e9
    return (2 * providers + 2) * size < 0.8 * free


def _state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    assert optimizer is not None
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def _untimed(step: Step) -> Sample:
    step()
    return Sample(0.0, 0.0)


def _cpu_facts(contestant: Contestant, before: int) -> Record:
    """Operations of a step, the bytes that they move and the largest memory of their temporaries."""
    counts: list[traffic.Counted] = []

    def counted(step: Step) -> Sample:
        counts.append(traffic.watch(step))
        return Sample(0.0, 0.0)

    contestant._one_step(counted)
    (c,) = counts
    return {"operations": c.operations, "moved_bytes": c.read + c.written, "temporary_bytes": c.temporary}


def _cuda_facts(contestant: Contestant, before: int) -> Record:
    """Launches, time in kernels and memory of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    at_rest = torch.cuda.memory_allocated()
    contestant._one_step(_untimed)
    torch.cuda.synchronize()
    temporary = torch.cuda.max_memory_allocated() - at_rest
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        contestant._one_step(_untimed)
        torch.cuda.synchronize()
    kept = at_rest - before - contestant.facts["state_bytes"]
    return {"temporary_bytes": temporary, "workspace_bytes": max(kept, 0), **launches(profile.events())}


def launches(events: Any) -> Record:
    """Kernels and copies among a profile's events, and the time spent in kernels."""
    on_device = [e for e in events if e.device_type == DeviceType.CUDA]
    copies = [e for e in on_device if e.name.lower().startswith(("memcpy", "memset"))]
    kernels = [e for e in on_device if e not in copies]
    return {
        "launches": len(kernels),
        "copies": len(copies),
        "kernel_ms": round(sum(e.time_range.elapsed_us() for e in kernels) / 1e3, 6),
    }


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
