"""Sharded parameters (DTensor, as FSDP2 makes them): updates run on local shards, sums are added up over the mesh.

`local` turns the DTensors of a step into their shards, `shard` a single one; `with_shard` and `sharded_like` go back.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedopt.interface import ParamSet, ReduceDims, ShardInfo, ShardPosition


def is_sharded(t: Any) -> bool:
    """True if `t` is a DTensor; does not import the module that defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def any_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """True if one of them is a DTensor; checks each type once, since thousands of tensors are common."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def check(groups: Sequence[dict[str, Any]], grads: Sequence[Sequence[Tensor | None]]) -> bool:
    """Returns True if there are sharded parameters.

    Raises:
        RuntimeError: a gradient is not sharded as its parameter is, or a parameter is a sum to be made.
    """
    if not any(map(any_sharded, [*(group["params"] for group in groups), *grads])):
        return False
    for p, g in ((p, g) for group, row in zip(groups, grads) for p, g in zip(group["params"], row)):
        of_p, mesh_p = getattr(p, "placements", None), getattr(p, "device_mesh", None)
        if any(placement.is_partial() for placement in of_p or ()):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} has placements {of_p}: what is a sum "
                "over processes cannot be updated in each of them; redistribute it first"
            )
        if g is None:
            continue
        of_g, mesh_g = getattr(g, "placements", None), getattr(g, "device_mesh", None)
        if of_p != of_g or mesh_p != mesh_g:
            raise RuntimeError(
                f"a gradient with placements {of_g} on {mesh_g} does not fit its parameter with placements {of_p} on "
                f"{mesh_p}: redistribute the gradient first"
            )
    return True


def local(param_set: ParamSet) -> ParamSet:
    """Returns the same set with the local shard in the place of each DTensor."""
    precision = param_set.precision
    with_position = precision.stochastic_rounding or precision.state_dtype is torch.bfloat16
    shard_infos = [shard_info(p, with_position) for p in param_set.params]
    return param_set._replace(
        params=[shard(p) for p in param_set.params],
        grads=[None if g is None else shard(g) for g in param_set.grads],
        states=[{name: shard(t) for name, t in state.items()} for state in param_set.states],
        shard_infos=shard_infos if any(shard_infos) else None,
    )


def with_shard(t: Any, mine: Tensor) -> Tensor:
    """Returns a tensor sharded as `t` is, of which this process has `mine`; `mine` itself if `t` is not a DTensor."""
    return _of_shard(t, mine, t.shape, t.stride(), t.placements) if is_sharded(t) else mine


def _of_shard(like: Any, mine: Tensor, shape: Any, stride: Any, placements: Any) -> Tensor:
    made: Tensor = type(like).from_local(
        mine, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def shard(t: Any) -> Tensor:
    """The local shard of `t`; `t` itself if it is not a DTensor."""
    mine: Tensor = t.to_local() if is_sharded(t) else t
    return mine


def version(t: Any) -> int:
    """Returns how often `t` was written to, also by way of its local shard; 0 where nothing counts that."""
    counting = [t, shard(t)] if is_sharded(t) else [t]  # each counts what was done to it
    return sum(0 if one.is_inference() else one._version for one in counting)


def spread(t: Any) -> ReduceDims:
    """The mesh dimensions over which local sums of `t` must be reduced to be those of the whole tensor."""
    if not is_sharded(t):
        return ()
    mesh, sizes = t.device_mesh, t.device_mesh.shape
    # Not is_shard(): the shards of shards that FSDP2 makes of tensor-parallel ones are of a class of their own.
    return tuple((mesh, i) for i, place in enumerate(t.placements) if sizes[i] > 1 and not place.is_replicate())


def is_shared(t: Any) -> bool:
    """True if other processes hold the same elements as this one, as far as `t` knows: of a whole tensor they do."""
    return not is_sharded(t) or len(spread(t)) < sum(n > 1 for n in t.device_mesh.shape)


def shard_info(p: Any, with_position: bool = False) -> ShardInfo | None:
    """Returns how a parameter is split over processes; None for one that is not, or has no elements.

    Args:
        p: a parameter, whole or sharded.
        with_position: whether the position of its elements matters, as to random rounding.
    """
    over = spread(p)
    if not over or p.numel() == 0:
        return None
    split = {i: p.placements[i].dim - p.dim() for _, i in over} if p.dim() >= 2 else {}
    rows, columns = (tuple(pair for pair in over if split.get(pair[1]) == line) for line in (-2, -1))
    return ShardInfo(p.shape, rows, columns, over, _position(p) if with_position else None)


def _position(p: Any) -> ShardPosition:
    """Returns the position of the shard of `p`, for rounding that depends on it."""
    return _position_of(p.shape, tuple(p.placements), p.device_mesh.shape, tuple(p.device_mesh.get_coordinate()))


@lru_cache(maxsize=1 << 12)  # asked for each parameter at every step, and torch takes longer than a small update
def _position_of(
    shape: torch.Size, placements: tuple[Any, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...]
) -> ShardPosition:
    from torch.distributed.tensor import _utils

    mine, starts = _utils._compute_local_shape_and_global_offset(shape, mesh_shape, list(coordinate), placements)
    cut = [d for d in range(len(shape)) if mine[d] != shape[d]] or [0]
    last = cut[-1]
    inner, lines = math.prod(shape[last + 1 :]), math.prod(shape[:last])
    if any(math.prod(shape[:d]) > 1 for d in cut[:-1]):
        raise RuntimeError(
            f"the elements of a parameter of shape {tuple(shape)} with placements {placements} cannot be numbered, "
            "which random rounding needs: shard it along one dimension, or along its first and one more; or use "
            "master_weights=True with float32 moments"
        )
    length, whole = mine[last] * inner, shape[last] * inner
    above = sum(starts[d] * (lines // math.prod(shape[: d + 1])) for d in cut[:-1])
    return ShardPosition(max(length, 1), whole - length, starts[last] * inner + above * whole)


def collectives(t: Tensor, over: ReduceDims) -> ReduceDims:
    """Over what `t` is added up by one collective operation each, to be added up over all of them."""
    return over if t.numel() else ()


def all_reduce_in_place(t: Tensor, over: ReduceDims, op: Any = None) -> None:
    """Puts the sum over all processes that have a share, or what `op` says, in the place of the local sums."""
    for mesh, dimension in collectives(t, over):
        torch.distributed.all_reduce(t, op or torch.distributed.ReduceOp.SUM, group=mesh.get_group(dimension))


def sharded_like(t: Any, like: Any) -> Tensor:
    """`t` sharded as `like`, whether `t` is sharded otherwise or whole, the same in all processes.

    All processes must call it. `t` itself if `like` is not a DTensor, or sharded as `t` is.
    """
    made: Tensor
    if not is_sharded(like) or (is_sharded(t) and _layout(t) == _layout(like)):
        made = t
        return made
    from torch.distributed.tensor import DTensor, Replicate

    whole = movable(t).full_tensor().to(t.dtype) if is_sharded(t) else t
    mesh = like.device_mesh
    everywhere = DTensor.from_local(whole.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    made = everywhere.redistribute(mesh, like.placements)
    return made


def movable(t: Any) -> Any:
    """A DTensor in a dtype that goes from process to process: neither NCCL nor gloo knows int16."""
    return t.to(torch.int32) if t.dtype is torch.int16 else t


def _layout(t: Any) -> tuple[Any, Any]:
    return t.device_mesh, tuple(t.placements)


def all_reduce_found_inf(found_inf: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Not 0 in all processes if it is not 0 in one that has a share of these tensors.

    torch adds up what a GradScaler found over the mesh of a single gradient only.
    """
    over = tuple(dict.fromkeys(pair for t in tensors for pair in spread(t)))
    found = found_inf.detach().to(torch.float32, copy=True)
    all_reduce_in_place(found, over)
    return found


