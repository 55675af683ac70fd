"""Everything that runs on compiled kernels and on the eager backend, by name: `CASES`."""

from dataclasses import replace
from typing import Any

import torch
from helpers.comparing import Tolerance
from torch import Tensor

from fusedopt import Adafactor, AdamW, Lion
from ptx import edits
from ptx.outcomes import BF16, F16, F32, F64
from ptx.ranks import SHAPES, Shards
from ptx.workloads import (
    FACTORED,
    FEW,
    Accumulation,
    Case,
    Shape,
    rate_on_the_device,
    scaled_step,
    unscaled_step,
)

DTYPES = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}
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


def in_other_dtypes(options: dict[str, Any]) -> dict[str, Any]:
    """Numbers on the device in float64 where they were in float32, and in float32 where they were not."""

    def other(option: Any) -> Any:
        if isinstance(option, tuple):
            return tuple(map(other, option))
        return option.to(F64 if option.dtype == F32 else F32) if isinstance(option, Tensor) else option

    return {name: other(option) for name, option in options.items()}


def three_groups(params: list[Any]) -> list[dict[str, Any]]:
    return [
        {"params": params[:3], "lr": 0.3, "weight_decay": 0.5},
        {"params": params[3:5], "lr": 0.02, "maximize": True},
        {"params": params[5:], "lr": 0.1},
    ]


CASES: dict[str, Any] = {}
"""Each has `run(backend)`, which returns an `Outcome`, and `parameters` and `watched` of a `Case`."""

for _label, _dtype in DTYPES.items():
    for _convention in ("transformers", "torch", "keras"):
        CASES[f"AdamW {_convention} {_label}"] = Case(
            AdamW, {**ADAMW, "convention": _convention}, _dtype, spread=True, edit=edits.not_finite_at_last
        )
    CASES[f"AdamW amsgrad {_label}"] = Case(
        AdamW, {**ADAMW, "convention": "torch", "amsgrad": True, "maximize": True}, _dtype, spread=True
    )
    CASES[f"Lion {_label}"] = Case(Lion, LION, _dtype, spread=True, edit=edits.not_finite_at_last)
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
CASES["Adafactor float32, bfloat16 moments"] = replace(CASES["Adafactor float32, bfloat16 moments"], parameters=_A_TIE)

for _label in ("bfloat16 master", "bfloat16 stochastic"):
    _dtype, _policy = PRECISIONS[_label]
    CASES[f"AdamW statistics {_label}"] = Case(AdamW, {**ADAMW, **_policy, "track_statistics": True}, _dtype)
    CASES[f"Adafactor statistics {_label}"] = Case(Adafactor, {**_policy, "track_statistics": True}, _dtype, FEW)
for _label, _dtype in DTYPES.items():
    CASES[f"Lion statistics {_label}"] = Case(Lion, {**LION, "lr": 3e-4, "track_statistics": True}, _dtype)
    CASES[f"Adafactor statistics {_label}"] = Case(Adafactor, {"beta1": 0.9, "track_statistics": True}, _dtype, FEW)
