"""Plans of `perf.bench`: which providers are compared on which workload, for how long, and the goals to meet."""

import itertools
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, NamedTuple

from perf import providers
from perf.providers import BELOW, CLIPPED, Provider

COPY = "copy"
"""In place of a provider: a copy of as many bytes as the update must move."""


class Goal(NamedTuple):
    """A provider to be ahead of."""

    theirs: str
    limit: float  # least speed-up (their time over ours; over `COPY`, the share of its bandwidth), or most time
    kind: str = "speedup"  # or "time": ours over theirs
    clock: str = "step"  # or "host" or "device"
    ours: str = "fusedopt"

    def __str__(self) -> str:
        if self.theirs == COPY:
            return f"at least {self.limit:.0%} of a copy's bandwidth"
        if self.kind == "time":
            return f"at most {self.limit:g} times the time of {self.theirs}"
        speed = "faster than" if self.limit == 1.0 else f"at least {self.limit:g} times as fast as"
        return f"{'host time ' * (self.clock == 'host')}{speed} {self.theirs}"


class Comparison(NamedTuple):
    """Providers side by side on one workload, or a provider with every combination of values of constants."""

    workload: str
    rule: str
    share: float = 1.0  # of the time
    names: tuple[str, ...] | None = None  # None for all of the rule, but for those that must be compiled for minutes
    goals: tuple[Goal, ...] = ()
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # paths of constants, and values to try besides their own

    def providers(self) -> list[Provider]:
        """Returns who is compared; of a sweep, the code as it stands comes first."""
        rows = [p for p in providers.of(self.rule, self.names) if self.names or p.mode != "compiled"]
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


_LOOP, _FUSED, _FOREACH = "transformers 4.34 loop", "torch fused", "torch foreach"
_CLIP_FUSED = f"clip_grad_norm_ + {_FUSED}"
_OURS = ("fusedopt",)
_FOR_CLIPPING = ("fusedopt", _CLIP_FUSED)
_FOR_HOSTS = ("fusedopt", _FUSED, _FOREACH)
_ORIGINALS = ("fusedopt", _LOOP, _FOREACH)
_IN_BFLOAT16 = ("fusedopt", _FUSED, "fusedopt, captured", "torch fused, captured", "flashoptim", "optimi")
_WITH_STATISTICS = ("fusedopt", "fusedopt, statistics")

_FASTER = Goal(_FUSED, 1.0)
_FASTER_CAPTURED = Goal("torch fused, captured", 1.0, ours="fusedopt, captured")
_MUCH_FASTER = Goal(_FUSED, 1.5, clock="device")
_FASTER_HOST = Goal(_FUSED, 1.0, clock="host")
_BANDWIDTH = Goal(COPY, 0.9, clock="device")
_AS_A_PLAIN_STEP = Goal("fusedopt", 1.05, "time", clock="device", ours="fusedopt, statistics")

_BLOCKS = (
    ("fusedopt_kernels.elementwise.BLOCK", (1024, 2048, 4096, 8192)),
    ("fusedopt_kernels.elementwise.THREADS", (128, 256, 512)),
)
_TILES = (
    ("fusedopt_kernels.adafactor.plan.BLOCK", (1024, 2048, 4096)),
    ("fusedopt_kernels.adafactor.plan.TILE_HEIGHT", (128, 256, 512)),
)
_L2 = (("fusedopt_kernels.adafactor.plan.CACHE_BATCH_BYTES", tuple(10_000_000 * i for i in range(6))),)
_NORM = (("fusedopt_kernels.norm.BLOCK", (2048, 4096, 8192)),)

