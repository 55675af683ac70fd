"""Providers: who computes an update, one row each. A row whose package or option is absent is listed as missing."""

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
"""Hyper-parameters of every AdamW here. Adafactor takes its relative steps, scaled by the parameter."""

Step = Callable[[], Any]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Provider:
    """One implementation in one configuration.

    Attributes:
        name: unique within its rule.
        rule: what is computed; providers of one rule are compared with each other.
        make: the optimizer for a list of parameters.
        reference: which float64 reference its result must agree with, a key of `perf.gate.REFERENCES`.
        needs: what must exist: "package", "package.Name", or "package.Name(option)".
        devices: where it runs.
        mode: "eager", "compiled" (`torch.compile` around the step) or "captured" (a CUDA graph of the step).
        before: what a training loop calls before the step and pays for with it.
        storage: how low-precision weights are kept; anything but "native" is compared on bytes of its own.
        ours: whether it is this package.
    """

    name: str
    rule: str
    make: Make
    reference: str
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    mode: str = "eager"
    before: Callable[[list[Tensor]], Any] | None = None
    storage: str = "native"
    ours: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on this device of this machine, or None."""
        if device.type not in self.devices:
            return f"does not run on {device.type}"
        return next((f"{need} is not there" for need in self.needs if not exists(need)), None)

    def start(self, params: list[Tensor]) -> tuple[Step, torch.optim.Optimizer]:
        """The step as the training loop calls it, and the optimizer behind it. Parameters must have gradients."""
        optimizer = self.make(params)
        step: Step = optimizer.step
        if self.mode == "compiled":
            step = torch.compile(optimizer.step)
        if self.before is not None:
            before, inner = self.before, step

            def step() -> None:
                before(params)
                inner()

        return (_captured(step) if self.mode == "captured" else step), optimizer


def exists(need: str) -> bool:
    """Whether "package", "package.Name" or "package.Name(option)" is there.

    Example:
        >>> exists("torch.optim.AdamW(fused)"), exists("torch.optim.AdamW(warp)"), exists("no_such_package")
        (True, False, False)
    """
    path, _, option = need.rstrip(")").partition("(")
    package, *names = path.split(".")
    if importlib.util.find_spec(package) is None:
        return False
    if not names:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other packages say when they are imported is no result
            target: Any = importlib.import_module(package)
            for depth, name in enumerate(names):
                if not hasattr(target, name):
                    importlib.import_module(".".join([package, *names[: depth + 1]]))
                target = getattr(target, name)
    except (ImportError, AttributeError):
        return False
    return not option or option in inspect.signature(target).parameters


def _captured(step: Step) -> Step:
    """The step as one CUDA graph, captured after steps on a side stream that made state and compiled kernels."""
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


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _optimizer(path: str, **options: Any) -> Make:
    return lambda params: _attribute(path)(params, **options)


_ADAM: dict[str, Any] = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
_LOOP_ADAMW = _optimizer("fusedopt.reference.ReferenceAdamW", **_ADAM)
_LOOP_ADAFACTOR = _optimizer("fusedopt.reference.ReferenceAdafactor")


def _torch_adamw(**options: Any) -> Make:
    return _optimizer("torch.optim.AdamW", **_ADAM, **options)


def _torch_adafactor(foreach: bool) -> Make:
    # lr and eps so that it is the original's relative step, scaled by the parameter.
    return _optimizer("torch.optim.Adafactor", lr=1e-2, eps=(1e-30, 1e-3), foreach=foreach)


BACKEND = "auto"
"""Of our providers; "triton" on a CPU runs the kernels in Triton's interpreter."""


def _ours(name: str, **options: Any) -> Make:
    return lambda params: _attribute(f"fusedopt.{name}")(params, backend=BACKEND, **options)


def _clip(max_norm: float) -> Callable[[list[Tensor]], Any]:
    return lambda params: torch.nn.utils.clip_grad_norm_(params, max_norm)


FAR, NEAR = 1e6, 1e-2
"""Limits of the gradient norm: one that no gradient here reaches, and one that clips every step."""


_row = partial(Provider, rule="adamw", reference="torch adamw")
_factored = partial(Provider, rule="adafactor", reference="adafactor")
_captured_row: dict[str, Any] = dict(devices=("cuda",), mode="captured")
_compiled_row: dict[str, Any] = dict(devices=("cuda",), mode="compiled")
_cuda_row: dict[str, Any] = dict(devices=("cuda",))

_FLASH: dict[str, Any] = dict(quantize=False, compress_state_dict=False, master_weight_bits=None)


def _stored(how: str) -> Provider:
    make = _ours("AdamW", **_ADAM, storage=how)
    needs = ("fusedopt.AdamW(storage)",)
    return _row(f"fusedopt, {how}", make=make, reference=f"adamw {how}", needs=needs, storage=how, ours=True)


