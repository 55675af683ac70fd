"""The recorded trajectories of the original optimizers: loading them, replaying them, comparing with them.

`golden/index.json` describes the cases, one a line; `golden/<family>.npz` holds their arrays. They were recorded from
transformers 4.34.0 with torch 2.13.0 on a CPU with one thread. A test of an optimizer is three lines:

    @pytest.mark.parametrize("case", cases("adamw", without=("weight_decay_negative",)), ids=str)
    def test_golden(case):
        assert_close(case, replay(case, AdamW))

`replay` gives an optimizer the recorded parameters, groups, gradients and learning rates and keeps what came out;
`assert_close` compares it with the recording within the tolerance of that family and dtype. Other tolerances, another
device or another dtype are arguments.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.comparing import Tolerance, assert_near, assert_same

GOLDEN = Path(__file__).parent.parent / "golden"


_SAME_FORMULA_64 = Tolerance("the same formula in float64; only the order of operations may differ", 1e-11, 1e-13)
_SAME_FORMULA_32 = Tolerance("a few float32 roundings per step, over 12 steps", 2e-5, 2e-6)
_ONE_ULP = Tolerance("computed in float32 and rounded once per step: a tie may fall to the other side", ulps=1)

ROUNDED_EVERY_OPERATION = {
    torch.bfloat16: Tolerance("all arithmetic in bfloat16: one rounding may fall to the other side", 2**-7, 8e-3),
    torch.float16: Tolerance("all arithmetic in float16: one rounding may fall to the other side", 2**-10, 1e-3),
}
"""For an AdamW that rounds to 16 bits after every operation, as the original does."""

ROUNDED_TWICE_PER_STEP = {
    torch.bfloat16: Tolerance("float32 arithmetic is more exact than the recorded bfloat16 arithmetic", atol=3e-2),
    torch.float16: Tolerance("float32 arithmetic is more exact than the recorded float16 arithmetic", atol=1e-3),
}
"""For an AdamW with float32 arithmetic that rounds the parameter between update and decay. float16: not for `sensitive`
cases."""

_PARAMETERS: dict[str, Mapping[torch.dtype, Tolerance]] = {
    "adamw": {torch.float64: _SAME_FORMULA_64, torch.float32: _SAME_FORMULA_32, **ROUNDED_EVERY_OPERATION},
    "adafactor": {
        torch.float64: _SAME_FORMULA_64,
        torch.float32: _SAME_FORMULA_32,
        torch.bfloat16: _ONE_ULP,
        torch.float16: _ONE_ULP,
    },
}

_STATE = {
    torch.float64: Tolerance("the same formula in float64; only the order of operations may differ", of_largest=1e-11),
    torch.float32: Tolerance("sums of products that may nearly cancel: relative to the largest", of_largest=5e-5),
    torch.bfloat16: Tolerance("two roundings per step, each to 8 bits", of_largest=2**-7),
    torch.float16: Tolerance("two roundings per step, each to 11 bits", of_largest=2**-10),
}


@dataclass(frozen=True)
class Parameter:
    """One recorded parameter. Leading dimension of `grads`: step; of `expected`: recorded step."""

    init: torch.Tensor
    grads: torch.Tensor
    grad_present: tuple[bool, ...]
    expected: torch.Tensor
    state: dict[str, torch.Tensor | int] | None
    """At the end; None if no step ever reached the parameter."""


@dataclass(frozen=True)
class Case:
    """One recorded run; `str(case)` is its name."""

    family: str
    name: str
    kwargs: dict[str, Any]
    groups: list[dict[str, Any]]
    """As in the constructor, with indices into `parameters` under "params"."""
    dtype: torch.dtype
    steps: int
    record_steps: tuple[int, ...]
    """Numbers of finished steps after which the parameters were recorded."""
    lr_per_step: list[list[float]] | None
    """[step][group], to be assigned before the step."""
    finite: bool
    """False: NaN or inf occurs on purpose."""
    sensitive: bool
    """16-bit AdamW whose recorded state is dominated by rounding: more precision gives visibly other parameters."""
    raw: dict[str, Any] = field(repr=False)
    """The entry of index.json, for whatever a family records beyond this."""

    def __str__(self) -> str:
        return self.name

    @property
    def parameters(self) -> list[Parameter]:
        arrays = _arrays(self.family)

        def tensor(key: str) -> torch.Tensor:
            return torch.from_numpy(arrays[key]).to(self.dtype)

        return [
            Parameter(
                init=tensor(entry["init"]),
                grads=tensor(entry["grads"])[: self.steps],
                grad_present=tuple(entry["grad_present"] or [True] * self.steps),
                expected=tensor(entry["expected"]),
                state=None if entry["state"] is None else _state(entry["state"], arrays),
            )
            for entry in self.raw["params"]
        ]


@dataclass(frozen=True)
class Records:
    """What came out of a replay."""

    parameters: list[torch.Tensor]
    """[parameter], each with the recorded steps as leading dimension."""
    states: list[dict[str, Any]]
    """[parameter] -> the optimizer's state at the end."""
    optimizer: torch.optim.Optimizer
    observed: list[Any]
    """[step] -> what `observe` returned."""