PLANS: dict[str, tuple[Comparison, ...]] = {
    "cpu": (
        Comparison("gpt_50m", "adamw", 0.2, goals=(Goal(_FUSED, 1.05, "time"), Goal(_LOOP, 3.0))),
        Comparison("tiny_2000", "adamw", 0.07, goals=(_FASTER,)),
        Comparison("tiny_300", "adamw", 0.03, _FOR_HOSTS, (_FASTER,)),
        Comparison("gpt_50m", "adafactor", 0.24, goals=(Goal(_LOOP, 2.5), Goal(_FOREACH, 4.0), Goal("timm", 1.0))),
        Comparison("gpt_50m", BELOW, 0.1, _FOR_CLIPPING, (Goal(_CLIP_FUSED, 1.15),)),
        Comparison("gpt_50m", CLIPPED, 0.1, _FOR_CLIPPING, (Goal(_CLIP_FUSED, 1.0),)),
        Comparison("matrices_50m", "adafactor", 0.16, _ORIGINALS, (Goal(_LOOP, 2.5), Goal(_FOREACH, 4.0))),
        Comparison("matrices_50m", CLIPPED, 0.1, _FOR_CLIPPING, (Goal(_CLIP_FUSED, 1.1),)),
    ),
    "cuda": (
        Comparison("gpt2", "adamw", 0.15, goals=(_FASTER, _FASTER_CAPTURED)),
        Comparison("llama_1g", "adamw", 0.15, goals=(_BANDWIDTH, _FASTER, _FASTER_CAPTURED)),
        Comparison("tiny_2000", "adamw", 0.1, goals=(_FASTER, _FASTER_CAPTURED, _FASTER_HOST)),
        Comparison("llama2_7b", "adamw", 0.2, _IN_BFLOAT16, (_BANDWIDTH, _FASTER, _FASTER_CAPTURED, _MUCH_FASTER)),
        Comparison("gpt2", "adafactor", 0.15, goals=(Goal(_LOOP, 10.0),)),
        Comparison("llama_1g", "adafactor", 0.1, goals=(Goal(_LOOP, 5.0), Goal(COPY, 0.75, clock="device"))),
        Comparison("gpt2", BELOW, 0.05, goals=(Goal(_CLIP_FUSED, 1.2),)),
        Comparison("llama_1g", BELOW, 0.05, (*_FOR_CLIPPING, "fusedopt, captured"), (Goal(_CLIP_FUSED, 1.2),)),
        Comparison("tiny_300", "adamw", 0.05, _FOR_HOSTS, (_FASTER_HOST,)),
        *(Comparison(name, "adamw", 0.05, _WITH_STATISTICS, (_AS_A_PLAIN_STEP,)) for name in ("llama_1g", "llama2_7b")),
    ),
    "cuda-rest": (
        Comparison("llama_1g:bfloat16", "adamw", 0.2, goals=(_BANDWIDTH,)),
        *(Comparison(name, "adamw", 0.1) for name in ("bert_base", "resnet50", "vit_l")),
        Comparison("embedding_2g4", "adamw", 0.1, ("fusedopt", _FUSED)),
        Comparison("llama_1g:bfloat16", "adafactor", 0.1),
        Comparison("resnet50", "adafactor", 0.1),
        Comparison("gpt2", CLIPPED, 0.1),
        Comparison("llama2_7b", "adafactor", 0.1, ("fusedopt", _FOREACH)),
    ),
    "cuda-compiled": (
        Comparison("gpt2", "adafactor", 0.4, ("fusedopt", "torch compiled")),
        Comparison("gpt2", "adamw", 0.2, ("fusedopt", _FUSED, "torch compiled")),
        Comparison("gpt2", "adafactor", 0.4, ("fusedopt", f"{_LOOP}, compiled"), (Goal(f"{_LOOP}, compiled", 1.0),)),
    ),
    "sweeps": (
        *(Comparison(name, "adamw", 1.0, _OURS, sweep=_BLOCKS) for name in ("llama_1g", "llama_1g:bfloat16", "gpt2")),
        *(Comparison(name, "adafactor", 1.5, _OURS, sweep=_TILES) for name in ("llama_1g", "gpt2")),
        *(Comparison(name, "adafactor", 1.0, _OURS, sweep=_L2) for name in ("llama_1g", "gpt2", "llama_1g:bfloat16")),
        *(Comparison(name, "adafactor", 1.5, ("fusedopt, captured",), sweep=_L2) for name in ("llama_1g", "gpt2")),
        Comparison("llama_1g", BELOW, 3.0, _OURS, sweep=_NORM),
    ),
    "smoke": (
        Comparison("smoke", "adamw", 1.0, ("fusedopt", _FUSED)),
        Comparison("smoke", "adamw", 1.0, _OURS, sweep=(("fusedopt_kernels.elementwise.BLOCK", (1024,)),)),
    ),
}
"""Comparisons in the order of their importance. In a sweep, the constants that won are those in the code."""


def goals(device: str) -> list[tuple[Comparison, Goal]]:
    """Returns the goals for a kind of device, "cpu" or "cuda", with their comparisons."""
    plans = [comparisons for name, comparisons in PLANS.items() if name.partition("-")[0] == device]
    return [(comparison, goal) for comparisons in plans for comparison in comparisons for goal in comparison.goals]
