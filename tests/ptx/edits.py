"""What makes gradients of a case unusual; each is given all of them, [step][parameter]."""

from typing import Any

import torch


def missing(grads: list[list[Any]]) -> None:
    for k, i in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 3)):
        grads[k][i] = None


def infinite(grads: list[list[Any]]) -> None:
    """The second step has an infinite gradient behind the first piece of a tensor."""
    large = max(grads[1], key=torch.Tensor.numel)
    large.view(-1)[-1] = torch.inf


def not_finite(grads: list[list[Any]]) -> None:
    for row in grads:
        for g in row:
            if g.numel() > 8:
                g.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])


def not_finite_at_last(grads: list[list[Any]]) -> None:
    for g in grads[-1]:
        if g.shape == (7,):
            g[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])


def tiny_and_huge(grads: list[list[Any]]) -> None:
    for row in grads:
        for i, g in enumerate(row):
            g.mul_(10.0 ** (-38 - i % 5) if i % 2 else 1e18)


def one_huge(grads: list[list[Any]]) -> None:
    """One element of each gradient has no square in its dtype: in all registers of a thread, and in many threads."""
    for row in grads:
        for i, g in enumerate(row):
            g.mul_(1e-3)[257 * (i // 2) % g.numel()] = 1e200 if g.dtype == torch.float64 else 1e30


def zero(grads: list[list[Any]]) -> None:
    for row in grads:
        for g in row:
            g.zero_()


def louder(grads: list[list[Any]]) -> None:
    """Of 106 steps with gradients alike, the 103rd and the 105th have ten times as large ones."""
    for k in (102, 104):
        for g in grads[k]:
            g.mul_(10.0)


def louder_or_infinite(grads: list[list[Any]]) -> None:
    grads[2][0].mul_(1e3)
    grads[3][0].view(-1)[0] = torch.nan
