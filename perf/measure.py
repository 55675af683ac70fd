"""Time of one step: providers side by side on the same parameters, round after round, until the seconds are spent.

Each round gives every provider a few steps, in an order that moves on by one from round to round, so that a noisy
minute meets all of them. Each step gets gradients at other addresses than the step before, as in a training loop that
sets gradients to None, and all tensors together are larger than the caches unless the workload is small by intention.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType

from perf import gate, traffic
from perf.providers import RULES, Provider, Step
from perf.results import Record
from perf.workloads import Workload

ROUND_SECONDS = 0.05
"""A provider's share of a round; at least `MIN_STEPS` steps, of which the first only warms up."""
MIN_STEPS = 3

SLOW, RARELY = 2.0, 6
"""Who takes more than so many times the fastest's time is in every so many-th round: close ratios need many rounds."""


class Sample(NamedTuple):
    """One step, in milliseconds."""

    step: float  # from its begin to its end: what a user waits for
    host: float  # until `step()` returned
    device: float | None = None  # of the device alone, the host being ahead; None on a CPU


Clock = Callable[[Step], Sample]
T = TypeVar("T")


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
        self._record(step)
        host = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        idle = self._begin.elapsed_time(self._end)
        self._cycles = max(self._cycles, int(host * 3_000_000))
        torch.cuda._sleep(self._cycles)
        self._record(step)
        torch.cuda.synchronize()
        return Sample(max(idle, host), host, self._begin.elapsed_time(self._end))

    def _record(self, step: Step) -> None:
        self._begin.record()
        step()
        self._end.record()


def _untimed(step: Step) -> None:
    step()


class Problem:
    """Parameters and several sets of gradients, the same for all providers."""

    def __init__(self, workload: Workload, device: torch.device, sets: int) -> None:
        self.workload, self.device = workload, device
        with torch.no_grad():
            self.params = [self._normal(shape, 0.02).requires_grad_() for shape in workload.shapes]
            self.sets = [[self._normal(shape, 0.01) for shape in workload.shapes] for _ in range(sets)]
        self._next = itertools.cycle(self.sets)
        self._current = self.sets[0]
        self._norm = self._norm_of_current()

    def _normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return self.workload.empty(shape, self.device).normal_(std=std)

    def _norm_of_current(self) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._current, 2, torch.float32)))

    def set_grads(self) -> None:
        """Gives every parameter its gradient out of the next set, as a tensor object of its own."""
        self._current = next(self._next)
        for p, g in zip(self.params, self._current):
            p.grad = g.detach()

    def restore_norm(self) -> None:
        """Gives the current set the norm back that a clipping loop took from it."""
        torch._foreach_mul_(self._current, self._norm / self._norm_of_current())


