"""What a step moves, counted without a GPU: eager steps as torch dispatches them, kernels in Triton's interpreter.

An eager operation reads its tensor arguments and writes its results; a kernel moves what each of its loads and stores
asks for. Caches are not taken into account, which is right for tensors larger than they are.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perf.providers import Provider, Step, of
from perf.workloads import Workload

_VIEWS = {
    "view",
    "detach",
    "unsqueeze",
    "squeeze",
    "expand",
    "t",
    "transpose",
    "alias",
    "as_strided",
    "select",
    "slice",
}
_VIEWS |= {"slice", "unbind", "_unsafe_view", "reshape", "permute", "split"}
_NO_READ = ("copy_", "zero_", "fill_")
"""In-place operations that do not read what they overwrite."""

MATRICES = Workload("counted", "matrices to count on", ((256, 256),) * 4)


@dataclass
class Counted:
    """One eager step: operations that touch memory, and bytes."""

    operations: int = 0  # in a for-loop each is a kernel launch
    read: int = 0
    written: int = 0
    temporary: int = 0  # most alive at once in tensors that the step made for itself


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if name in _VIEWS:
            return result
        given = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
        sources: dict[int, int] = {}
        written, mutates = 0, False
        for argument, value in zip(func._schema.arguments, given):
            tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            mutates |= mutated
            # torch's fused kernels may write the gradients, but do so only with a scale to remove from them.
            if mutated and not (name.startswith("_fused_") and argument.name == "grads"):
                written += sum(map(_extent, tensors))
            if not (mutated and ((argument.kwarg_only and argument.name == "out") or name in _NO_READ)):
                sources |= {t.data_ptr(): _extent(t) for t in tensors}
        if not mutates:
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            written += 0 if "empty" in name else sum(map(_extent, made))
            self._watch(made)
        read = sum(sources.values())
        self.counted.operations += bool(read or written)
        self.counted.read += read
        self.counted.written += written
        return result

    def _watch(self, made: list[Tensor]) -> None:
        for t in made:
            storage = t.untyped_storage()
            self._alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, storage.data_ptr(), None)
        self.counted.temporary = max(self.counted.temporary, sum(self._alive.values()))


def _extent(t: Tensor) -> int:
    """Returns the bytes of the distinct elements of a tensor: an expanded dimension has one."""
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        elements *= size if stride else 1
    return elements * t.element_size()


def watch(step: Step) -> Counted:
    """Counts one call of a step."""
    with torch.no_grad(), _Counter() as counter:
        step()
    return counter.counted


def count(provider: Provider, workload: Workload) -> tuple[Counted, int]:
    """Returns the counts of a provider's second step on the CPU (the first one makes its state) and its state's bytes.

    Example:
        >>> loop = next(p for p in of("adamw") if p.name == "transformers 4.34 loop")
        >>> counted, _ = count(loop, MATRICES)
        >>> counted.operations / MATRICES.tensors, counted.read / MATRICES.params, counted.written / MATRICES.params
        (8.0, 48.0, 32.0)
    """
    params = [workload.empty(s, torch.device("cpu")).normal_(std=0.02).requires_grad_() for s in workload.shapes]
    for p in params:
        p.grad = torch.empty_like(p).normal_(std=0.01)
    step, optimizer = provider.start(params)
    step()
    return watch(step), state_bytes(optimizer)


def eager(rule: str, names: Sequence[str], workload: Workload = MATRICES) -> dict[str, tuple[Counted, int]]:
    """Counts those of the named providers that run here."""
    here = {p.name: p for p in of(rule, names) if p.missing(torch.device("cpu")) is None}
    return {name: count(here[name], workload) for name in names if name in here}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


class MemoryTrace:
    """Kernels in the order of their launches, and bytes by whose memory it is ("else": launch tables, workspace)."""

    def __init__(self, owners: Mapping[str, Sequence[Tensor]]) -> None:
        self.kernels: list[str] = []
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        rows = sorted((t.data_ptr(), t.nbytes, kind) for kind, tensors in owners.items() for t in tensors if t.nbytes)
        self._starts = np.array([start for start, _, _ in rows], np.uint64)
        self._ends = np.array([start + size for start, size, _ in rows], np.uint64)
        self._kinds = [kind for _, _, kind in rows]

    def access(self, pointers: Any, mask: Any, counter: Counter[str]) -> None:
        """Counts one load or store of a program, given the interpreter's handles."""
        size = max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[wanted.astype(bool)].astype(np.uint64)  # an integer mask would choose by index
        place = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (addresses < self._ends[place])
        for index, number in zip(*np.unique(place[inside], return_counts=True)):
            counter[self._kinds[index]] += size * int(number)
        counter["else"] += size * int((~inside).sum())

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, counts every launch, load and store of Triton's interpreter."""
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

        def traced_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.access(ptrs, mask, self.read)
            return load(builder, ptrs, mask, *rest)

        def traced_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.access(ptrs, mask, self.written)
            return store(builder, ptrs, value, mask, *rest)

        def traced_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels.append(executor.fn.__name__)
            return call(executor, *args, **kwargs)

        builder.create_masked_load, builder.create_masked_store = traced_load, traced_store
        executor.__call__ = traced_call
        try:
            yield
        finally:
            builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call


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
    traced = MemoryTrace({"parameter": [p.detach() for p in params], "gradient": grads, "state": states})
    with traced.record():
        optimizer.step()
    return traced
