"""What is random: parameters, options, gradients. Everything drawn is plain values, so that a failure can be pasted."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch

from fuzz.setups import CLASSES, LAYOUTS, Grads, Group, Setup, Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SMALL_SHAPES = (
    *((), (1,), (5,), (0,), (3, 4), (1, 6), (4, 1), (0, 3), (3, 0), (2, 3, 4), (2, 1, 3, 2), (17, 9), (130,)),
)
TILED_SHAPES = ((40, 33), (3, 70), (2, 50, 3))
"""Longer than 32 on a side, where Adafactor has other kernels."""
LARGE_SHAPES = ((190, 200), (33, 1100), (70_000,), (3, 5, 40, 50), (520, 520))
"""Some are beyond the sizes from which the eager backend goes other ways."""

SEEDS = st.tuples(st.integers(0, 9), st.integers(0, 99)).map(lambda x: 100 * x[0] + x[1])
"""Of two numbers below 100: hypothesis prefers larger ones that stand in the source of the package, so that every edit
there would draw other examples."""

SIZES = (1.0, 1e-3, 30.0, 1.0, 1e-6, 0.0, 1e4, 1e-15)
"""Of gradients; the square of the last is the usual eps of Adafactor."""


def shapes(largest: bool) -> st.SearchStrategy[tuple[int, ...]]:
    small, tiled = st.sampled_from(SMALL_SHAPES), st.sampled_from(TILED_SHAPES)
    free = st.lists(st.integers(0, 7), max_size=4).map(tuple)
    return st.one_of(small, small, free, st.sampled_from(LARGE_SHAPES)) if largest else st.one_of(small, free, tiled)


@st.composite
def specs(draw: Any, dtype: torch.dtype, large: bool) -> Spec:
    return Spec(
        draw(shapes(large and draw(st.integers(0, 5)) == 0)),
        draw(st.sampled_from(DTYPES)) if draw(st.integers(0, 4)) == 0 else dtype,
        draw(st.sampled_from((*LAYOUTS, "shared"))),
        draw(st.sampled_from((1.0, 1e-2, 0.0, 100.0, 1e200 if dtype == torch.float64 else 1.0))),
        draw(st.integers(0, 6)) > 0,
    )


def _tensor(values: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    """A number, or now and then a tensor of one."""
    in_tensor = st.tuples(values, st.sampled_from((torch.float32, torch.float64)), st.booleans()).map(
        lambda x: torch.tensor([x[0]] if x[2] else x[0], dtype=x[1])
    )
    return st.one_of(values, values, values, in_tensor)


LR = _tensor(st.sampled_from((0.1, 1e-3, 2.0, 0.0)))
BETA = _tensor(st.sampled_from((0.9, 0.999, 0.0, 0.5, 0.9999, 1e-4)))
BETAS = st.tuples(BETA, BETA)
DECAY = _tensor(st.sampled_from((0.1, 5.0, 0.01, 0.0)))
EPS = _tensor(st.sampled_from((1e-8, 1e-6, 0.0, 1e-3, 1.0)))
FLAG = st.booleans()
PRECISION: dict[str, st.SearchStrategy[Any]] = {
    "master_weights": FLAG,
    "stochastic_rounding": FLAG,
    "state_dtype": st.sampled_from((None, torch.float32, torch.bfloat16)),
}

GROUP_OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "AdamW": {
        **{"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "amsgrad": FLAG, "maximize": FLAG},
        **PRECISION,
    },
    "AdamWeightDecay": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "amsgrad": FLAG, **PRECISION},
    "Adafactor": {
        "eps": st.tuples(_tensor(st.sampled_from((1e-30, 1e-3, 1e-8))), _tensor(st.sampled_from((1e-3, 0.0, 1.0)))),
        "clip_threshold": st.sampled_from((1.0, 0.01, math.inf, 10.0)),
        "decay_rate": st.sampled_from((-0.8, 0.0, -0.5, -3.0)),
        "beta1": st.one_of(st.none(), BETA),
        "weight_decay": DECAY,
        "scale_parameter": FLAG,
        "maximize": FLAG,
        **PRECISION,
    },
    "Lion": {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "maximize": FLAG, **PRECISION},
}
"""The options of a param group that can be switched at any time."""

WHOLE_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "max_grad_norm": st.sampled_from((None, 1.0, 1e-3, 100.0, math.inf)),
    "skip_nonfinite": FLAG,
    "skip_grad_norm_above": st.sampled_from((None, 1.0, 50.0)),
    "skip_outliers": st.sampled_from((None, 3.0, 1.5)),
    "track_statistics": st.sampled_from((True, True, 2, False)),
    "seed": st.sampled_from((0, 1, (1 << 40) + 7)),
}
"""Those of the whole optimizer."""


@st.composite
def some(draw: Any, options: dict[str, st.SearchStrategy[Any]], likely: int = 2) -> dict[str, Any]:
    """Values for some of these options."""
    chosen = {name: draw(values) for name, values in options.items() if draw(st.integers(0, likely)) == 0}
    if chosen.get("master_weights") and chosen.get("stochastic_rounding"):
        chosen["stochastic_rounding"] = False
    return chosen


def group_options(name: str) -> st.SearchStrategy[dict[str, Any]]:
    return some(GROUP_OPTIONS[name])


@st.composite
def groups(draw: Any, name: str) -> Group:
    """A small group to be added."""
    dtype = draw(st.sampled_from(DTYPES))
    return Group(
        tuple(draw(st.lists(specs(dtype, False), min_size=1, max_size=2))), draw(some(GROUP_OPTIONS[name], likely=4))
    )


@st.composite
def setups(draw: Any, name: str, backend: str, large: bool) -> Setup:
    """An optimizer of this class, and its parameters."""
    options = {**draw(some(GROUP_OPTIONS[name], likely=1)), **draw(some(WHOLE_OPTIONS))}
    own: Callable[[], dict[str, Any]] = lambda: draw(some(GROUP_OPTIONS[name], likely=5))  # noqa: E731
    if name == "AdamW":
        options["convention"] = draw(st.sampled_from(("transformers", "torch", "keras")))
        if options["convention"] == "transformers":
            options["correct_bias"] = draw(st.integers(0, 3)) > 0
    elif name == "AdamWeightDecay":
        keras = {"lr": "learning_rate", "eps": "epsilon", "weight_decay": "weight_decay_rate"}
        b1, b2 = options.pop("betas", (0.9, 0.999))
        options = {keras.get(key, key): value for key, value in options.items()} | {"beta_1": b1, "beta_2": b2}
        if draw(FLAG):
            options["exclude_from_weight_decay"] = ["bias"]
        options["decay"] = draw(st.sampled_from((0.0, 0.0, 0.1)))
        if "max_grad_norm" not in options or options["max_grad_norm"] is None:
            kind = draw(st.sampled_from((None, "clipvalue", "clipnorm", "global_clipnorm", "both")))
            bound = draw(st.sampled_from((1.0, 1e-3, 0.0, 20.0)))
            options |= {"clipvalue": bound, "clipnorm": 1.0} if kind == "both" else {kind: bound} if kind else {}
    elif name == "Adafactor":
        if draw(FLAG):
            options |= {"lr": draw(LR), "relative_step": False}
        else:
            options["warmup_init"] = draw(FLAG)
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    of_group = st.lists(specs(dtype, large), min_size=1, max_size=4).map(tuple)
    groups = [Group(draw(of_group), {} if i == 0 else own()) for i in range(draw(st.integers(1, 2)))]
    for group in groups:
        both = {**options, **group.options}
        if both.get("master_weights") and both.get("stochastic_rounding"):
            group.options["master_weights"] = group.options["stochastic_rounding"] = False
    return Setup(name, options, tuple(groups), backend)


@st.composite
def grads(draw: Any) -> Grads:
    """The gradients of a step."""
    way = draw(st.sampled_from(("step", "step", "apply", "closure", "scaler", "unscaled", "backward")))
    return Grads(
        draw(SEEDS),
        draw(st.sampled_from(SIZES)),
        tuple(sorted(draw(st.sets(st.integers(0, 5), max_size=2)))),
        draw(st.sampled_from((math.nan, math.inf, -math.inf, 1e30, -1e200, -0.0)))
        if draw(st.integers(0, 5)) == 0
        else None,
        draw(st.sampled_from((*LAYOUTS, "expanded"))),
        draw(st.sampled_from((None, *DTYPES))) if way == "apply" else None,
        way,
        draw(st.sampled_from((1.0, 0.25, 1024.0, 3.0, -2.0)))
        if way == "apply"
        else draw(st.sampled_from((1.0, 1024.0, 3.0))),
    )


NAMES = tuple(CLASSES)