def zeros_without_dim(p: Any, dimension: int, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape of `p` without one of its dimensions, sharded as what remains of `p` is.

    Args:
        p: a parameter, whole or sharded.
        dimension: of `p`, not negative.
        dtype: of the result.
    """
    mine = shard(p)
    zeros = torch.zeros([n for d, n in enumerate(mine.shape) if d != dimension], dtype=dtype, device=mine.device)
    if not is_sharded(p):
        return zeros
    whole = torch.empty([n for d, n in enumerate(p.shape) if d != dimension], dtype=dtype, device="meta")
    placements = [_without(placement, dimension) for placement in p.placements]
    return _of_shard(p, zeros, whole.shape, whole.stride(), placements)


def _without(placement: Any, dimension: int) -> Any:
    """The placement of a tensor that lost a dimension, over which it has been summed up."""
    from torch.distributed.tensor import Replicate

    if placement.is_replicate() or placement.dim == dimension:
        return Replicate()
    dim = placement.dim - (placement.dim > dimension)
    split_factor = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **split_factor)


def all_reduce_sums(parts: Sequence[tuple[Tensor, ReduceDims]]) -> list[Tensor]:
    """Sums over all processes that have a share, one collective operation for all that are alike and spread alike.

    Args:
        parts: local sums of any shape, and over what they are spread. All processes must give the same ones.

    Returns:
        The sums, the same bits in every process; parts that are not spread are returned as they are.
    """
    alike: dict[tuple[ReduceDims, torch.dtype, torch.device], list[int]] = {}
    for i, (t, over) in enumerate(parts):
        if over:
            alike.setdefault((over, t.dtype, t.device), []).append(i)
    sums = [t for t, _ in parts]
    for (over, _, _), which in alike.items():
        flat = torch.cat([sums[i].reshape(-1) for i in which])
        all_reduce_in_place(flat, over)
        for i, t in zip(which, flat.split([sums[i].numel() for i in which])):
            sums[i] = t.view(sums[i].shape)
    return sums
