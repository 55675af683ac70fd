"""What the first process of a mesh has of a model: it has the largest shards.

Parameters are laid out as torch does it: tensor parallelism splits a matrix along its inputs or outputs, and FSDP
(`fully_shard`) the rows of what remains. torch's own code says how long a shard is, and no process group is needed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusedopt.interface import ShardInfo
from fusedopt.plan.families import Weight
from fusedopt.sharding import shard_info


class Shard(NamedTuple):
    """What a process has of a parameter.

    Attributes:
        shape: of its share.
        info: how the parameter is split; None for a whole one.
    """

    shape: tuple[int, ...]
    info: ShardInfo | None


def shards(weights: Sequence[Weight], fsdp: int, tp: int) -> list[Shard]:
    """Returns the first process's share of each parameter on a mesh of `fsdp` by `tp` processes."""
    if fsdp * tp == 1:
        return [Shard(weight.shape, None) for weight in weights]
    mesh = _mesh(fsdp, tp)
    alike: dict[tuple[tuple[int, ...], int | None], Shard] = {}
    for weight in weights:
        if (weight.shape, weight.split) not in alike:
            alike[weight.shape, weight.split] = _shard(weight, mesh)
    return [alike[weight.shape, weight.split] for weight in weights]


def _mesh(fsdp: int, tp: int) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.arange(fsdp * tp, dtype=torch.int64, device="cpu").view(fsdp, tp)
    return DeviceMesh("meta", ranks, mesh_dim_names=("fsdp", "tp"), _init_backend=False, _rank=0)


def _shard(weight: Weight, mesh: Any) -> Shard:
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    if not weight.shape:  # FSDP refuses a parameter of no dimension; the others do not split it.
        return Shard((), None)
    # Rows of shards of rows: those of one process are apart in the whole parameter.
    rows = _StridedShard(0, split_factor=mesh.size(1)) if weight.split == 0 else Split(0)
    placements = [rows, Replicate() if weight.split is None else Split(weight.split)]
    shape, _ = compute_local_shape_and_global_offset(torch.Size(weight.shape), mesh, placements)
    whole = torch.empty(weight.shape, dtype=torch.float32, device="meta")
    mine = torch.empty(shape, dtype=torch.float32, device="meta")
    p = DTensor.from_local(mine, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    return Shard(tuple(shape), shard_info(p))
