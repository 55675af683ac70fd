"""Checks of what a user passes: one function per kind of value; errors name the argument, its value and the way out."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt.without_data import is_lazy
from fusedopt_kernels.layout import overlaps_itself

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""The dtypes of parameters, gradients and states that are supported."""

Check = Callable[[str, Any], None]


def number(name: str, value: Any) -> float:
    """The value as a float; refuses what is not a number."""
    # Other kinds of real numbers, such as fractions, cannot be calculated with beside tensors.
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number, got {value!r}{hint(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, got a larger one") from None


def hint(value: Any) -> str:
    """A hint for a value that is not a number but looks like one."""
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    return " (a string: YAML, for one, takes 1e-4 for text, and 1.0e-4 for a number)"


def plain(value: Any, *, tensors: bool = True) -> Any:
    """NumPy's numbers as Python's own, at any depth of lists, tuples and dicts; anything else as it is.

    `torch.load(weights_only=True)` and JSON know no others.

    Args:
        value: an option, or a config.
        tensors: whether tensors and arrays of one element are numbers, too.
    """
    if type(value) is dict:
        return {key: plain(inner, tensors=tensors) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(inner, tensors=tensors) for inner in value)
    if isinstance(value, np.generic):
        return value.item()
    if tensors and isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if tensors and isinstance(value, np.ndarray):
        return value.item() if value.size == 1 else value
    return value


def finite_non_negative(name: str, value: Any) -> None:
    """Refuses negative, infinite and NaN values."""
    amount = number(name, value)
    if not (math.isfinite(amount) and amount >= 0.0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def learning_rate(name: str, value: Any) -> None:
    """A finite number >= 0, or a floating tensor of one element (read on its device at every step)."""
    finite_non_negative(name, _held(name, value))


def _held(name: str, value: Any) -> Any:
    """The number in a floating tensor of one element; anything else but tensors as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.layout is not torch.strided or value.numel() != 1 or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}, {value.dtype}{'' if value.layout is torch.strided else f', {value.layout}'}"
        raise ValueError(f"{name} as a tensor must hold one floating-point number, got {got}")
    if value.is_meta:
        raise ValueError(f"{name} is a tensor on the meta device, where it holds no number: make it on a real one")
    return value.item()


def non_negative_option(name: str, value: Any) -> None:
    """A finite number >= 0, or a floating tensor of one element that requires no gradient, like a learning rate."""
    _requires_none(name, value)
    finite_non_negative(name, _held(name, value))


def beta_option(name: str, value: Any) -> None:
    """A decay rate of a running average, in [0, 1), or a tensor like that."""
    _requires_none(name, value)
    beta(name, _held(name, value))


def _requires_none(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a tensor that requires a gradient, which a step does not give it: detach it")


_ROUNDING = 1e-12
"""How far below 0 the last rate of a schedule may be: formulas that end at 0 miss it by some 1e-17."""


def rate_in_use(rate: Any) -> Any:
    """The rate of a group for its check at a step, which waits for no device; 0.0 for one that rounding made negative.

    Of a tensor elsewhere than on the CPU, what it holds is not looked at.
    """
    rate = in_use(rate.detach() if isinstance(rate, Tensor) else rate)
    return 0.0 if isinstance(rate, float) and -_ROUNDING < rate < 0.0 else rate


def in_use(option: Any) -> Any:
    """An option of a group, or a pair of them, for its check at a step, which waits for no device.

    Of a tensor elsewhere than on the CPU, what it holds is not looked at.
    """
    if isinstance(option, (tuple, list)) and any(isinstance(part, Tensor) for part in option):
        return tuple(map(in_use, option))
    if (
        isinstance(option, Tensor)
        and option.numel() == 1
        and option.is_floating_point()
        and not option.is_meta
        and not option.requires_grad
    ):
        return option.item() if option.device.type == "cpu" else 0.0
    return option


def count(name: str, value: Any) -> None:
    """A whole number >= 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name} must be a whole number >= 0, got {value!r}")


def seed(name: str, value: Any) -> None:
    """A whole number that 63 bits hold."""
    count(name, value)
    if value >= 1 << 63:
        raise ValueError(f"{name} must be less than 2^63, got {value!r}")


def beta(name: str, value: Any) -> None:
    """A decay rate of a running average, in [0, 1)."""
    amount = number(name, value)
    if not 0.0 <= amount < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def betas(name: str, value: Any) -> None:
    """A pair of decay rates."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair (beta1, beta2), got {value!r}")
    for i, one in enumerate(value):
        beta_option(f"{name}[{i}]", one)


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def no_parameter_twice(groups: Sequence[dict[str, Any]]) -> None:
    """Refuses groups in which a parameter comes twice: it would be updated twice in a step."""
    seen: set[int] = set()
    for group in groups:
        for p in group["params"]:
            if id(p) in seen:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} comes twice in the param groups: it would be updated twice "
                    "in a step, list it once"
                )
            seen.add(id(p))


def parameter(p: Tensor) -> None:
    """A parameter that can be updated in place: real, floating, dense, without two elements in one place."""
    what = "a lazy parameter" if is_lazy(p) else f"a parameter of shape {tuple(p.shape)}"
    if p.layout is not torch.strided:
        raise ValueError(
            f"{what} is {p.layout}: only dense parameters can be updated, use torch.optim.SparseAdam for it"
        )
    if not p.dtype.is_floating_point or p.dtype.itemsize < 2:
        raise ValueError(
            f"{what} is {p.dtype}: parameters must be float16, bfloat16, float32 or float64; "
            "for a complex one pass torch.view_as_real of it"
        )
    if not is_lazy(p) and overlaps_itself(p):
        raise ValueError(
            f"{what} with strides {p.stride()} has several elements in one place of memory (an expanded tensor?): "
            "pass the tensor before it was expanded, or a clone of it"
        )
