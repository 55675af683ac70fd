"""Describes in words what an optimizer keeps of each parameter."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.without_data import is_lazy

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer


def described(optimizer: "FusedOptimizer") -> str:
    """A line per group and dtype; see `FusedOptimizer.describe`."""
    return "\n".join(
        line for number, group in enumerate(optimizer.param_groups) for line in _lines(optimizer, number, group)
    )


def _lines(optimizer: "FusedOptimizer", number: int, group: dict[str, Any]) -> list[str]:
    alike: dict[torch.dtype, list[Tensor]] = {}
    for p in group["params"]:
        if not is_lazy(p):
            alike.setdefault(p.dtype, []).append(p)
    return [f"group {number}: {_line(optimizer, group, params)}" for params in alike.values()]


def _line(optimizer: "FusedOptimizer", group: dict[str, Any], params: list[Tensor]) -> str:
    elements = sum(p.numel() for p in params)
    sizes: dict[str, float] = {_name(params[0].dtype): params[0].dtype.itemsize * elements}
    for p in params:
        for name, spec in optimizer.state_specs(p, group).items():
            if spec.without != "all":
                entry = f"{name} {_name(spec.dtype)}"
                sizes[entry] = sizes.get(entry, 0.0) + spec.dtype.itemsize * spec.shape(p).numel()
    terms = " + ".join(f"{entry} {_number(size, elements)}" for entry, size in sizes.items())
    return f"{elements:,} parameters: {terms} = {_number(sum(sizes.values()), elements)} bytes"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(size: float, elements: int) -> str:
    return f"{size / max(elements, 1):.3g}"
