"""Time of one step: providers side by side on the same parameters, round after round, until the seconds are spent.

Each round gives every provider a few steps, in an order that moves on by one from round to round, so that a noisy
minute meets all of them. Each step gets gradients at other addresses than the step before, as in a training loop that
sets gradients to None, and all tensors together are larger than the caches unless the workload is small by intention.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn.utils import get_total_norm

from perf import gate, traffic
from perf.providers import RULES, Provider, Step
from perf.results import Record
from perf.workloads import Workload

ROUND_SECONDS = 0.05
"""A provider's share of a round; at least `MIN_STEPS` steps, of which the first only warms up."""
MIN_STEPS = 3

SLOW, RARELY = 2.0, 6
"""A provider that is slower than the fastest by the first factor takes part in one round of six: close ratios, which
decide goals, get the time.
"""


class Sample(NamedTuple):
    """One step, in milliseconds."""

    step: float  # from its beginning to its end: what a user waits for
    host: float | None = None  # until `step()` returned; None on a CPU, where that is the end
    device: float | None = None  # of the device, with the host ahead of it; None on a CPU


Clock = Callable[[Step], Sample]


def cpu_clock(step: Step) -> Sample:
    start = time.perf_counter()
    step()
    return Sample((time.perf_counter() - start) * 1e3)


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


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else cpu_clock


class Problem:
    """Parameters and several sets of gradients, the same for all providers."""

    def __init__(self, workload: Workload, device: torch.device, sets: int) -> None:
        self.workload, self.device = workload, device
        normal = [[workload.empty(shape, device).normal_() for shape in workload.shapes] for _ in range(1 + sets)]
        self.params = [p.mul_(0.02).requires_grad_() for p in normal[0]]
        self.sets = [[g.mul_(0.01) for g in grads] for grads in normal[1:]]
        self._next = itertools.cycle(self.sets)
        self._current = self.sets[0]
        self._norm = get_total_norm(self._current)

    def set_grads(self) -> None:
        """Gives every parameter its gradient out of the next set, as a tensor object of its own."""
        self._current = next(self._next)
        for p, g in zip(self.params, self._current):
            p.grad = g.detach()

    def restore_norm(self) -> None:
        """Gives the current set the norm back that a clipping loop took from it."""
        torch._foreach_mul_(self._current, self._norm / get_total_norm(self._current))


