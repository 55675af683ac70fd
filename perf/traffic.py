"""What a step asks of the machine: operations and the bytes they read and write, counted as torch dispatches them.

Every operation reads its tensor arguments and writes its results; caches are not taken into account, which is right for
tensors larger than they are. Without a GPU, this is what the launches and the traffic of an eager loop would be there.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perf.providers import Provider, Step
from perf.workloads import Workload

_VIEWS = (
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
    "unbind",
    "_unsafe_view",
    "reshape",
    "permute",
    "split",
)
_NO_READ = ("copy_", "zero_", "fill_")
"""In-place operations that do not read what they overwrite."""


@dataclass
class Counted:
    """One step.

    Attributes:
        operations: that touch memory; in a for-loop each is a kernel launch.
        read: bytes.
        written: bytes.
        temporary: most bytes alive at once in tensors that the step made for itself.
    """

    operations: int = 0
    read: int = 0
    written: int = 0
    temporary: int = 0


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
        written = 0
        for argument, value in zip(func._schema.arguments, given):
            tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            # torch's fused kernels may write the gradients, but do so only with a scale to remove from them.
            if mutated and not (name.startswith("_fused_") and argument.name == "grads"):
                written += sum(map(_extent, tensors))
            if not (mutated and ((argument.kwarg_only and argument.name == "out") or name in _NO_READ)):
                sources |= {t.data_ptr(): _extent(t) for t in tensors}
        read = sum(sources.values())
        mutates = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if not mutates:
            written += 0 if "empty" in name else sum(_extent(t) for t in tree_leaves(result) if isinstance(t, Tensor))
        if read or written:
            self.counted.operations += 1
            self.counted.read += read
            self.counted.written += written
        if not mutates:
            self._watch(result)
        return result

    def _watch(self, result: Any) -> None:
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._alive[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage.data_ptr(), None)
        self.counted.temporary = max(self.counted.temporary, sum(self._alive.values()))


def _extent(t: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded dimension has one."""
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        elements *= size if stride else 1
    return elements * t.element_size()


def count(provider: Provider, workload: Workload, device: torch.device | None = None) -> Counted:
    """Counts the second step of a provider (the first one makes its state).

    Example:
        >>> from perf import providers, workloads
        >>> loop = next(p for p in providers.of("adamw") if p.name == "transformers 4.34 loop")
        >>> count(loop, workloads.get("smoke")).operations // workloads.get("smoke").tensors
        8
    """
    device = device or torch.device("cpu")
    params = [workload.empty_like(shape, device).normal_(std=0.02).requires_grad_() for shape in workload.shapes]
    for p in params:
        p.grad = torch.empty_like(p).normal_(std=0.01)
    step, _ = provider.start(params)
    step()
    return watch(step)


def watch(step: Step) -> Counted:
    """Counts one call of a step."""
    with torch.no_grad(), _Counter() as counter:
        step()
    return counter.counted
