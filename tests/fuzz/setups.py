"""What a run is made of: parameters, their options, the gradients of a step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion

CLASSES: dict[str, Any] = {"AdamW": AdamW, "AdamWeightDecay": AdamWeightDecay, "Adafactor": Adafactor, "Lion": Lion}

HALVES = (torch.float16, torch.bfloat16)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "columns": lambda t: torch.cat([t, t, t], dim=-1)[..., 1 : t.shape[-1] + 1] if t.dim() else t,
    "every other": lambda t: torch.stack([t, t], dim=-1)[..., 1],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten(), t.new_zeros(2)])[3 : t.numel() + 3].view(t.shape),
}
"""How a tensor lies in memory, by name. "shared", of parameters, is one block of memory for all that have it."""


class Spec(NamedTuple):
    """A parameter to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    size: float = 1.0
    trained: bool = True


class Group(NamedTuple):
    """A param group to be made."""

    specs: tuple[Spec, ...]
    options: dict[str, Any]


class Setup(NamedTuple):
    """An optimizer and its parameters, to be made."""

    name: str
    options: dict[str, Any]
    groups: tuple[Group, ...]
    backend: str = "eager"


class Grads(NamedTuple):
    """The gradients of one step, and the way that they take into it.

    Attributes:
        seed: of what they are.
        size: their standard deviation.
        missing: places of parameters without one; may be beyond the last.
        poison: None, or a number that one element gets.
        layout: by name; "expanded" for one number in all elements.
        dtype: None for the parameter's; another one goes through `apply_gradients`.
        way: "step", "closure", "apply", "scaler", "unscaled", "backward".
        scale: of the way "apply", and of the scaler.
    """

    seed: int = 0
    size: float = 1.0
    missing: tuple[int, ...] = ()
    poison: float | None = None
    layout: str = "contiguous"
    dtype: torch.dtype | None = None
    way: str = "step"
    scale: float = 1.0


def drawn(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(specs: Sequence[Spec], seed: int) -> list[torch.nn.Parameter]:
    """Parameters, those of the layout "shared" in one block of memory for each dtype."""
    sizes: dict[torch.dtype, int] = {}
    for spec in specs:
        if spec.layout == "shared":
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + int(np.prod(spec.shape, dtype=int))
    blocks = {dtype: torch.zeros(size + 2, dtype=dtype) for dtype, size in sizes.items()}
    begun = dict.fromkeys(blocks, 1)
    params = []
    for i, spec in enumerate(specs):
        values = (drawn(seed + i, spec.shape) * spec.size).to(spec.dtype)
        if spec.layout == "shared":
            begin = begun[spec.dtype]
            begun[spec.dtype] += values.numel()
            place = blocks[spec.dtype][begin : begin + values.numel()].view(spec.shape)
            place.copy_(values)
        else:
            place = LAYOUTS[spec.layout](values)
        params.append(torch.nn.Parameter(place, requires_grad=spec.trained))
    return params


def name_of(place: int) -> str:
    return f"{place}.bias" if place % 3 == 2 else f"{place}.weight"


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, with numbers in the place of tensors, so that they can be compared."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(plain, value))
        return value.double().squeeze().tolist() if isinstance(value, Tensor) else value

    return {name: plain(value) for name, value in group.items() if name not in ("params", "param_names")}
