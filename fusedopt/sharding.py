"""Sharded parameters (DTensor, as FSDP2 makes them): an element-wise update runs on the local shard."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fusedopt.batch import Batch


def is_sharded(t: Any) -> bool:
    """Whether `t` is a DTensor; without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def any_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether there is a DTensor among them; at no cost in a process that uses none."""
    return "torch.distributed.tensor" in sys.modules and any(map(is_sharded, tensors))


def check(params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Raises RuntimeError where a gradient is not sharded as its parameter is."""
    for p, g in zip(params, grads):
        if g is None:
            continue
        of_p, of_g = (getattr(t, "placements", None) for t in (p, g))
        if of_p != of_g:
            raise RuntimeError(
                f"a gradient with placements {of_g} does not fit its parameter with placements {of_p}: "
                "redistribute the gradient first"
            )


def local(batch: Batch) -> Batch:
    """The same batch with the local shards of what is sharded."""
    return Batch(
        batch.hyper,
        [_local(p) for p in batch.params],
        [None if g is None else _local(g) for g in batch.grads],
        [{name: _local(t) for name, t in state.items()} for state in batch.states],
    )


def _local(t: Any) -> Tensor:
    shard: Tensor = t.to_local() if is_sharded(t) else t
    return shard
