"""Memory that steps on the CPU use again and again, so that it stays in the cache."""

import threading

import torch
from torch import Tensor

from fusedopt_kernels.memory import lasting

_ELEMENTS = 1 << 20
"""Elements that a block has room for, at least."""


class _Scratch(threading.local):
    """One for all optimizers of a thread, of which one takes a step at a time; grows where a tensor is larger."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, int], Tensor] = {}

    def like(self, t: Tensor, use: str, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the shape of `t`; another one for another `use`."""
        flat = self._flat.get((use, dtype.itemsize))
        if flat is None or flat.numel() < t.numel():
            flat = lasting((max(_ELEMENTS, t.numel()),), dtype, "cpu")
            if type(flat) is Tensor:  # not what a mode, such as FakeTensorMode, makes of it
                self._flat[use, dtype.itemsize] = flat
        part = flat[: t.numel()]
        if part.dtype != dtype:
            part = part.view(dtype)
        return part if t.dim() == 1 else part.view(t.shape)


scratch = _Scratch()
