"""Memory that runs out at a chosen allocation."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MAKE_NOTHING = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}


class Allocations(TorchDispatchMode):
    """Counts what takes memory for tensors, and fails at one of them.

    Args:
        failing: the number of the allocation that fails, from 0; None: none does.

    Attributes:
        number: how many there were.
    """

    def __init__(self, failing: int | None = None) -> None:
        super().__init__()
        self.number, self._failing = 0, failing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _takes_memory(func, args):
            self.number += 1
            if self.number - 1 == self._failing:
                raise torch.OutOfMemoryError(f"no memory for {func}")
        return func(*args, **(kwargs or {}))


def _takes_memory(func: Any, args: Any) -> bool:
    """True for an operation that returns a tensor in memory of its own."""
    if func.namespace == "c10d":  # between processes, in the memory that it is given
        return False
    if func in _MAKE_NOTHING and any(isinstance(a, (list, tuple)) and 0 in a for a in args):
        return False
    returned = func._schema.returns
    return any("Tensor" in str(value.type) and value.alias_info is None for value in returned)
