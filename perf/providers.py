"""Rules and who computes them, one row each. A provider whose package is absent is listed as missing."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

Step = Callable[[], Any]

LR = 1e-3
ADAM: dict[str, Any] = dict(lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
"""Hyper-parameters of every AdamW here. Adafactor takes its relative steps, scaled by the parameter."""

LOOP = "transformers 4.34 loop"
"""The loops in `fusedopt.reference`."""

BACKEND = "auto"
"""Backend of our providers; "triton" on a CPU runs the kernels in Triton's interpreter."""


class Rule(NamedTuple):
    """An update that providers compute and are compared by."""

    ours: str  # our class in `fusedopt`; `Reference` and its name is the loop in `fusedopt.reference`
    moves: int  # tensors of the parameter's size that a step must read or write, if no cache keeps one between phases
    options: Mapping[str, Any]  # of both classes
    max_grad_norm: float | None = None  # limit of the norm of all gradients
    slack: float = 0.0  # share that partial sums may add to the bytes of float32 tensors
    error16: float = 0.0  # of a step's movement, that roundings of a state to 16 bits may cost one element

    def floor(self, dtype: torch.dtype) -> float:
        """Returns the fewest bytes per parameter that a step moves where all tensors have this dtype."""
        return float(self.moves * dtype.itemsize)


BELOW, CLIPPED = "adamw, norm below the limit", "adamw, clipped"
_CLIPPED = Rule("AdamW", 8, ADAM, slack=0.02)  # reads gradients once more, for their norm, and writes none of them

RULES = {
    "adamw": Rule("AdamW", 7, ADAM),
    # Reads gradients for the sums, for the update's size and for the update; weights for their size and the update.
    "adafactor": Rule("Adafactor", 6, {}, slack=0.1),
    "lion": Rule("Lion", 5, dict(lr=LR, weight_decay=1e-2), error16=0.7),  # one sign of the gate's three steps
    BELOW: _CLIPPED._replace(max_grad_norm=1e6),  # which no gradient here reaches
    CLIPPED: _CLIPPED._replace(max_grad_norm=1e-2),  # which every step exceeds
}
"""Another optimizer of ours is one row here: providers, gate, roofline, counted bytes and registers follow from it."""


@dataclass(frozen=True)
class Provider:
    """One implementation in one configuration."""

    name: str  # unique within its rule
    rule: str  # a key of `RULES`
    optimizer: str | Callable[..., Optimizer]  # path of a class, or a function that makes the optimizer
    options: Mapping[str, Any] = field(default_factory=dict)
    like_torch: bool = False  # True if its result is that of torch's AdamW, not that of the rule's reference
    slack: float = 0.0  # added to the allowed error, for state that is quantised on purpose
    devices: tuple[str, ...] = ("cpu", "cuda")
    mode: str = "eager"  # or "compiled" (`torch.compile` around the step) or "captured" (a CUDA graph of the step)
    on_request: bool = False  # True if it takes part only where it is named
    clips: bool = False  # True if the training loop clips gradients before the step, and pays for it
    ours: bool = False
    constants: tuple[tuple[str, Any], ...] = ()  # paths of modules' constants and their values; see `setting`

    def missing(self, device: torch.device) -> str | None:
        """Returns why it cannot run on this device of this machine, or None."""
        if device.type not in self.devices:
            return f"does not run on {device.type}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what other packages say when they are imported is no result
                _resolved(self.optimizer)
        except (ImportError, AttributeError):
            return f"{self.optimizer} is not there"
        return None

    def make(self, params: Sequence[Tensor], **options: Any) -> Optimizer:
        """Returns the optimizer; `options` come before the provider's own."""
        backend = {"backend": BACKEND} if self.ours else {}
        optimizer: Optimizer = _resolved(self.optimizer)(params, **{**self.options, **backend, **options})
        return optimizer

    def start(self, params: list[Tensor]) -> tuple[Step, Optimizer]:
        """Returns the step as a training loop calls it, and its optimizer. Parameters must have gradients."""
        optimizer = self.make(params)
        step: Step = torch.compile(optimizer.step) if self.mode == "compiled" else optimizer.step
        limit = RULES[self.rule].max_grad_norm
        if self.clips and limit is not None:
            inner = step
            step = lambda: (clip_grad_norm_(params, limit), inner())  # noqa: E731
        return (_captured(step) if self.mode == "captured" else step), optimizer

    @contextmanager
    def setting(self) -> Iterator[None]:
        """Inside, modules have the constants that this provider is measured with."""
        with ExitStack() as stack:
            for path, value in self.constants:
                stack.enter_context(mock.patch(path, value))
            yield


def _resolved(path: Any) -> Any:
    return resolve_name(path) if isinstance(path, str) else path


