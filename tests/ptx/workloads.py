"""Steps that run on every backend, as rows of a table: `CASES`."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from helpers.comparing import Tolerance, assert_near
from torch import Tensor

from fusedopt import Adafactor, AdamW, Lion
from fusedopt.accumulate import GradientAccumulator
from fusedopt_kernels.measures import PLACES

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}
Shape = tuple[int, ...]
Outcome = dict[str, Tensor]

ELEMENTWISE: tuple[Shape, ...] = ((4096,), (1,), (7,), (4107,), (0,), (2064,), (3, 5), ())
FACTORED: tuple[Shape, ...] = (
    *((), (0,), (19,), (1025,), (2, 3, 4), (1, 6), (5, 1), (40, 40), (64, 144), (300, 33), (3, 33, 5)),
    *((2, 2, 3, 3), (30, 7, 9)),
)
"""Vectors, small matrices, odd and even ones, tall and wide ones, stacks, and what has no elements."""

FEW: tuple[Shape, ...] = ((), (0,), (19,), (2, 3, 4), (30, 7, 9), (40, 40), (300, 33), (64, 144))

_PARAMETERS = {
    F32: Tolerance("a few float32 roundings per step", rtol=2e-6, atol=2e-6),
    F64: Tolerance("a few float64 roundings per step", rtol=1e-12, atol=1e-12),
    BF16: Tolerance("a tie may fall to the other side", ulps=1, of_largest=2**-13),
    F16: Tolerance("a tie may fall to the other side", ulps=1, of_largest=2**-16),
}
_STATES = {
    F32: Tolerance("sums in another order, which may cancel", rtol=2e-6, of_largest=2e-6, ulps=1),
    F64: Tolerance("sums in another order, which may cancel", rtol=1e-12, of_largest=1e-12),
    BF16: Tolerance("a tie may fall to the other side, and again at the next step", ulps=2, of_largest=2**-13),
    F16: Tolerance("a tie may fall to the other side", ulps=1, of_largest=2**-16),
}
_STATISTICS_READ = Tolerance("norms of float32 numbers, which eager steps add up in float32 by pieces", rtol=5e-7)
_SUM_OF_SQUARES = Tolerance("float32 squares, summed in another order", rtol=1e-6)


def _of_updates(statistics: Tensor) -> Tolerance:
    """For what is measured of a parameter, whose weights are no larger than their norm."""
    unit = 2**-23 * statistics[PLACES.weight].nan_to_num(0.0, 0.0).item()
    return Tolerance("updates are differences of float32 weights: one unit of a weight", rtol=2e-5, atol=unit + 1e-30)


def assert_agree(actual: Outcome, expected: Outcome, parameters: Tolerance | None = None) -> None:
    """Asserts that two backends did the same; parameters may have a tolerance of their own."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = _STATES.get(value.dtype) if "." in name else parameters or _PARAMETERS.get(value.dtype)
        if name == "statistics":
            read = slice(None), [PLACES.gradient, PLACES.weight]
            assert_near(actual[name][read], value[read], _STATISTICS_READ, name=name, equal_nan=True)
            for k, (row, right) in enumerate(zip(actual[name], value)):
                assert_near(row, right, _of_updates(right), name=f"{name}[{k}]", equal_nan=True)
            continue
        if name == "grad_norm":
            tolerance = _SUM_OF_SQUARES
        elif name.endswith(".remainder"):  # part of a weight, which is compared as a whole
            continue
        assert_near(actual[name], value, tolerance, name=name, equal_nan=True)


def normal(shapes: Sequence[Shape], seed: int, dtype: torch.dtype = F32, spread: bool = False) -> list[Tensor]:
    """Normally distributed numbers; with `spread` of magnitudes from 1e-6 to 10, and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator, dtype=F64)
        if spread:
            x = x * 10.0 ** torch.randint(-6, 2, x.shape, generator=generator).double() * (x.abs() > 0.1)
        found.append(x.to(dtype))
    return found


def laid_out(t: Tensor, offset: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A copy so many elements behind a multiple of 64 bytes."""
    if offset == 0:
        return t.clone(memory_format=memory_format)
    room = torch.zeros(t.numel() + offset, dtype=t.dtype)
    return room[offset:].view(t.shape).copy_(t)


