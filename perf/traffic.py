"""Bytes that a step moves, counted without a GPU: eager steps as torch dispatches them, kernels in the interpreter.

An eager operation reads its tensor arguments and writes its results; a kernel moves what each of its loads and stores
asks for. Caches are not taken into account, which is right for tensors larger than they are.
"""

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from math import prod
from multiprocessing import get_context
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perf.providers import Step
from perf.results import Record

_NO_READ = ("copy_", "zero_", "fill_")
"""In-place operations that do not read what they overwrite."""


def watch(step: Step) -> Record:
    """Counts one call of a step: operations that touch memory, bytes read and written, and the most bytes alive at once
    in tensors that the step made for itself. In a for-loop each operation is a kernel launch.
    """
    counter = _Counter()
    with torch.no_grad(), counter:
        step()
    return counter.counts


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(("operations", "read_bytes", "written_bytes", "temporary_bytes"), 0)
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        made, mutable = _tensors(result), func._schema.is_mutable
        if made and not mutable and {_storage(t) for t in made} <= {_storage(t) for t in _tensors(args)}:
            return result  # a view
        given = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
        sources: dict[int, int] = {}
        written = 0
        for argument, value in zip(func._schema.arguments, given):
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            # torch's fused kernels may write the gradients, but do so only with a scale to remove from them.
            if mutated and not (name.startswith("_fused_") and argument.name == "grads"):
                written += sum(map(_extent, _tensors(value)))
            if not (mutated and ((argument.kwarg_only and argument.name == "out") or name in _NO_READ)):
                sources |= {t.data_ptr(): _extent(t) for t in _tensors(value)}
        if not mutable:
            written += 0 if "empty" in name else sum(map(_extent, made))
            self._watch(made)
        read = sum(sources.values())
        self.counts["operations"] += bool(read or written)
        self.counts["read_bytes"] += read
        self.counts["written_bytes"] += written
        return result

    def _watch(self, made: list[Tensor]) -> None:
        for t in made:
            self._alive[_storage(t)] = t.untyped_storage().nbytes()
            weakref.finalize(t.untyped_storage(), self._alive.pop, _storage(t), None)
        self.counts["temporary_bytes"] = max(self.counts["temporary_bytes"], sum(self._alive.values()))


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _extent(t: Tensor) -> int:
    """Returns the bytes of the distinct elements of a tensor: an expanded dimension has one."""
    return prod(size for size, stride in zip(t.shape, t.stride()) if stride) * t.element_size()


OWNERS = ("parameter", "gradient", "state")


class MemoryTrace:
    """Kernels in the order of their launches, and bytes by kernel, access ("read" or "written") and owner.

    The owner of what is neither parameter nor gradient nor state is "else": launch tables, workspace.
    """

    def __init__(self, owners: Mapping[str, Sequence[Tensor]]) -> None:
        self.kernels: list[str] = []
        self.bytes: Counter[tuple[str, str, str]] = Counter()
        self._elements = sum(t.numel() for t in owners["parameter"])
        rows = sorted((t.data_ptr(), t.nbytes, owner) for owner, tensors in owners.items() for t in tensors if t.nbytes)
        self._starts = np.array([start for start, _, _ in rows], np.uint64)
        self._ends = np.array([start + size for start, size, _ in rows], np.uint64)
        self._owners = [owner for _, _, owner in rows]

    def total(self, access: str, owner: str) -> int:
        """Returns the bytes that all kernels together read or write of an owner's."""
        return sum(size for (_, *what), size in self.bytes.items() if what == [access, owner])

    def per_parameter(self) -> dict[str, list[float]]:
        """Returns the bytes read and written per parameter, by owner."""
        return {o: [self.total(a, o) / self._elements for a in ("read", "written")] for o in (*OWNERS, "else")}

    @property
    def moved(self) -> float:
        """Bytes per parameter that parameters, gradients and states account for."""
        return sum(sum(self.per_parameter()[owner]) for owner in OWNERS)

    def count(self, access: str, pointers: Any, mask: Any) -> None:
        """Counts one load or store of a program, given the interpreter's handles."""
        size = max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[wanted.astype(bool)].astype(np.uint64)  # an integer mask would choose by index
        place = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (addresses < self._ends[place])
        for index, number in zip(*np.unique(np.where(inside, place, -1), return_counts=True)):
            owner = self._owners[index] if index >= 0 else "else"
            self.bytes[self.kernels[-1], access, owner] += size * int(number)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, counts every launch, load and store of Triton's interpreter."""
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        def counted(access: str, name: str, mask: int) -> Any:
            move = getattr(InterpreterBuilder, name)

            def counting(builder: Any, pointers: Any, *rest: Any) -> Any:
                self.count(access, pointers, rest[mask])
                return move(builder, pointers, *rest)

            return mock.patch.object(InterpreterBuilder, name, counting)

        call = GridExecutor.__call__

        def noted_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels.append(executor.fn.__name__)
            return call(executor, *args, **kwargs)

        with (
            counted("read", "create_masked_load", mask=0),
            counted("written", "create_masked_store", mask=1),  # behind the value
            mock.patch.object(GridExecutor, "__call__", noted_call),
        ):
            yield


def trace(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> MemoryTrace:
    """Traces the second step of one of our optimizers on the Triton backend (the first one makes its state).

    Needs TRITON_INTERPRET=1, set before triton is first imported; a few ten thousand elements are enough for it.
    """
    params = [torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, dtype=torch.float32).to(dtype)
    optimizer = make(params)
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    grads = [p.grad for p in params if p.grad is not None]
    traced = MemoryTrace(dict(zip(OWNERS, ([p.detach() for p in params], grads, states))))
    with traced.record():
        optimizer.step()
    return traced


@contextmanager
def interpreted(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Calls a function with each item in a process of its own, which interprets kernels; yields what it returns."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            returned = process.map(function, items)  # which starts the process
        yield returned