def _captured(step: Step) -> Step:
    """Returns the step as a CUDA graph, captured after steps on a side stream that make state and compile kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


_TORCH_ADAMW = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "fused, captured": {"fused": True, "capturable": True},
    "foreach, captured": {"foreach": True, "capturable": True},
    "for-loop": {"foreach": False},
    "compiled": {"foreach": True, "capturable": True},
}
_FOR_CLIPPING = ("fused", "foreach", "fused, captured")
_TORCH_ADAFACTOR = {"foreach": True, "for-loop": False, "compiled": True}
_FLASH = {"quantize": False, "compress_state_dict": False, "master_weight_bits": None}


def _row(rule: str, name: str, optimizer: str, options: Mapping[str, Any] = {}, **fields: Any) -> Provider:
    """Returns a provider whose mode is the last word of its name."""
    mode = name.rpartition(" ")[2]
    if mode in ("captured", "compiled"):
        fields |= {"mode": mode, "devices": ("cuda",), "on_request": mode == "compiled"}  # which takes minutes
    return Provider(name, rule, optimizer, options, **fields)


def _of_rule(name: str, rule: Rule) -> Iterator[Provider]:
    """Ours, the original's loop and, of AdamW, torch's own."""
    clips = rule.max_grad_norm is not None
    options = {**rule.options, "max_grad_norm": rule.max_grad_norm} if clips else rule.options
    prefix = "clip_grad_norm_ + " * clips
    for ours in ("fusedopt", "fusedopt, captured"):
        yield _row(name, ours, f"fusedopt.{rule.ours}", options, ours=True)
    yield _row(name, f"{prefix}{LOOP}", f"fusedopt.reference.Reference{rule.ours}", rule.options, clips=clips)
    for kind in _TORCH_ADAMW if rule.ours == "AdamW" else ():
        if not clips or kind in _FOR_CLIPPING:
            options = {**ADAM, **_TORCH_ADAMW[kind]}
            yield _row(name, f"{prefix}torch {kind}", "torch.optim.AdamW", options, like_torch=True, clips=clips)


_adamw = partial(_row, "adamw", like_torch=True)
_cuda = partial(_adamw, devices=("cuda",))
_TORCHS_NUMBERS = {**ADAM, "convention": "torch"}

FLOAT32_COPY, WITH_STATISTICS = "torch fused, float32 copy", "torch fused, statistics"
"""What is done today where ours has `master_weights` and `track_statistics`."""

PROVIDERS: tuple[Provider, ...] = (
    *(provider for name, rule in RULES.items() for provider in _of_rule(name, rule)),
    _adamw("fusedopt, torch's numbers", "fusedopt.AdamW", _TORCHS_NUMBERS, ours=True),
    _row("adamw", "fusedopt, statistics", "fusedopt.AdamW", {**ADAM, "track_statistics": True}, ours=True),
    _adamw(
        *("fusedopt, master_weights", "fusedopt.AdamW", {**_TORCHS_NUMBERS, "master_weights": True}),
        ours=True,
        on_request=True,
    ),
    _adamw(FLOAT32_COPY, "perf.peers.Float32Copy", ADAM, on_request=True),
    _adamw(WITH_STATISTICS, "perf.peers.FusedWithStatistics", ADAM, on_request=True),
    _adamw("optimi", "optimi.AdamW", ADAM),
    _cuda("flashoptim", "flashoptim.FlashAdamW", {**ADAM, **_FLASH}),
    _cuda("bitsandbytes", "bitsandbytes.optim.AdamW", ADAM),
    _cuda("bitsandbytes, state in 8 bits", "bitsandbytes.optim.AdamW8bit", ADAM, slack=0.3),
    _cuda("torchao, state in 8 bits", "torchao.optim.AdamW8bit", ADAM, slack=0.3),
    _row("adafactor", f"{LOOP}, compiled", "fusedopt.reference.ReferenceAdafactor"),
    _row("adafactor", "transformers, installed", "transformers.optimization.Adafactor"),
    _row("adafactor", "timm", "timm.optim.Adafactor", {"min_dim_size_to_factor": 1}),
    *(  # lr and eps so that it is the original's relative step, scaled by the parameter
        _row("adafactor", f"torch {kind}", "torch.optim.Adafactor", dict(lr=1e-2, eps=(1e-30, 1e-3), foreach=foreach))
        for kind, foreach in _TORCH_ADAFACTOR.items()
    ),
)


def of(rule: str, names: Sequence[str] | None = None) -> list[Provider]:
    """Returns the providers of a rule, or those of them that are named. ValueError: no such rule or provider."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    rows = [p for p in PROVIDERS if p.rule == rule]
    unknown = set(names or ()) - {p.name for p in rows}
    if unknown:
        there = "; ".join(p.name for p in rows)
        raise ValueError(f"no provider of {rule!r} is named {'; '.join(sorted(unknown))}; there are: {there}")
    return [p for p in rows if names is None or p.name in names]
