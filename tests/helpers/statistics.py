"""A small model whose steps are measured, and values as a step leaves them."""

from typing import Any

import numpy as np
import torch
from torch import nn

from fusedopt import AdamW


class Stack(nn.Module):
    """So many linear layers in a row."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(layers)])

    def give_gradients(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def made(layers: int = 3, **options: Any) -> tuple[Stack, AdamW]:
    torch.manual_seed(0)
    model = Stack(layers)
    return model, AdamW(model.named_parameters(), lr=1e-3, **{"track_statistics": True, **options})


def train(model: Stack, optimizer: AdamW, steps: int) -> list[np.ndarray]:
    """Returns what `optimizer.statistics` said after each step."""
    said = []
    for step in range(steps):
        model.give_gradients(step)
        optimizer.step()
        said.append(optimizer.statistics.tensor.numpy())
    return said


def rows(*ratios: float, gradient: float = 1.0) -> np.ndarray:
    """Values of parameters with weights of norm 1."""
    return np.array([[gradient, 1.0, ratio, ratio, ratio, 0.0] for ratio in ratios])
