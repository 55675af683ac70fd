"""What the tests of training loops share: a small model, its data, and every optimizer as a row of a table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fusedopt import Adafactor, AdamW, AdamWeightDecay, PolynomialDecay, WarmUp
from fusedopt.adafactor_schedule import AdafactorSchedule
from fusedopt.backends import has_triton
from fusedopt.optimizer.base import FusedOptimizer

MakeOptimizer = Callable[..., FusedOptimizer]


def rate_of_the_step() -> WarmUp:
    return WarmUp(0.05, PolynomialDecay(0.05, 20), warmup_steps=3)


# Each takes a model and `backend=`.
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": lambda m, **kw: AdamW(m.parameters(), lr=0.01, weight_decay=0.1, **kw),
    "AdamW-without_correction": lambda m, **kw: AdamW(m.parameters(), lr=0.01, correct_bias=False, **kw),
    "AdamW-torch-amsgrad": lambda m, **kw: AdamW(m.parameters(), convention="torch", amsgrad=True, **kw),
    "AdamW-keras": lambda m, **kw: AdamW(m.parameters(), lr=0.01, weight_decay=0.1, convention="keras", **kw),
    "AdamW-eps_0": lambda m, **kw: AdamW(m.parameters(), lr=0.01, eps=0.0, **kw),
    "AdamW-tensor_lr": lambda m, **kw: AdamW(m.parameters(), lr=torch.tensor(0.01), weight_decay=0.1, **kw),
    "AdamWeightDecay": lambda m, **kw: AdamWeightDecay(
        m.named_parameters(), 0.01, weight_decay_rate=0.1, exclude_from_weight_decay=["bias"], clipnorm=0.5, **kw
    ),
    "AdamWeightDecay-function": lambda m, **kw: AdamWeightDecay(
        m.named_parameters(), rate_of_the_step(), weight_decay_rate=0.1, decay=0.01, **kw
    ),
    "Adafactor": lambda m, **kw: Adafactor(m.parameters(), weight_decay=0.1, **kw),
    "Adafactor-warmup": lambda m, **kw: Adafactor(m.parameters(), warmup_init=True, weight_decay=0.1, **kw),
    "Adafactor-lr-beta1": lambda m, **kw: Adafactor(m.parameters(), lr=0.01, beta1=0.9, relative_step=False, **kw),
}


def scheduler_for(name: str, optimizer: Any) -> LambdaLR | None:
    """A schedule that goes with the optimizer of this name; None where the rate is a function of the step already."""
    if name == "AdamWeightDecay-function":
        return None
    if name in ("Adafactor", "Adafactor-warmup"):
        return AdafactorSchedule(optimizer)
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


_NEEDS_TRITON = pytest.mark.skipif(not has_triton(), reason="triton is not installed")

BACKENDS = ["eager", pytest.param("triton", marks=_NEEDS_TRITON)]

# Every optimizer on every backend. A step of Adafactor takes the interpreter half a second, and its options for rates
# are the same scalars of the same kernels, so they are spared.
ROWS = [pytest.param(name, "eager", id=f"{name}-eager") for name in OPTIMIZERS] + [
    pytest.param(name, "triton", id=f"{name}-triton", marks=_NEEDS_TRITON)
    for name in OPTIMIZERS
    if name != "Adafactor-warmup"
]


class Net(nn.Module):
    """Two matrices, a vector, and a layer that `skip=True` leaves without gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 8)
        self.sometimes = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden if skip else torch.tanh(self.sometimes(hidden)))


def train(model: nn.Module, optimizer: Any, steps: int, scheduler: Any = None, seed: int = 1) -> None:
    """Some steps on random data; on every third one the layer in the middle gets no gradient."""
    generator = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    for step in range(steps):
        x = torch.randn(4, 5, generator=generator).to(p.device, p.dtype)
        model(x, skip=step % 3 == 2).float().square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def same(a: Any, b: Any) -> bool:
    """Whether two values, dicts and lists of tensors included, are equal to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return same(list(a.parameters()), list(b.parameters()))


@contextmanager
def sharded(model: nn.Module) -> Iterator[nn.Module]:
    """The model under FSDP2, in a process group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for child in model.children():
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        yield model
    finally:
        torch.distributed.destroy_process_group()


def whole(model: nn.Module) -> list[Tensor]:
    """The parameters, gathered where they are sharded."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