def _clipping(rule: str, limit: float) -> tuple[Provider, ...]:
    """A limit on the norm of all gradients: folded into our step, a call of its own before everyone else's."""
    needs = ("fusedopt.AdamW(max_grad_norm)",)
    make = _ours("AdamW", **_ADAM, max_grad_norm=limit)
    ours = partial(Provider, rule=rule, make=make, reference=f"adamw clipped at {limit:g}", needs=needs, ours=True)
    theirs = partial(Provider, rule=rule, reference=f"torch adamw clipped at {limit:g}", before=_clip(limit))
    clip = "clip_grad_norm_ +"
    return (
        ours("fusedopt"),
        ours("fusedopt, captured", **_captured_row),
        theirs(f"{clip} torch fused", make=_torch_adamw(fused=True)),
        theirs(f"{clip} torch foreach", make=_torch_adamw(foreach=True)),
        theirs(f"{clip} torch fused, captured", make=_torch_adamw(fused=True, capturable=True), **_captured_row),
        replace(theirs(f"{clip} transformers 4.34 loop", make=_LOOP_ADAMW), reference=f"adamw clipped at {limit:g}"),
    )


PROVIDERS: tuple[Provider, ...] = (
    _row("fusedopt", make=_ours("AdamW", **_ADAM), reference="adamw", ours=True),
    _row("fusedopt, torch's numbers", make=_ours("AdamW", **_ADAM, convention="torch"), ours=True),
    _row("fusedopt, captured", make=_ours("AdamW", **_ADAM), reference="adamw", ours=True, **_captured_row),
    _stored("master"),
    _stored("stochastic"),
    _row("torch fused", make=_torch_adamw(fused=True)),
    _row("torch fused, captured", make=_torch_adamw(fused=True, capturable=True), **_captured_row),
    _row("torch foreach", make=_torch_adamw(foreach=True)),
    _row("torch foreach, captured", make=_torch_adamw(foreach=True, capturable=True), **_captured_row),
    _row("torch for-loop", make=_torch_adamw(foreach=False)),
    _row("torch compiled", make=_torch_adamw(foreach=True, capturable=True), **_compiled_row),
    _row("transformers 4.34 loop", make=_LOOP_ADAMW, reference="adamw"),
    _row("optimi", make=_optimizer("optimi.AdamW", **_ADAM), needs=("optimi",)),
    _row("flashoptim", make=_optimizer("flashoptim.FlashAdamW", **_ADAM, **_FLASH), needs=("flashoptim",), **_cuda_row),
    _row("bitsandbytes", make=_optimizer("bitsandbytes.optim.AdamW", **_ADAM), needs=("bitsandbytes",), **_cuda_row),
    _row(
        "bitsandbytes, state in 8 bits",
        make=_optimizer("bitsandbytes.optim.AdamW8bit", **_ADAM),
        reference="torch adamw, 8 bits",
        needs=("bitsandbytes",),
        **_cuda_row,
    ),
    _row(
        "torchao, state in 8 bits",
        make=_optimizer("torchao.optim.AdamW8bit", **_ADAM),
        reference="torch adamw, 8 bits",
        needs=("torchao.optim.AdamW8bit",),
        **_cuda_row,
    ),
    _factored("fusedopt", make=_ours("Adafactor"), needs=("fusedopt.Adafactor",), ours=True),
    _factored("fusedopt, captured", make=_ours("Adafactor"), needs=("fusedopt.Adafactor",), ours=True, **_captured_row),
    _factored("transformers 4.34 loop", make=_LOOP_ADAFACTOR),
    _factored("transformers 4.34 loop, compiled", make=_LOOP_ADAFACTOR, **_compiled_row),
    _factored(
        "transformers, installed",
        make=_optimizer("transformers.optimization.Adafactor"),
        needs=("transformers.optimization.Adafactor",),
    ),
    _factored("torch foreach", make=_torch_adafactor(True)),
    _factored("torch for-loop", make=_torch_adafactor(False)),
    _factored("torch compiled", make=_torch_adafactor(True), **_compiled_row),
    _factored("timm", make=_optimizer("timm.optim.Adafactor", min_dim_size_to_factor=1), needs=("timm",)),
    *_clipping("adamw, norm below the limit", FAR),
    *_clipping("adamw, clipped", NEAR),
)

RULES = tuple(dict.fromkeys(p.rule for p in PROVIDERS))


def of(rule: str, names: list[str] | None = None) -> list[Provider]:
    """The providers of a rule, or those of them that are named.

    Raises:
        ValueError: no such rule or provider.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    rows = [p for p in PROVIDERS if p.rule == rule]
    unknown = set(names or ()) - {p.name for p in rows}
    if unknown:
        there = "; ".join(p.name for p in rows)
        raise ValueError(f"no provider of {rule!r} is named {'; '.join(sorted(unknown))}; there are: {there}")
    return [p for p in rows if names is None or p.name in names]