def with_float32_weights(outcome: Outcome) -> Outcome:
    """Adds the weights that bfloat16 parameters and remainders make."""
    weights = {}
    for name, value in outcome.items():
        if name.endswith(".remainder"):
            p = outcome[name.removesuffix(".remainder")].contiguous()
            bits = (p.view(torch.int16).to(torch.int64) << 16) + value.contiguous().to(torch.int64)
            weight = (((bits + 2**31) % 2**32) - 2**31).to(torch.int32).view(F32)
            weights[name.removesuffix("remainder") + "weight"] = torch.where(p.isnan(), torch.nan, weight)
    return outcome | weights


def spoil_workspaces(optimizer: Any) -> None:
    """Fills with NaN what a step leaves in its workspace, which is none of the next one's business."""
    for stepper in optimizer._engine.steppers.values():
        if hasattr(stepper, "_tables"):
            for t in stepper._tables._eager._scratch.values():
                t.fill_(torch.nan)


def states_of(optimizer: Any, params: Sequence[Tensor]) -> Outcome:
    """Parameters and what is kept of them, by name."""
    found = {f"p{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        for name, value in optimizer.state.get(p, {}).items():
            found[f"p{i}.{name}"] = torch.as_tensor(value).clone()
    return with_float32_weights(found)


def plain_step(optimizer: Any, number: int) -> None:
    """Gradients count by half at every other step, so that kernels cannot take their factor for another number."""
    if number % 2:
        optimizer.grad_scale = torch.tensor([2.0])
    optimizer.step()
    optimizer.forget_scaler()


def skipped_step(optimizer: Any) -> None:
    """One that changes nothing, whatever its gradients are."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([1.0]), torch.tensor([1.0])
    optimizer.step()
    optimizer.forget_scaler()


def unscaled_step(optimizer: Any, number: int) -> None:
    optimizer.step()


@dataclass(frozen=True)
class Case:
    """Some steps of an optimizer. One more parameter, of three elements, never has a gradient.

    Attributes:
        make: the optimizer's class.
        options: of the optimizer.
        dtype, grad_dtype: of the parameters, and of gradients if they differ.
        offset: by how many elements parameters, gradients and states are off an aligned address.
        edit: changes the gradients, [step][parameter].
        step: takes a step. Another one, which is skipped, follows if it is `plain_step`.
        groups: parameters as the optimizer gets them.
        parameters: what parameters may differ by; that of their dtype if None.
        steps_before: that the state says were taken.
        watched: whether races are looked for, which takes longer than all else where tensors are large.
        compared: whether launches are compared with the interpreter's, which takes as long again.
    """

    make: Any
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = F32
    shapes: tuple[Shape, ...] = ELEMENTWISE
    grad_dtype: torch.dtype | None = None
    steps: int = 2
    offset: tuple[int, int, int] = (0, 0, 0)
    spread: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    edit: Callable[[list[list[Any]]], None] | None = None
    step: Callable[[Any, int], None] = plain_step
    groups: Callable[[list[Any]], list[Any]] = list
    parameters: Tolerance | None = None
    steps_before: int = 0
    watched: bool = True
    compared: bool = True

    def run(self, backend: str) -> Outcome:
        """Returns what the steps leave behind, by name."""
        at_p, at_g, at_state = self.offset
        params = [torch.nn.Parameter(laid_out(t, at_p, self.memory_format)) for t in normal(self.shapes, 1, self.dtype)]
        grads: list[list[Any]] = [
            [
                laid_out(g, at_g, self.memory_format)
                for g in normal(self.shapes, 10 + k, self.grad_dtype or self.dtype, self.spread)
            ]
            for k in range(self.steps)
        ]
        if self.edit:
            self.edit(grads)
        params.append(torch.nn.Parameter(torch.ones(3, dtype=self.dtype)))
        optimizer = self.make(self.groups(params), backend=backend, **copy.deepcopy(self.options))
        if at_state or self.steps_before:
            optimizer.init_state()
            for state in optimizer.state.values():
                state["step"].fill_(self.steps_before)
                moved = {name: laid_out(t, at_state) for name, t in state.items() if t.dim()}
                state.update(moved)
        found: Outcome = {}
        for k, row in enumerate(grads):
            if self.grad_dtype not in (None, self.dtype):
                optimizer.apply_gradients(zip(row, params[:-1]), scale=0.5 if k % 2 else 1.0)
            else:
                for p, g in zip(params, row):
                    p.grad = g
                self.step(optimizer, k)
            if optimizer.tracker:
                found["statistics"] = optimizer.statistics.tensor.clone()
            spoil_workspaces(optimizer)
        if self.step is plain_step:
            skipped_step(optimizer)
        found |= states_of(optimizer, params)
        found["skipped steps"] = torch.tensor(int(optimizer.skipped_steps or 0))
        if optimizer.grad_norm is not None:
            found["grad_norm"] = optimizer.grad_norm.clone()
        return found


@dataclass(frozen=True)
class Accumulation:
    """Gradients that `GradientAccumulator` adds up."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    weights: tuple[Any, ...]
    offset: int = 0
    parameters: Tolerance | None = None
    watched: bool = True
    compared: bool = True

    def run(self, backend: str) -> Outcome:
        accumulator = GradientAccumulator(self.dtype, backend=backend)
        for k, weight in enumerate(self.weights):
            grads = normal(ELEMENTWISE, k, self.grad_dtype, spread=True)
            accumulator([laid_out(g, self.offset) for g in grads], weight)
        return {f"g{i}": g.clone() for i, g in enumerate(accumulator.gradients) if g is not None}


# ---- what a step may be given


def scaled_step(optimizer: Any, number: int) -> None:
    """As under a GradScaler of which the second step finds infinite gradients."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([1024.0]), torch.tensor([float(number == 1)])
    optimizer.step()
    optimizer.forget_scaler()


def rate_on_the_device(optimizer: Any, number: int) -> None:
    optimizer.param_groups[0]["lr"].fill_((0.5, 0.0, 0.25)[number])
    optimizer.step()


def in_other_dtypes(options: dict[str, Any]) -> dict[str, Any]:
    """Numbers on the device in float64 where they were in float32, and in float32 where they were not."""

    def other(option: Any) -> Any:
        if isinstance(option, tuple):
            return tuple(map(other, option))
        return option.to(F64 if option.dtype == F32 else F32) if isinstance(option, Tensor) else option

    return {name: other(option) for name, option in options.items()}


def missing(grads: list[list[Any]]) -> None:
    for k, i in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 3)):
        grads[k][i] = None


def infinite(grads: list[list[Any]]) -> None:
    """The second step has an infinite gradient behind the first piece of a tensor."""
    large = max(grads[1], key=torch.Tensor.numel)
    large.view(-1)[-1] = torch.inf


def not_finite(grads: list[list[Any]]) -> None:
    for row in grads:
        for g in row:
            if g.numel() > 8:
                g.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])


def not_finite_at_last(grads: list[list[Any]]) -> None:
    for g in grads[-1]:
        if g.shape == (7,):
            g[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])


def tiny_and_huge(grads: list[list[Any]]) -> None:
    for row in grads:
        for i, g in enumerate(row):
            g.mul_(10.0 ** (-38 - i % 5) if i % 2 else 1e18)


def one_huge(grads: list[list[Any]]) -> None:
    """One element of each gradient has no square in its dtype: in all registers of a thread, and in many threads."""
    for row in grads:
        for i, g in enumerate(row):
            g.mul_(1e-3)[257 * (i // 2) % g.numel()] = 1e200 if g.dtype == F64 else 1e30


def zero(grads: list[list[Any]]) -> None:
    for row in grads:
        for g in row:
            g.zero_()


def louder(grads: list[list[Any]]) -> None:
    """Of 106 steps with gradients alike, the 103rd and the 105th have ten times as large ones."""
    for k in (102, 104):
        for g in grads[k]:
            g.mul_(10.0)


def louder_or_infinite(grads: list[list[Any]]) -> None:
    grads[2][0].mul_(1e3)
    grads[3][0].view(-1)[0] = torch.nan


def three_groups(params: list[Any]) -> list[dict[str, Any]]:
    return [
        {"params": params[:3], "lr": 0.3, "weight_decay": 0.5},
        {"params": params[3:5], "lr": 0.02, "maximize": True},
        {"params": params[5:], "lr": 0.1},
    ]


# ---- the table

ADAMW = {"lr": 3e-2, "betas": (0.85, 0.97), "eps": 1e-5, "weight_decay": 0.1}
LION = {"lr": 3e-3, "weight_decay": 0.1}
GIVEN_RATE = {"lr": 0.1, "relative_step": False}
ON_DEVICE: dict[str, Any] = {
    **{"lr": torch.tensor(0.03), "weight_decay": torch.tensor(0.1, dtype=F64), "eps": torch.tensor(1e-5)},
    "betas": (torch.tensor(0.85), torch.tensor(0.97, dtype=F64)),
}
FACTORED_ON_DEVICE: dict[str, Any] = {
    **{"lr": torch.tensor(0.03), "weight_decay": torch.tensor(0.1, dtype=F64), "beta1": torch.tensor(0.9)},
    **{"eps": (torch.tensor(1e-3), torch.tensor(0.2, dtype=F64)), "relative_step": False},
}
STOCHASTIC: dict[str, Any] = {"stochastic_rounding": True, "seed": 5}
THREE_WEIGHTS = (0.5, torch.tensor(3.0), torch.tensor(0.7, dtype=F64))
HUGE: tuple[Shape, ...] = ((4096,), (4095,)) * 16
IMAGES: tuple[Shape, ...] = ((8, 4, 3, 3), (2, 5, 7, 3), (16, 8, 5, 5))

CASES: dict[str, Any] = {}

for _label, _dtype in DTYPES.items():
    for _convention in ("transformers", "torch", "keras"):
        CASES[f"AdamW {_convention} {_label}"] = Case(
            AdamW, {**ADAMW, "convention": _convention}, _dtype, spread=True, edit=not_finite_at_last
        )
    CASES[f"AdamW amsgrad {_label}"] = Case(
        AdamW, {**ADAMW, "convention": "torch", "amsgrad": True, "maximize": True}, _dtype, spread=True
    )
    CASES[f"Lion {_label}"] = Case(Lion, LION, _dtype, spread=True, edit=not_finite_at_last)
    CASES[f"Adafactor {_label}"] = Case(Adafactor, {"beta1": 0.9, "weight_decay": 0.1}, _dtype, FACTORED)
    CASES[f"AdamW misaligned {_label}"] = Case(AdamW, ADAMW, _dtype, offset=(1, 3, 1))
    CASES[f"Lion clipped {_label}"] = Case(Lion, {**LION, "max_grad_norm": 1.0}, _dtype)
    CASES[f"accumulation {_label}"] = Accumulation(_dtype, _dtype, THREE_WEIGHTS)
    for _kind, _weight in zip(("a number", "float32", "float64"), THREE_WEIGHTS):
        CASES[f"accumulation of one, its weight {_kind}, {_label}"] = Accumulation(_dtype, _dtype, (_weight,))
    CASES[f"accumulation misaligned {_label}"] = Accumulation(_dtype, _dtype, THREE_WEIGHTS, offset=1)

MIXED = {
    "bfloat16 of float32": (BF16, F32),
    "float32 of bfloat16": (F32, BF16),
    "float32 of float16": (F32, F16),
    "float64 of float32": (F64, F32),
}
for _label, (_dtype, _grad) in MIXED.items():
    CASES[f"AdamW {_label}"] = Case(AdamW, ADAMW, _dtype, grad_dtype=_grad)
    CASES[f"accumulation {_label}"] = Accumulation(_dtype, _grad, THREE_WEIGHTS)

_TWO = ((40,), (33,))
_FOUR = ((40,), (33, 40), (4, 3), (19,))
for _label, _dtype, _policy in (("float32", F32, {}), ("bfloat16 stochastic", BF16, STOCHASTIC)):
    for _kind, _made in (("", dict), (", in other dtypes", in_other_dtypes)):
        _of_lion = {name: ON_DEVICE[name] for name in ("lr", "betas", "weight_decay")}
        _name = f"options on the device, {_label}{_kind}"
        CASES[f"AdamW {_name}"] = Case(AdamW, {**_made(ON_DEVICE), **_policy}, _dtype, _TWO)
        CASES[f"Lion {_name}"] = Case(Lion, {**_made(_of_lion), **_policy}, _dtype, _TWO)
        CASES[f"Adafactor {_name}"] = Case(Adafactor, {**_made(FACTORED_ON_DEVICE), **_policy}, _dtype, _FOUR)

PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bfloat16 master": (BF16, {"master_weights": True}),
    "float16 master": (F16, {"master_weights": True}),
    "bfloat16 stochastic": (BF16, {"stochastic_rounding": True, "seed": 5}),
    "float16 stochastic": (F16, {"stochastic_rounding": True, "seed": 5}),
    "bfloat16 stochastic, float32 moments": (BF16, {"stochastic_rounding": True, "seed": 5, "state_dtype": F32}),
    "float32, bfloat16 moments": (F32, {"state_dtype": BF16, "seed": 5}),
    "float64, bfloat16 moments": (F64, {"state_dtype": BF16, "seed": 5}),
}
for _label, (_dtype, _policy) in PRECISIONS.items():
    CASES[f"AdamW {_label}"] = Case(AdamW, {**ADAMW, **_policy}, _dtype, steps=3)
    CASES[f"AdamW amsgrad {_label}"] = Case(AdamW, {**ADAMW, "amsgrad": True, **_policy}, _dtype)
    CASES[f"Lion {_label}"] = Case(Lion, {**LION, **_policy}, _dtype, steps=3)
    CASES[f"Adafactor {_label}"] = Case(Adafactor, {"beta1": 0.9, "weight_decay": 0.1, **_policy}, _dtype, FEW)

_A_TIE = Tolerance("a moment may fall to the other side of a tie of bfloat16", rtol=1e-5, atol=4e-5)
CASES["Adafactor float32, bfloat16 moments"] = replace(
    CASES["Adafactor float32, bfloat16 moments"], parameters=_A_TIE, compared=False
)

for _label in ("bfloat16 master", "bfloat16 stochastic"):
    _dtype, _policy = PRECISIONS[_label]
    CASES[f"AdamW statistics {_label}"] = Case(AdamW, {**ADAMW, **_policy, "track_statistics": True}, _dtype)
    CASES[f"Adafactor statistics {_label}"] = Case(
        Adafactor, {**_policy, "track_statistics": True}, _dtype, FEW, compared=False
    )
for _label, _dtype in DTYPES.items():
    CASES[f"Lion statistics {_label}"] = Case(Lion, {**LION, "lr": 3e-4, "track_statistics": True}, _dtype)
    CASES[f"Adafactor statistics {_label}"] = Case(
        Adafactor, {"beta1": 0.9, "track_statistics": True}, _dtype, FEW, compared=False
    )
CASES |= {
    "AdamW statistics of a skipped step": Case(
        AdamW, {**ADAMW, "track_statistics": True, "skip_nonfinite": True}, edit=infinite, step=unscaled_step
    ),
    "Adafactor statistics of a skipped step": Case(
        Adafactor,
        {"track_statistics": True, "skip_nonfinite": True},
        BF16,
        FEW,
        edit=infinite,
        step=unscaled_step,
        compared=False,
    ),
    "AdamW skipping": Case(
        AdamW, {**ADAMW, "skip_nonfinite": True, "max_grad_norm": 1.0}, steps=3, edit=infinite, step=unscaled_step
    ),
    "Adafactor skipping": Case(
        Adafactor, {"skip_nonfinite": True}, BF16, FEW, steps=3, edit=infinite, step=unscaled_step, compared=False
    ),
    "AdamW skipping outliers": Case(
        AdamW, {**ADAMW, "skip_outliers": 3.0}, shapes=((40,), (33,)), steps=106, edit=louder, step=unscaled_step
    ),
    "Lion skipping large gradients": Case(
        Lion,
        {**LION, "skip_grad_norm_above": 30.0},
        shapes=((40,), (33,)),
        steps=5,
        edit=louder_or_infinite,
        step=unscaled_step,
    ),
    "AdamW later": Case(AdamW, {"lr": 0.1}, shapes=((40,), (33,)), steps_before=1000),
    "Adafactor later": Case(Adafactor, {"weight_decay": 0.1}, shapes=((40,), (33, 40), (4, 3)), steps_before=1000),
    "Adafactor warmup, later": Case(
        Adafactor, {"warmup_init": True, "decay_rate": -0.5}, shapes=((40,), (33, 40), (4, 3)), steps_before=11
    ),
    "Lion statistics of many pieces": Case(
        Lion, {**LION, "track_statistics": True}, shapes=((2_200_000,),), steps=1, watched=False
    ),
    "AdamW scaled": Case(AdamW, ADAMW, steps=3, step=scaled_step),
    "AdamW keras scaled": Case(AdamW, {**ADAMW, "convention": "keras"}, steps=3, step=scaled_step),
    "Adafactor scaled": Case(Adafactor, {"beta1": 0.9}, F32, FEW, steps=3, step=scaled_step, compared=False),
    "AdamW clipped": Case(AdamW, {**ADAMW, "max_grad_norm": 1.0}, BF16, steps=1),
    **{
        f"Lion clipped, one huge, {_label}": Case(
            Lion, {**LION, "max_grad_norm": 1.0}, DTYPES[_label], HUGE, steps=1, edit=one_huge
        )
        for _label in ("float32", "float64", "bfloat16")
    },
    "Adafactor clipped": Case(Adafactor, {**GIVEN_RATE, "max_grad_norm": 1.0}, F32, FEW, compared=False),
    "AdamW without correction": Case(AdamW, {**ADAMW, "correct_bias": False}),
    "AdamW eps 0, gradients 0": Case(AdamW, {**ADAMW, "eps": 0.0}, edit=zero),
    "AdamW not finite": Case(AdamW, {**ADAMW, "amsgrad": True}, steps=1, edit=not_finite),
    "AdamW not finite, bfloat16 master": Case(AdamW, {**ADAMW, "master_weights": True}, BF16, steps=1, edit=not_finite),
    "AdamW not finite, bfloat16 stochastic": Case(
        AdamW, {**ADAMW, "stochastic_rounding": True, "track_statistics": True, "seed": 5}, BF16, edit=not_finite
    ),
    "AdamW clipped, tiny and huge": Case(AdamW, {**ADAMW, "max_grad_norm": 1.0}, edit=tiny_and_huge),
    "Adafactor small matrices": Case(
        Adafactor,
        {"beta1": 0.9, "track_statistics": True},
        shapes=((300, 7, 9), (32, 31), (16, 8, 5, 5), (40, 30, 3, 3)),
        compared=False,
    ),
    "Lion not finite": Case(Lion, LION, edit=not_finite),
    "AdamW tiny and huge": Case(AdamW, ADAMW, edit=tiny_and_huge),
    "AdamW missing gradients": Case(AdamW, ADAMW, steps=3, edit=missing),
    "AdamW keras missing gradients": Case(AdamW, {**ADAMW, "convention": "keras"}, steps=3, edit=missing),
    "AdamW three groups": Case(AdamW, ADAMW, steps=3, groups=three_groups),
    "AdamW rate on the device": Case(AdamW, {"lr": torch.tensor(0.5)}, steps=3, step=rate_on_the_device),
    "AdamW float64 rate on the device": Case(
        AdamW, {"lr": torch.tensor(0.5, dtype=F64)}, steps=3, step=rate_on_the_device
    ),
    "AdamW channels last": Case(AdamW, ADAMW, shapes=IMAGES, memory_format=torch.channels_last),
    "AdamW 200 tensors": Case(AdamW, ADAMW, shapes=tuple((n % 5 + 1,) for n in range(200)), steps=1),
    "Adafactor defaults": Case(Adafactor, {}, F32, FACTORED, compared=False),
    "Adafactor given rate, low threshold": Case(
        Adafactor, {**GIVEN_RATE, "clip_threshold": 0.1, "scale_parameter": False}, F32, FACTORED, compared=False
    ),
    "Adafactor warmup, maximize": Case(
        Adafactor,
        {"warmup_init": True, "maximize": True, "decay_rate": -0.5, "eps": (1e-3, 0.1)},
        F32,
        FACTORED,
        compared=False,
    ),
    "Adafactor misaligned": Case(Adafactor, {"beta1": 0.9}, F32, FEW, offset=(1, 3, 1), compared=False),
    "Adafactor channels last": Case(Adafactor, {}, F32, IMAGES, memory_format=torch.channels_last, compared=False),
    "Adafactor missing gradients": Case(Adafactor, {}, F32, FEW, steps=3, edit=missing, compared=False),
    "Adafactor three groups": Case(Adafactor, {"relative_step": False}, F32, FEW, groups=three_groups, compared=False),
    "Adafactor many tiles": Case(
        Adafactor, {}, F32, ((600, 520), (40, 1500), (1500, 40), (5000,)), steps=1, compared=False
    ),
    "Adafactor many rows": Case(Adafactor, {}, F32, ((9000, 2), (2, 9000)), steps=1, compared=False),
    "Adafactor gradients 0": Case(Adafactor, {}, F32, FEW, edit=zero, compared=False),
    "Adafactor NaN and inf": Case(Adafactor, {"beta1": 0.9}, F32, FEW, edit=not_finite),
}
