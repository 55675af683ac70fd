"""Parameters whose steps are measured, and what `optimizer.statistics` should say of a step."""

import math

import torch
from torch import nn

from fusedopt.statistics.values import QUANTITIES
from helpers.optimizers import OPTIMIZERS
from helpers.precision import normal

# Borders of pieces, tensors that are joined, gaps and other orders in memory, no elements; the last has no gradient.
SHAPES = [(33, 70), (40,), (3, 16, 9), (0, 4), (1,), (41, 52), (2100,), (5, 7)]
RTOL = 1e-5


def parameters(dtype):
    params = [nn.Parameter(0.3 * t) for t in normal(SHAPES, 0, dtype)]
    params[5].data = params[5].data.mT.contiguous().mT
    return params


def give_gradients(params, seed, size=0.01):
    """To all but the last, to the first in another order in memory."""
    grads = normal(SHAPES, seed, torch.float32)
    for i, (p, g) in enumerate(zip(params[:-1], grads)):
        p.grad = (size * g).to(p.dtype)
        if i == 0:
            p.grad = p.grad.mT.contiguous().mT


def made(name, params, **options):
    """The optimizer of that name for a model, or for a list of parameters."""
    return (
        OPTIMIZERS[name](params, **options)
        if isinstance(params, nn.Module)
        else OPTIMIZERS[name].cls(params, **options)
    )


def expected(params, before, new, kept, factor):
    """What statistics should say, [parameters, quantities], float64.

    Args:
        params: with the gradients of the step; NaN for those without one.
        before: the weights before the step, as float64; so are the next two.
        new: the weights after it, before they are rounded to 16 bits.
        kept: the weights after it.
        factor: what the optimizer multiplies gradients by before it measures them.
    """
    rows = []
    for p, old, updated, after in zip(params, before, new, kept):
        if p.grad is None:
            rows.append([math.nan] * len(QUANTITIES))
            continue
        change = updated - old
        weight, update = old.norm().item(), change.norm().item()
        lost = ((after == old) & (change != 0)).double().mean().item() if p.dtype.itemsize == 2 and p.numel() else 0.0
        ratio = update / weight if weight else math.nan
        largest = change.abs().max().item() if p.numel() else 0.0
        rows.append([factor * p.grad.double().norm().item(), weight, update, largest, ratio, lost])
    return torch.tensor(rows, dtype=torch.float64)
