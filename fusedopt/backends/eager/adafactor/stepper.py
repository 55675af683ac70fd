"""Chooses which parameters are updated in tiles, which in stacks, and which together with other processes."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fusedopt.backends.eager.adafactor.tiles import TILE, tiled_update
from fusedopt.backends.eager.adafactor.update import SMALL, Stack, run_together, update
from fusedopt.backends.eager.stepper import Bucket, EagerStepper
from fusedopt.backends.work import Part
from fusedopt.interface import ShardInfo
from fusedopt.precision import WEIGHT_STATES


class EagerAdafactor(EagerStepper):
    """The stepper of Adafactor for one device: large parameters of a CPU in tiles, everything else by the rules."""

    def parts_of_all(self, buckets: Sequence[Bucket]) -> list[Part]:
        parts: list[Part] = []
        shards: list[tuple[Bucket, int, ShardInfo]] = []
        for bucket in buckets:
            alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
            shard_infos = bucket.shard_infos or [None] * len(bucket.params)
            for i, (p, g, state, shard_info) in enumerate(zip(bucket.params, bucket.grads, bucket.states, shard_infos)):
                if shard_info is not None:
                    shards.append((bucket, i, shard_info))
                elif self._on_cpu and p.numel() > SMALL and _tiles_serve(p, g, state):
                    parts.append(partial(tiled_update, bucket, i))
                elif p.numel() > 0:
                    alike.setdefault((p.shape, p.dtype), []).append(i)
            for which in alike.values():
                parts += [partial(_update_stack, bucket, some) for some in _in_cache(bucket.params, which)]
        return [*parts, partial(_update_shards, shards, [])] if shards else parts


def _update_stack(bucket: Bucket, which: list[int]) -> None:
    run_together([update(bucket, Stack(bucket, which))])


def _update_shards(shards: Sequence[tuple[Bucket, int, ShardInfo]], tried: list[Stack]) -> None:
    """Updates shards together with other processes, which a second try cannot: they have gone on by then."""
    if any(stack.written for stack in tried):
        raise RuntimeError(
            "the last step ended in an error after it had updated some shards: load a checkpoint in all processes"
        )
    tried[:] = [Stack(bucket, [i], shard_info) for bucket, i, shard_info in shards]
    run_together([update(bucket, stack) for (bucket, _, _), stack in zip(shards, tried)])


def _tiles_serve(p: Tensor, g: Tensor, state: dict[str, Tensor]) -> bool:
    """True if matrices follow each other in memory, and numpy knows the dtypes of all averages."""
    elementwise = [t for t in (p, g, *state.values()) if t.shape == p.shape]
    if p.dim() > 2 and not all(map(Tensor.is_contiguous, elementwise)):
        return False
    return all(t.dtype.itemsize > 2 for name, t in state.items() if name not in WEIGHT_STATES)


def _in_cache(params: Sequence[Tensor], which: Iterable[int]) -> Iterator[list[int]]:
    """Lists of parameters whose temporaries stay in the cache together."""
    some: list[int] = []
    elements = 0
    for i in which:
        elements += params[i].numel()
        if some and elements > TILE:
            yield some
            some, elements = [], params[i].numel()
        some.append(i)
    yield some
