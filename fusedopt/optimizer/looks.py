"""What tensors look like, all of them compared in one call."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset({Tensor, torch.nn.Parameter})

_LONGEST_PAUSE = 6
"""Its binary logarithm."""

_PAYS = 4
"""How many steps must be recognised until they have saved more time than it takes to learn."""


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """True if what these look like can be remembered, for all that their types say."""
    return _PLAIN.issuperset(map(type, tensors))


def _look_of(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Returns what is true of tensors that look the same; None where that cannot be known.

    torch compiles functions for tensors that look like this, and so has to be told by one call, in C++, whether others
    do. Nothing promises that there will be such a call, or that it takes these tensors.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards: Any = TensorGuards
        same: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return same if same(*tensors) else None  # It takes no tensor twice.
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return None


class Looks:
    """Remembers what some tensors look like, and tells if others look the same; keeps none of them alive.

    Tensors look the same if they are as many, all different ones, and each has the Python type, dtype, device, sizes,
    strides, `requires_grad` and dispatch keys of the other, as they are in the present mode of torch. The keys say
    what else decides how operations treat a tensor: a layout, a sign that is in no element, "meta", "inference mode".
    Only `Tensor` and `Parameter` themselves are remembered, none of their subclasses. So where this is true, whatever
    depends on none but these properties is true of the others, too. They may lie elsewhere in memory.

    It is true if there is something to compare with: where tensors change too often for learning to pay, or cannot be
    remembered, it soon gives up for a while, for 1, 3, 7... and at most 63 steps.
    """

    def __init__(self) -> None:
        self._same: Callable[..., bool] | None = None
        self._hits = self._misses = self._pause = 0

    def __bool__(self) -> bool:
        return self._same is not None

    def due(self) -> bool:
        """True if it is worth while to learn at this step; to be asked once per step."""
        if self._pause:
            self._pause -= 1
            return False
        return True

    def learn(self, tensors: Sequence[Tensor]) -> bool:
        """Remembers what these look like; returns False where that cannot be, which is a miss."""
        self._same = _look_of(tensors) if are_plain(tensors) else None
        if self._same is None:
            self.miss()
        return self._same is not None

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """True if these, which must be as many, look like those that were learnt."""
        same = self._same is not None and self._same(*tensors)
        self._hits += same
        return same

    def miss(self) -> None:
        """Forgets everything: the step has something else."""
        self._same = None
        self._misses = 1 if self._hits >= _PAYS else min(self._misses + 1, _LONGEST_PAUSE + 1)
        self._hits, self._pause = 0, (1 << self._misses - 1) - 1