class Candidate:
    """A provider at work on a problem, and what was measured of it."""

    def __init__(self, provider: Provider, problem: Problem) -> None:
        self.provider, self.problem = provider, problem
        self.rounds: list[list[Sample]] = []
        self.facts: Record = {}
        self._step: Step | None = None
        self._optimizer: torch.optim.Optimizer | None = None  # whose memory a captured step uses

    def open(self) -> None:
        """Makes the optimizer, lets it warm up (state, compilation, capture) and, once, notes what its step takes."""
        if self._step is not None:
            return
        self.problem.set_grads()
        on_gpu = self.problem.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        self._step, self._optimizer = self.provider.start(self.problem.params)
        self.one_step(_untimed)
        if not self.facts:
            self.facts = {"state_bytes": traffic.state_bytes(self._optimizer)}
            self.facts |= _cuda_facts(self, before) if on_gpu else _cpu_facts(self)

    def close(self) -> None:
        self._step = self._optimizer = None
        gc.collect()

    def measure_round(self, clock: Clock, seconds: float) -> None:
        """Takes one round's steps; the first finds the caches full of other tensors and is not counted."""
        self.open()
        self.one_step(clock)
        samples: list[Sample] = []
        until = time.perf_counter() + seconds
        while len(samples) < MIN_STEPS - 1 or time.perf_counter() < until:
            samples.append(self.one_step(clock))
        self.rounds.append(samples)

    def median_ms(self) -> float:
        return _median([s.step for samples in self.rounds for s in samples]) or 0.0

    def one_step(self, observe: Callable[[Step], T]) -> T:
        """Takes a step under something that times or counts it, as in a training loop; returns what that returns."""
        assert self._step is not None
        if self.provider.mode != "captured":
            self.problem.set_grads()
        observed = observe(self._step)
        if self.provider.clips:
            self.problem.restore_norm()
        return observed

    def record(self) -> Record:
        samples = [sample for samples in self.rounds for sample in samples]
        record: Record = {"gradient_sets": 1 if self.provider.mode == "captured" else len(self.problem.sets)}
        # Ratios are taken round by round: what disturbs the machine disturbs neighbours alike.
        record |= {"step_ms": quantiles([s.step for s in samples]), "rounds_ms": self._medians("step")}
        record |= {"host_ms": quantiles([s.host for s in samples]), **self.facts}
        if device := [s.device for s in samples if s.device is not None]:
            record |= {"device_ms": quantiles(device), "rounds_device_ms": self._medians("device")}
        return record

    def _medians(self, name: str) -> list[float | None]:
        return [_median([getattr(s, name) for s in samples]) for samples in self.rounds]


def compare(
    workload: Workload,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    clock: Clock | None = None,
    compiled: bool = True,
) -> list[Record]:
    """Returns one record per provider; one that is missing, wrong or fails gets the reason as status, and no time.

    Rounds last `seconds` in all, beyond the first. What torch.compile makes of a step takes minutes to compile.
    """
    records: dict[str, Record] = {}
    ready: list[Provider] = []
    for provider in providers:
        record = records[provider.name] = {
            "kind": "step",
            "workload": workload.name,
            **{"rule": provider.rule, "provider": provider.name, "ours": provider.ours, "mode": provider.mode},
            "device": device.type,
            "dtype": str(workload.dtype).removeprefix("torch."),
            **{"params": workload.params, "tensors": workload.tensors},
            "floor_bytes": RULES[provider.rule].floor(workload.dtype),
        }
        if missing := provider.missing(device):
            record["status"] = f"missing: {missing}"
        elif provider.mode == "compiled" and not compiled:
            record["status"] = "skipped: takes minutes to compile, has a plan of its own"
        else:
            record |= _gate(provider, workload, device)
            ready += [provider] * (record["status"] == "measured")
    if ready:
        clock = clock or (CudaClock() if device.type == "cuda" else cpu_clock)
        for name, measured in _rounds(workload, ready, device, seconds, clock).items():
            records[name] |= measured
    return list(records.values())


def _gate(provider: Provider, workload: Workload, device: torch.device) -> Record:
    """Returns the status of a provider that runs here, and its error."""
    try:
        verdict = gate.check(provider, workload, device)
    except Exception as error:
        return {"status": _failed(error)}
    wrong = f"wrong here: off by {verdict.error:.2g} of the largest movement, allowed {verdict.allowed:.2g}"
    status = "measured" if verdict.passed else wrong
    return {"status": status, "error": verdict.error, "error_allowed": verdict.allowed}