CASES |= {
    "AdamW statistics of a skipped step": Case(
        AdamW, {**ADAMW, "track_statistics": True, "skip_nonfinite": True}, edit=edits.infinite, step=unscaled_step
    ),
    "Adafactor statistics of a skipped step": Case(
        Adafactor,
        {"track_statistics": True, "skip_nonfinite": True},
        BF16,
        FEW,
        edit=edits.infinite,
        step=unscaled_step,
    ),
    "AdamW skipping": Case(
        AdamW, {**ADAMW, "skip_nonfinite": True, "max_grad_norm": 1.0}, steps=3, edit=edits.infinite, step=unscaled_step
    ),
    "Adafactor skipping": Case(
        Adafactor, {"skip_nonfinite": True}, BF16, FEW, steps=3, edit=edits.infinite, step=unscaled_step
    ),
    "AdamW skipping outliers": Case(
        AdamW, {**ADAMW, "skip_outliers": 3.0}, shapes=((40,), (33,)), steps=106, edit=edits.louder, step=unscaled_step
    ),
    "Lion skipping large gradients": Case(
        Lion,
        {**LION, "skip_grad_norm_above": 30.0},
        shapes=((40,), (33,)),
        steps=5,
        edit=edits.louder_or_infinite,
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
    "Adafactor scaled": Case(Adafactor, {"beta1": 0.9}, F32, FEW, steps=3, step=scaled_step),
    "AdamW clipped": Case(AdamW, {**ADAMW, "max_grad_norm": 1.0}, BF16, steps=1),
    **{
        f"Lion clipped, one huge, {_label}": Case(
            Lion, {**LION, "max_grad_norm": 1.0}, DTYPES[_label], HUGE, steps=1, edit=edits.one_huge
        )
        for _label in ("float32", "float64", "bfloat16")
    },
    "Adafactor clipped": Case(Adafactor, {**GIVEN_RATE, "max_grad_norm": 1.0}, F32, FEW),
    "AdamW without correction": Case(AdamW, {**ADAMW, "correct_bias": False}),
    "AdamW eps 0, gradients 0": Case(AdamW, {**ADAMW, "eps": 0.0}, edit=edits.zero),
    "AdamW not finite": Case(AdamW, {**ADAMW, "amsgrad": True}, steps=1, edit=edits.not_finite),
    "AdamW not finite, bfloat16 master": Case(
        AdamW, {**ADAMW, "master_weights": True}, BF16, steps=1, edit=edits.not_finite
    ),
    "AdamW not finite, bfloat16 stochastic": Case(
        AdamW, {**ADAMW, "stochastic_rounding": True, "track_statistics": True, "seed": 5}, BF16, edit=edits.not_finite
    ),
    "AdamW clipped, tiny and huge": Case(AdamW, {**ADAMW, "max_grad_norm": 1.0}, edit=edits.tiny_and_huge),
    "Adafactor small matrices": Case(
        Adafactor,
        {"beta1": 0.9, "track_statistics": True},
        shapes=((300, 7, 9), (32, 31), (16, 8, 5, 5), (40, 30, 3, 3)),
    ),
    "Lion not finite": Case(Lion, LION, edit=edits.not_finite),
    "AdamW tiny and huge": Case(AdamW, ADAMW, edit=edits.tiny_and_huge),
    "AdamW missing gradients": Case(AdamW, ADAMW, steps=3, edit=edits.missing),
    "AdamW keras missing gradients": Case(AdamW, {**ADAMW, "convention": "keras"}, steps=3, edit=edits.missing),
    "AdamW three groups": Case(AdamW, ADAMW, steps=3, groups=three_groups),
    "AdamW rate on the device": Case(AdamW, {"lr": torch.tensor(0.5)}, steps=3, step=rate_on_the_device),
    "AdamW float64 rate on the device": Case(
        AdamW, {"lr": torch.tensor(0.5, dtype=F64)}, steps=3, step=rate_on_the_device
    ),
    "AdamW channels last": Case(AdamW, ADAMW, shapes=IMAGES, memory_format=torch.channels_last),
    "AdamW 200 tensors": Case(AdamW, ADAMW, shapes=tuple((n % 5 + 1,) for n in range(200)), steps=1),
    "Adafactor defaults": Case(Adafactor, {}, F32, FACTORED),
    "Adafactor given rate, low threshold": Case(
        Adafactor, {**GIVEN_RATE, "clip_threshold": 0.1, "scale_parameter": False}, F32, FACTORED
    ),
    "Adafactor warmup, maximize": Case(
        Adafactor,
        {"warmup_init": True, "maximize": True, "decay_rate": -0.5, "eps": (1e-3, 0.1)},
        F32,
        FACTORED,
    ),
    "Adafactor misaligned": Case(Adafactor, {"beta1": 0.9}, F32, FEW, offset=(1, 3, 1)),
    "Adafactor channels last": Case(Adafactor, {}, F32, IMAGES, memory_format=torch.channels_last),
    "Adafactor missing gradients": Case(Adafactor, {}, F32, FEW, steps=3, edit=edits.missing),
    "Adafactor three groups": Case(Adafactor, {"relative_step": False}, F32, FEW, groups=three_groups),
    "Adafactor many tiles": Case(Adafactor, {}, F32, ((600, 520), (40, 1500), (1500, 40), (5000,)), steps=1),
    "Adafactor many rows": Case(Adafactor, {}, F32, ((9000, 2), (2, 9000)), steps=1),
    "Adafactor gradients 0": Case(Adafactor, {}, F32, FEW, edit=edits.zero),
    "Adafactor NaN and inf": Case(Adafactor, {"beta1": 0.9}, F32, FEW, edit=edits.not_finite),
}

AVERAGED = {"beta1": 0.9, "weight_decay": 0.1}
_SHARDS = {
    "Adafactor float32, rows": Shards(Adafactor, AVERAGED, F32, -2),
    "Adafactor float32, columns": Shards(Adafactor, AVERAGED, F32, -1),
    "Adafactor float64, columns": Shards(Adafactor, {}, F64, -1, SHAPES[:6]),
    "Adafactor float64, many pieces": Shards(Adafactor, {}, F64, -1, ((2_200_000,),), steps=1, watched=False),
    "Adafactor float32, many tiles": Shards(Adafactor, {}, F32, -2, ((2, 600, 520), (1500, 40)), steps=1),
    "Adafactor bfloat16, rows, stochastic": Shards(Adafactor, {**AVERAGED, **STOCHASTIC}, BF16, -2),
    "Adafactor bfloat16, columns, master": Shards(Adafactor, {**AVERAGED, "master_weights": True}, BF16, -1),
    "Adafactor float16, columns, stochastic": Shards(Adafactor, {**AVERAGED, **STOCHASTIC}, F16, -1),
    "Adafactor bfloat16, rows, statistics": Shards(Adafactor, {**STOCHASTIC, "track_statistics": True}, BF16, -2),
    "AdamW bfloat16, columns, stochastic": Shards(AdamW, {**ADAMW, **STOCHASTIC}, BF16, -1),
    "AdamW float16, rows, stochastic": Shards(AdamW, {**ADAMW, **STOCHASTIC}, F16, -2),
    "AdamW float32, columns, bfloat16 moments": Shards(AdamW, {**ADAMW, "state_dtype": BF16, "seed": 5}, F32, -1),
    "AdamW bfloat16, columns, statistics": Shards(AdamW, {**ADAMW, **STOCHASTIC, "track_statistics": True}, BF16, -1),
    "Lion bfloat16, columns, stochastic": Shards(Lion, {**LION, **STOCHASTIC}, BF16, -1),
    "Lion bfloat16, rows, master": Shards(Lion, {**LION, "master_weights": True}, BF16, -2),
}
CASES |= {f"shards, {name}": case for name, case in _SHARDS.items()}

ONE_OF_EVERY_KERNEL = (
    *("AdamW amsgrad float32", "AdamW bfloat16 stochastic", "AdamW statistics bfloat16 master", "AdamW 200 tensors"),
    *("Lion statistics float16", "AdamW skipping", "AdamW clipped", "accumulation float32"),
    *("Adafactor float32", "Adafactor statistics bfloat16 stochastic", "Adafactor skipping", "Adafactor many tiles"),
    *("shards, Adafactor float32, rows", "shards, Adafactor float32, columns"),
    "shards, AdamW bfloat16, columns, stochastic",
)
"""Some cases that run every kernel, of each dtype in some kernel."""