@cache
def _index() -> dict[str, Any]:
    return json.loads((GOLDEN / "index.json").read_text())["families"]


@cache
def _arrays(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / _index()[family]["file"]) as file:
        return dict(file)


def _state(entries: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor | int]:
    state: dict[str, torch.Tensor | int] = {}
    for name, entry in entries.items():
        if entry["type"] == "int":
            state[name] = entry["value"]
        else:
            values = arrays[entry["array"]] if "array" in entry else np.float64(entry["value"])
            state[name] = torch.as_tensor(values).to(getattr(torch, entry["dtype"])).reshape(entry["shape"])
    return state


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor or group options as Python has them: JSON's lists stand for tuples."""
    return {key: tuple(value) if key in ("betas", "eps") and isinstance(value, list) else value
            for key, value in entry.items()}  # fmt: skip


def cases(family: str, *, without: Sequence[str] = (), only: Sequence[str] | None = None) -> list[Case]:
    """The cases of `family` ("adamw" or "adafactor"), in recorded order.

    Args:
        without: names left out; say at the call why.
        only: names to keep; default all. An unknown name in either is a KeyError, so that no test silently vanishes.
    """
    found = {entry["name"]: entry for entry in _index()[family]["cases"]}
    for name in (*without, *(only or ())):
        found[name]
    return [
        Case(
            family=family,
            name=name,
            kwargs=_options(entry["kwargs"]),
            groups=[_options(group) for group in entry["groups"]],
            dtype=getattr(torch, entry["dtype"]),
            steps=entry["steps"],
            record_steps=tuple(entry["record_steps"]),
            lr_per_step=entry["lr_per_step"],
            finite=entry["finite"],
            sensitive=bool(entry.get("sensitive")),
            raw=entry,
        )
        for name, entry in found.items()
        if name not in without and (only is None or name in only)
    ]


def replay(
    case: Case,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    observe: Callable[[torch.optim.Optimizer, list[torch.nn.Parameter]], Any] | None = None,
) -> Records:
    """Runs `make_optimizer(groups, **case.kwargs)` over the recorded gradients.

    Args:
        device: where parameters and gradients live; what is kept in the records is on the CPU.
        dtype: of parameters and gradients instead of the case's. The recorded inputs convert exactly to a wider dtype:
            `dtype=torch.float64` gives the reference that a 16-bit run is measured against.
        observe: called after every step with the optimizer and the parameters.
    """
    recorded = case.parameters
    params = [torch.nn.Parameter(p.init.to(device, dtype or case.dtype, copy=True)) for p in recorded]
    groups = [{**group, "params": [params[i] for i in group["params"]]} for group in case.groups]
    optimizer = make_optimizer(groups, **case.kwargs)
    rows: list[list[torch.Tensor]] = [[] for _ in params]
    observed = []
    for t in range(case.steps):
        if case.lr_per_step is not None:
            for group, lr in zip(optimizer.param_groups, case.lr_per_step[t], strict=True):
                group["lr"] = lr
        for param, p in zip(params, recorded):
            param.grad = p.grads[t].to(param.device, param.dtype, copy=True) if p.grad_present[t] else None
        optimizer.step()
        if observe is not None:
            observed.append(observe(optimizer, params))
        if t + 1 in case.record_steps:
            for row, param in zip(rows, params):
                row.append(param.detach().cpu().clone())
    states = [dict(optimizer.state.get(param, {})) for param in params]
    return Records([torch.stack(row) for row in rows], states, optimizer, observed)


def assert_close(
    case: Case,
    records: Records,
    *,
    parameters: Tolerance | None = None,
    state: Tolerance | None = None,
    skip_state: Sequence[str] = (),
) -> None:
    """Compares parameters at every recorded step, and the state at the end, with the recording.

    Shapes and NaN must agree, the parameters' dtype too; a step count must be equal, and 0 or absent where the original
    has no state.

    Args:
        parameters, state: tolerances instead of those of the family and dtype.
        skip_state: names of recorded state that this optimizer does not keep, or keeps in another way.
    """
    recorded = case.parameters
    tolerance = parameters or _PARAMETERS[case.family][case.dtype]
    for i, (p, actual) in enumerate(zip(recorded, records.parameters, strict=True)):
        for row, step in enumerate(case.record_steps):
            name = f"{case}: parameter {i} after step {step}"
            assert_near(actual[row], p.expected[row], tolerance, name=name, equal_nan=True)

    for i, (p, actual_state) in enumerate(zip(recorded, records.states, strict=True)):
        if p.state is None:
            assert int(actual_state.get("step", 0)) == 0, f"{case}: parameter {i} never had a gradient but was stepped"
            continue
        for name, expected in p.state.items():
            if name in skip_state:
                continue
            what = f"{case}: state {name!r} of parameter {i}"
            assert name in actual_state, f"{what} is missing; there is {sorted(actual_state)}"
            if isinstance(expected, int):
                assert_same(int(actual_state[name]), expected, what)
            else:
                actual_value = torch.as_tensor(actual_state[name])
                near = state or _STATE[expected.dtype]
                assert_near(actual_value, expected, near, name=what, equal_nan=True, check_dtype=False)
