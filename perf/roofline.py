"""The roofline: the bytes an update has to move, and how fast this machine moves bytes.

Every update here does a handful of operations per element, so memory is what it waits for: its floor is the fewest
bytes over the bandwidth of a copy measured in the same run.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Traffic(NamedTuple):
    """Bytes per parameter and step."""

    read: float
    written: float

    @property
    def total(self) -> float:
        return self.read + self.written


def floor(rule: str, dtype: torch.dtype, storage: str = "native") -> Traffic:
    """The fewest bytes per parameter that a step of this rule moves, when no tensor stays in a cache between phases.

    Args:
        rule: a rule of `perf.providers`.
        dtype: of parameter, gradient and (native, stochastic) AdamW's moments.
        storage: "master" keeps moments in float32 and, per weight, a 16-bit remainder (bfloat16) or a float32 copy.

    Raises:
        ValueError: no such rule.

    Example:
        >>> floor("adamw", torch.float32).total, floor("adamw", torch.bfloat16).total
        (28.0, 14.0)
        >>> floor("adamw", torch.bfloat16, "master").total
        26.0
        >>> floor("adafactor", torch.float32).total
        24.0
    """
    size = float(dtype.itemsize)
    extra = {torch.bfloat16: 2.0, torch.float16: 4.0}.get(dtype, 0.0) if storage == "master" else 0.0
    moment = 4.0 if storage == "master" else size
    if rule.startswith("adamw"):
        # A clipped step reads the gradients once more, for their norm, and writes none of them.
        gradients = 1 if rule == "adamw" else 2
        return Traffic(gradients * size + size + extra + 2 * moment, size + extra + 2 * moment)
    if rule == "adafactor":
        # g for the sums, for the update's size and for the update; p for its own size and for the update.
        return Traffic(5 * size + extra, size + extra)
    raise ValueError(f"no floor is known for the rule {rule!r}")


def eager_loop(rule: str, dtype: torch.dtype) -> Traffic:
    """Bytes per parameter of the transformers 4.34 loop, counted operation by operation (`perf.traffic`).

    Example:
        >>> eager_loop("adamw", torch.float32).total > 2 * floor("adamw", torch.float32).total
        True
    """
    from perf.providers import of
    from perf.traffic import count
    from perf.workloads import Workload

    provider = next(p for p in of(rule) if p.name == "transformers 4.34 loop")
    workload = Workload("one", "one matrix", ((512, 512),), dtype)
    counted = count(provider, workload)
    return Traffic(counted.read / workload.params, counted.written / workload.params)


def copy_bandwidth(device: torch.device, gigabytes: float | None = None, repeats: int = 7) -> float:
    """Bytes per second of a large copy, bytes read plus bytes written; the fastest of some, since this is a ceiling.

    On a CPU also of a multiplication in place, if that is faster: where an update writes, it has read before, while a
    copy has the processor load the lines that it overwrites.

    Args:
        device: where to copy.
        gigabytes: size of the source; default a quarter on a CPU, 4 on a GPU, less where memory is short.
        repeats: how many copies are timed.
    """
    if gigabytes is None:
        gigabytes = 0.25
        if device.type == "cuda":
            gigabytes = min(4.0, torch.cuda.mem_get_info(device)[0] / 1e9 / 4)
    count = max(1, int(gigabytes * 1e9 / 4))
    source = torch.empty(count, device=device).normal_()
    target = torch.zeros_like(source)
    passes = [lambda: target.copy_(source)]
    if device.type == "cpu":
        passes.append(lambda: target.mul_(0.999))
    return 2 * 4 * count / min(_seconds(one_pass, device) for one_pass in passes for _ in range(repeats))


def _seconds(one_pass: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        one_pass()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    one_pass()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3
