"""Weights of 16 bits: the policies for them as rows, and the float32 weights that an optimizer keeps."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.optimizers import OPTIMIZERS

HALVES = (torch.bfloat16, torch.float16)

each_half = pytest.mark.parametrize("half", HALVES, ids=str)

POLICIES: dict[str, dict[str, Any]] = {
    "master": {"master_weights": True},
    "master-bfloat16": {"master_weights": True, "state_dtype": torch.bfloat16},
    "stochastic": {"stochastic_rounding": True},
    "stochastic-float32": {"stochastic_rounding": True, "state_dtype": torch.float32},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
}
"""By name, what an optimizer is told about precision."""

PRECISE = [name for name, row in OPTIMIZERS.items() if "master_weights" in inspect.signature(row.cls).parameters]
"""The optimizers that have these options."""

FROZEN = "ignore:bfloat16 parameters and moments are rounded to nearest:UserWarning"
"""For tests that compare with plain bfloat16 on purpose."""

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "column slice": lambda t: torch.cat([t, t[..., :3]], dim=-1)[..., : t.shape[-1]],
    "every other": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}
"""Functions that lay out a matrix anew."""


def joined(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights that bfloat16 parameters and remainders stand for, whether or not they are NaN."""
    bits = (p.detach().contiguous().view(torch.int16).to(torch.int64) << 16) + remainder.to(torch.int64)
    return from_bits(bits)


def from_bits(bits: Tensor) -> Tensor:
    """float32 numbers of these bits, given as int64."""
    return ((bits & 0xFFFFFFFF) - ((bits & 0x80000000) << 1)).to(torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    """The bits of float32 or of 16-bit numbers, as int64."""
    kind = torch.int32 if x.dtype == torch.float32 else torch.int16
    return x.detach().contiguous().view(kind).to(torch.int64) & (0xFFFFFFFF if kind == torch.int32 else 0xFFFF)


def float32_weight(optimizer: Any, p: Tensor) -> Tensor:
    """The weight that an optimizer with master weights keeps of a parameter; the parameter itself if it is float32."""
    if p.dtype == torch.bfloat16:
        return joined(p, optimizer.state[p]["remainder"].contiguous())
    return (optimizer.state[p]["master_weight"] if p.dtype == torch.float16 else p.detach()).contiguous()


def normal(shapes: Sequence[Any], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Normally distributed numbers of 16 bits, in `dtype`, which float32 and 16 bits hold alike."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype) for shape in shapes]


def parameters(shapes: Sequence[Any], dtype: torch.dtype, seed: int = 0, device: Any = "cpu") -> list[Any]:
    """Parameters of these shapes."""
    return [torch.nn.Parameter(t.to(device)) for t in normal(shapes, seed, dtype)]


def step(optimizer: Any, grads: Sequence[Tensor | None]) -> None:
    """A step with these gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


def outcome(optimizer: Any) -> Iterator[dict[str, Tensor]]:
    """Of each parameter itself and its state, on the CPU."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = {name: value.detach().cpu() for name, value in optimizer.state.get(p, {}).items()}
            yield {"param": p.detach().cpu(), **state}
