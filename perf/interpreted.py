"""What the kernels of one step read and write, launch by launch, counted in Triton's interpreter on CPU tensors.

Every load and store of a step goes through here, with its addresses; each byte is booked to the tensor that it belongs
to. What is counted holds on a GPU too, where memory is read as often as a kernel asks for it and caches help only with
tensors that fit them. Needs TRITON_INTERPRET=1, set before triton is first imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("parameter", "gradient", "state", "else")
"""Of memory: "else" is launch tables and workspace."""


@dataclass
class Launch:
    """One launch.

    Attributes:
        kernel: its name.
        programs: how many.
        read: bytes by kind of memory.
        written: bytes by kind of memory.
    """

    kernel: str
    programs: int
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)


class Books:
    """Launches in their order, and which memory is whose."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._starts = np.empty(0, np.uint64)
        self._ends = np.empty(0, np.uint64)
        self._kinds: list[str] = []

    def own(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Books bytes in these tensors to `kind`; of float32 or wider numbers only, step counts are no news."""
        known = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), kind) for t in tensors if t.numel()]
        rows = sorted([*zip(self._starts.tolist(), self._ends.tolist(), self._kinds), *known])
        self._starts = np.array([row[0] for row in rows], np.uint64)
        self._ends = np.array([row[1] for row in rows], np.uint64)
        self._kinds = [row[2] for row in rows]

    def book(self, pointers: np.ndarray, mask: np.ndarray, size: int, write: bool) -> None:
        """One load or store of a program."""
        if not self.launches:
            return
        launch = self.launches[-1]
        column = launch.written if write else launch.read
        addresses = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        # A mask may be made of integers, which would choose by index.
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].astype(np.uint64)
        if not len(addresses) or not len(self._starts):
            column["else"] += size * len(addresses)
            return
        place = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (addresses < self._ends[place])
        for index, count in zip(*np.unique(place[inside], return_counts=True)):
            column[self._kinds[index]] += size * int(count)
        column["else"] += size * int((~inside).sum())

    def total(self, kind: str | None = None) -> tuple[int, int]:
        """Bytes read and written by all launches, of one kind of memory or of all."""
        read = sum(n for launch in self.launches for k, n in launch.read.items() if kind in (None, k))
        written = sum(n for launch in self.launches for k, n in launch.written.items() if kind in (None, k))
        return read, written


@contextmanager
def watched(books: Books) -> Iterator[None]:
    """Books every launch, load and store of the interpreter."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        books.book(ptrs.data, mask.data, _bytes(ptrs), write=False)
        return load(self, ptrs, mask, *rest)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        books.book(ptrs.data, mask.data, _bytes(ptrs), write=True)
        return store(self, ptrs, value, mask, *rest)

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        grid = self.grid(kwargs) if callable(self.grid) else self.grid
        books.launches.append(Launch(self.fn.__name__, int(np.prod(grid))))
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    executor.__call__ = watched_call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call


def _bytes(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


def count(make: Any, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Books:
    """Counts the second step of an optimizer (the first one makes its state).

    Args:
        make: from a list of parameters to one of our optimizers on the Triton backend.
        shapes: of the parameters; a few ten thousand elements in all, the interpreter is slow.
        dtype: of parameters and gradients.

    Returns:
        The books of that step.
    """
    params = [torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes]

    def hand_out() -> None:
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float32).to(dtype)

    hand_out()
    optimizer = make(params)
    optimizer.step()
    hand_out()
    books = Books()
    books.own("parameter", [p.detach() for p in params])
    books.own("gradient", [p.grad for p in params if p.grad is not None])
    books.own("state", [t for s in optimizer.state.values() for n, t in s.items() if n != "step"])
    with watched(books):
        optimizer.step()
    return books
