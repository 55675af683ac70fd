"""The benchmark of sharded models: what ours makes of each step is constant, and nothing is left over."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from perf import dtensor

OURS = [name for name in dtensor.OPTIMIZERS if name.startswith("fusedopt")]


@pytest.fixture
def mesh():
    """One of two processes, the other of which is not there: sums over both are those of this one."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_steps_of_shards_make_no_more_and_leave_nothing(mesh, name):
    model = dtensor.sharded_layers(4, 6, mesh)
    optimizer = dtensor.OPTIMIZERS[name](list(model.parameters()))
    found = dtensor.measure({name: optimizer.step}, 50)[name]
    assert found.early == found.late and found.late.calls > 0
    assert found.late.garbage == 0
    assert found.grown.objects < 5
    assert found.grown.blocks < 8 * 50  # one per parameter and step; Python's own free lists come and go by a hundred


@pytest.mark.slow
def test_what_is_left_over_is_found():
    kept = []

    def step():
        kept.append([len(kept)])
        cycle = []
        cycle.append(cycle)

    found = dtensor.measure({"leaks": step}, 50)["leaks"]
    assert found.early.garbage == found.late.garbage == 2
    assert found.grown.objects > 40 and found.grown.blocks > 40  # of 50 that it keeps, less what others let go
    assert "leaks" in dtensor.shown({"leaks": found})
