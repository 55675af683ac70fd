"""Memory that steps on the CPU use again and again, so that it stays in the cache."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt_kernels.memory import lasting, outside_inference_mode

_ELEMENTS = 1 << 20
"""Elements that a block has room for, at least."""

_VIEWS = 1 << 14
"""Views that are kept, at most: some 10 MB of objects. To make one takes 1 us, to find it again a quarter of that."""


class Row(NamedTuple):
    """Tensors that lie one after the other.

    Attributes:
        whole: all of them, flat; a single one is as it is.
        each: a view of each.
    """

    whole: Tensor
    each: list[Tensor]


class _Scratch(threading.local):
    """One for all optimizers of a thread, of which one takes a step at a time; grows where a tensor is larger."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, int], Tensor] = {}
        self._rows: dict[tuple[str, torch.dtype, tuple[torch.Size, ...]], Row] = {}
        self._views = 0

    def like(self, t: Tensor, use: str, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the shape of `t`; another one for another `use`."""
        shapes = (t.shape,)
        return (self._rows.get((use, dtype, shapes)) or self._make(use, dtype, shapes)).whole

    def row(self, tensors: Sequence[Tensor], use: str, dtype: torch.dtype) -> Row:
        """Contiguous tensors of the shapes of `tensors`, in the memory that `like` gives for this use."""
        shapes = tuple([t.shape for t in tensors])
        return self._rows.get((use, dtype, shapes)) or self._make(use, dtype, shapes)

    def _make(self, use: str, dtype: torch.dtype, shapes: tuple[torch.Size, ...]) -> Row:
        sizes = list(map(torch.Size.numel, shapes))
        flat = self._flat.get((use, dtype.itemsize))
        if flat is None or flat.numel() < sum(sizes):
            flat = lasting((max(_ELEMENTS, sum(sizes)),), dtype, "cpu")
            self._forget_rows()
            if type(flat) is Tensor:  # not what a mode, such as FakeTensorMode, makes of it
                self._flat[use, dtype.itemsize] = flat
        with outside_inference_mode():
            whole = flat[: sum(sizes)].view(dtype)
            each = [t.view(shape) for t, shape in zip(whole.split(sizes), shapes)]
        row = Row(whole if len(each) > 1 else each[0], each)
        if type(flat) is Tensor:
            if self._views + len(each) > _VIEWS:
                self._forget_rows()
            self._rows[use, dtype, shapes] = row
            self._views += len(each)
        return row

    def retire(self) -> None:
        """Leaves the memory to those that have it: from now on others get other memory."""
        self._flat.clear()
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._rows.clear()
        self._views = 0


scratch = _Scratch()
