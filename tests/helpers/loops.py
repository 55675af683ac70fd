"""What the tests of training loops share: a small model, its data, and its shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