def _rounds(
    workload: Workload, providers: Sequence[Provider], device: torch.device, seconds: float, clock: Clock
) -> dict[str, Record]:
    size = workload.params * workload.dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 6e9
    # One parameter, its gradients, AdamW's state, and as much again for temporaries of the loops' largest tensor.
    problem = Problem(workload, device, next((sets for sets in (3, 2) if (sets + 3.2) * size < 0.9 * free), 1))
    # Where the states of all do not fit beside each other, they are made anew in each round.
    together = (2 * len(providers) + 2) * size < 0.8 * free
    candidates = [Candidate(provider, problem) for provider in providers]
    failed: dict[str, Record] = {}
    end = time.perf_counter() + seconds
    number = 0
    while number == 0 or (candidates and time.perf_counter() < end):
        turn = number % len(candidates)
        bound = SLOW * min(candidate.median_ms() for candidate in candidates)
        for candidate in [*candidates[turn:], *candidates[:turn]]:
            if number > 1 and number % RARELY and candidate.median_ms() > bound:
                candidate.rounds.append([])
                continue
            try:
                candidate.measure_round(clock, ROUND_SECONDS)
            except Exception as error:
                failed[candidate.provider.name] = {"status": _failed(error)}
                candidate.close()
            if not together:
                candidate.close()
        candidates = [c for c in candidates if c.provider.name not in failed]
        number += 1
    return failed | {candidate.provider.name: candidate.record() for candidate in candidates}


def quantiles(values: Sequence[float]) -> Record:
    """Returns minimum, tenths and quarters, and how many values there were.

    Example:
        >>> quantiles([3.0, 1.0, 2.0])["median"]
        2.0
    """
    shares = {"min": 0.0, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9}
    found = np.quantile(values, list(shares.values())).tolist()
    return {**{name: round(value, 6) for name, value in zip(shares, found)}, "n": len(values)}


def _median(times: list[float]) -> float | None:
    """Returns the median, or None for a round that a provider sat out."""
    return round(statistics.median(times), 6) if times else None


def _cpu_facts(candidate: Candidate) -> Record:
    """Operations of a step, the bytes that they move and the largest memory of their temporaries."""
    c = candidate.one_step(traffic.watch)
    return {"operations": c.operations, "moved_bytes": c.read + c.written, "temporary_bytes": c.temporary}


def _cuda_facts(candidate: Candidate, before: int) -> Record:
    """Launches, time in kernels and memory of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    at_rest = torch.cuda.memory_allocated()
    candidate.one_step(_untimed)
    torch.cuda.synchronize()
    temporary = torch.cuda.max_memory_allocated() - at_rest
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        candidate.one_step(_untimed)
        torch.cuda.synchronize()
    workspace = max(at_rest - before - candidate.facts["state_bytes"], 0)
    return {"temporary_bytes": temporary, "workspace_bytes": workspace, **launches(profile.events())}


def launches(events: Any) -> Record:
    """Kernels and copies among a profile's events, and the time spent in kernels."""
    on_device = [e for e in events if e.device_type == DeviceType.CUDA]
    copies = [e for e in on_device if e.name.lower().startswith(("memcpy", "memset"))]
    kernel_us = sum(e.time_range.elapsed_us() for e in on_device if e not in copies)
    return {"launches": len(on_device) - len(copies), "copies": len(copies), "kernel_ms": round(kernel_us / 1e3, 6)}


def copy_bandwidth(device: torch.device, gigabytes: float | None = None) -> float:
    """Returns bytes per second of a large copy, read plus written: the fastest of seven, since this is a ceiling.

    On a CPU also of a multiplication in place: where an update writes, it has read before, while a copy has the
    processor load the lines that it overwrites. The source has 0.25 GB on a CPU and 4 on a GPU that has them.
    """
    if gigabytes is None:
        gigabytes = min(4.0, torch.cuda.mem_get_info(device)[0] / 4e9) if device.type == "cuda" else 0.25
    number = max(1, int(gigabytes * 1e9 / 4))
    source = torch.empty(number, device=device).normal_()
    target = torch.zeros_like(source)
    passes: list[Step] = [lambda: target.copy_(source)]
    if device.type == "cpu":
        passes.append(lambda: target.mul_(0.999))
    clock = CudaClock() if device.type == "cuda" else cpu_clock
    samples = [clock(one_pass) for one_pass in passes for _ in range(7)]
    return 8 * number / min(s.step if s.device is None else s.device for s in samples) * 1e3


def _failed(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:208]
