"""Rounding to 16 bits, once: torch takes float64 there through float32, where a number may come to lie on a tie."""

import torch
from torch import Tensor


def round_into(target: Tensor, exact: Tensor) -> None:
    """Writes `exact` into `target`, each number rounded to nearest even in the dtype of `target`."""
    target.copy_(_to_odd(exact) if exact.dtype == torch.float64 and target.dtype.itemsize == 2 else exact)


def _to_odd(exact: Tensor) -> Tensor:
    """float32 from which 16 bits are rounded as from the float64 itself.

    Of the two float32 around a number that is none, it takes the one whose last bit is 1: that is on no tie of a
    shorter dtype, and on the side of every tie that the number was on.
    """
    nearest = exact.to(torch.float32)
    bits = nearest.view(torch.int32)
    inexact = (exact - nearest).abs() > 0.0
    toward_zero = bits - (nearest.double().abs() > exact.abs()).int()
    return torch.where(inexact, toward_zero | 1, bits).view(torch.float32)
