"""A process group of one process: NCCL where there is a GPU, gloo elsewhere. What a step sends through it arrives."""

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.loops import Net, train
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusedopt import Adafactor, AdamW, Lion, sharding

MAKE = {
    "AdamW": lambda params: AdamW(params, lr=0.1, max_grad_norm=0.5, skip_nonfinite=True, check_ranks=True),
    "Adafactor": lambda params: Adafactor(params, max_grad_norm=0.5, check_ranks=True),
    "Lion": lambda params: Lion(params, lr=0.1, track_statistics=True),
}


@pytest.fixture
def mesh(device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("name", MAKE)
def test_a_sharded_model_of_one_process_trains_like_a_whole_one(name, mesh, device):
    plain, model = Net().to(device), Net().to(device)
    for child in (*model.children(), model):
        fully_shard(child, mesh=mesh)
    for each in (plain, model):
        train(each, MAKE[name](each.parameters()), 3)
    assert_near([p.full_tensor() for p in model.parameters()], list(plain.parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_sums_over_one_process_are_its_own(dtype, mesh, device):
    """Meshes of one process are spared all sums by a step; here they are asked for."""
    over = ((mesh, 0),)
    parts = [torch.arange(n, dtype=dtype, device=device) for n in (3, 1, 0, 5)]
    assert_same(sharding.all_reduce_sums([(t.clone(), over) for t in parts]), parts)
    largest = parts[0].clone()
    sharding.all_reduce_in_place(largest, over, distributed.ReduceOp.MAX)
    assert_same(largest, parts[0])


def test_objects_go_through_the_group(mesh):
    """As `check_ranks` says what differs."""
    found = [None]
    distributed.all_gather_object(found, ("the gradient", 1.5), group=mesh.get_group(0))
    assert found == [("the gradient", 1.5)]