class Candidate:
    """A provider at work on a problem, and the record of it: a time, or the reason why there is none."""

    def __init__(self, provider: Provider, problem: Problem) -> None:
        self.provider, self.problem = provider, problem
        self.rounds: list[list[Sample]] = []
        self.fastest_ms = math.inf
        workload, missing = problem.workload, provider.missing(problem.device)
        self.record: Record = {
            "kind": "step",
            **{"workload": workload.name, "rule": provider.rule, "provider": provider.name},
            **{"dtype": workload.dtype_name, "params": workload.params, "tensors": workload.tensors},
            "floor_bytes": RULES[provider.rule].floor(workload.dtype),
            "status": f"missing: {missing}" if missing else "measured",
        }
        self._step: Step | None = None
        self._optimizer: torch.optim.Optimizer | None = None  # whose memory a captured step uses

    @property
    def runs(self) -> bool:
        return bool(self.record["status"] == "measured")

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Calls one of the methods below; an exception becomes the status."""
        try:
            with self.provider.setting():
                action(*arguments)
        except Exception as error:
            lines = str(error).strip().splitlines()
            self.record["status"] = f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:208]
            self.close()

    def check(self) -> None:
        """Lets the gate decide whether the provider gets a number."""
        verdict = gate.check(self.provider, self.problem.workload, self.problem.device)
        self.record |= {"error": verdict.error, "error_allowed": verdict.allowed}
        if not verdict.passed:
            wrong = f"off by {verdict.error:.2g} of the largest movement, allowed {verdict.allowed:.2g}"
            self.record["status"] = f"wrong here: {wrong}"

    def open(self) -> None:
        """Makes the optimizer and lets it warm up: state, compilation, capture."""
        self.problem.set_grads()
        self._step, self._optimizer = self.provider.start(self.problem.params)
        for _ in range(2):  # the second step may look at the state that the first one made
            self.one_step()

    def close(self) -> None:
        self._step = self._optimizer = None
        gc.collect()

    def measure_round(self, clock: Clock) -> None:
        """Takes one round's steps; the first finds the caches full of other tensors and is not counted."""
        if self._step is None:
            self.open()
        if not self.rounds:
            self._record_facts()
        self.one_step(clock)
        samples: list[Sample] = []
        until = time.perf_counter() + ROUND_SECONDS
        while len(samples) < MIN_STEPS - 1 or time.perf_counter() < until:
            samples.append(self.one_step(clock))
        self.rounds.append(samples)
        self.fastest_ms = min(self.fastest_ms, *(sample.step for sample in samples))

    def one_step(self, observe: Callable[[Step], Any] = lambda step: step()) -> Any:
        """Takes a step under something that times or counts it, as in a training loop; returns what that returns."""
        assert self._step is not None
        if self.provider.mode != "captured":
            self.problem.set_grads()
        observed = observe(self._step)
        if self.provider.clips:
            self.problem.restore_norm()
        return observed

    def _record_facts(self) -> None:
        """Records memory, operations or launches of a step."""
        states = self._optimizer.state.values() if self._optimizer else ()
        self.record["state_bytes"] = sum(t.nbytes for s in states for t in s.values() if isinstance(t, Tensor))
        if self.problem.device.type == "cpu":
            self.record |= self.one_step(traffic.watch)
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
        self.one_step()
        torch.cuda.synchronize()
        self.record["temporary_bytes"] = torch.cuda.max_memory_allocated() - at_rest
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            self.one_step()
            torch.cuda.synchronize()
        self.record |= launches(profile.events())

    def record_times(self) -> None:
        """Records quantiles and the median of each round: what disturbs the machine disturbs neighbours alike."""
        for clock in Sample._fields:
            rounds = [[getattr(sample, clock) for sample in samples] for samples in self.rounds]
            if None not in rounds[0]:
                self.record[f"{clock}_ms"] = quantiles(list(itertools.chain(*rounds)))
                # None for a round that the provider sat out.
                medians = [round(statistics.median(times), 6) if times else None for times in rounds]
                self.record["rounds_ms" if clock == "step" else f"rounds_{clock}_ms"] = medians


def compare(workload: Workload, providers: Sequence[Provider], device: torch.device, seconds: float) -> list[Record]:
    """Returns one record per provider; one that is missing, wrong or fails gets the reason as status, and no time.

    Rounds last `seconds` in all, beyond the first.
    """
    clock = clock_of(device)
    size = workload.params * workload.dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 6e9
    # One parameter, its gradients, AdamW's state, and as much again for temporaries of the loops' largest tensor.
    problem = Problem(workload, device, next((sets for sets in (3, 2) if (sets + 3.2) * size < 0.9 * free), 1))
    candidates = [Candidate(provider, problem) for provider in providers]
    for candidate in candidates:
        if candidate.runs:
            candidate.attempt(candidate.check)
    running = [candidate for candidate in candidates if candidate.runs]
    # Where the states of all providers do not fit in memory together, each round makes them anew.
    together = (2 * len(running) + 2) * size < 0.8 * free
    end = time.perf_counter() + seconds
    number = 0
    while running and (number == 0 or time.perf_counter() < end):
        turn = number % len(running)
        bound = SLOW * min(candidate.fastest_ms for candidate in running)
        for candidate in [*running[turn:], *running[:turn]]:
            if number > 1 and number % RARELY and candidate.fastest_ms > bound:
                candidate.rounds.append([])
                continue
            candidate.attempt(candidate.measure_round, clock)
            if not together:
                candidate.close()
        running = [candidate for candidate in running if candidate.runs]
        number += 1
    for candidate in running:
        candidate.record_times()
    return [candidate.record for candidate in candidates]


def quantiles(values: Sequence[float]) -> Record:
    """Returns minimum, quarters and how many values there were.

    Example:
        >>> quantiles([3.0, 1.0, 2.0])["median"]
        2.0
    """
    found = np.quantile(values, (0.0, 0.25, 0.5, 0.75)).round(6).tolist()
    return {**dict(zip(("min", "p25", "median", "p75"), found)), "n": len(values)}


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
    clock = clock_of(device)
    samples = [clock(one_pass) for one_pass in passes for _ in range(7)]
    return 8 * number / min(s.step if s.device is None else s.device for s in samples) * 1e3
