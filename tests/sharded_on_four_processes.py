"""What each of four processes does in the tests of sharded parameters: every case, one after the other.

`python sharded_on_four_processes.py RANK FOLDER` runs them; the test compares with the same optimizer of whole tensors.
"""

import datetime
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fusedopt import Adafactor, AdamW, AdamWeightDecay

WORLD = 4
STEPS = 3

# Rows and columns that four processes cannot share evenly: some have one more, or none at all.
SHAPES = [(5, 7), (9, 6), (3, 6, 5), (11,), (), (40, 3)]


class Layout(NamedTuple):
    """How parameters lie on a mesh: for each of its dimensions, the one of a tensor that it splits; None replicates."""

    mesh: tuple[int, ...]
    dims: tuple[int | None, ...]


LAYOUTS = {
    "rows": Layout((4,), (0,)),
    "columns": Layout((4,), (-1,)),
    "last rows": Layout((4,), (-2,)),
    "replicated": Layout((4,), (None,)),
    "rows and columns": Layout((2, 2), (0, -1)),
    "replicas of rows": Layout((2, 2), (None, 0)),
    "rows twice": Layout((2, 2), (0, 0)),
}

OPTIMIZERS = {
    "AdamW": lambda named, **kw: AdamW(named, lr=0.1, weight_decay=0.1, **kw),
    "AdamW-clipped": lambda named, **kw: AdamW(named, lr=0.1, weight_decay=0.1, max_grad_norm=0.5, **kw),
    "AdamW-skipping": lambda named, **kw: AdamW(named, lr=0.1, skip_nonfinite=True, **kw),
    "AdamWeightDecay-clipnorm": lambda named, **kw: AdamWeightDecay(named, 0.1, clipnorm=0.5, clipvalue=1.0, **kw),
    "AdamWeightDecay-global_clipnorm": lambda named, **kw: AdamWeightDecay(named, 0.1, global_clipnorm=0.5, **kw),
    "Adafactor": lambda named, **kw: Adafactor(named, **kw),
    "Adafactor-beta1": lambda named, **kw: Adafactor(
        named, lr=0.1, relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.1, max_grad_norm=2.0, **kw
    ),
}

BACKENDS = ("eager", "triton")


def cases():
    return list(itertools.product(OPTIMIZERS, LAYOUTS, BACKENDS))


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(name: str, step: int) -> list[torch.Tensor]:
    """The second step of those that skip has a NaN in the last row of a tensor, which one process has."""
    grads = tensors(step + 1)
    if "skipping" in name and step == 1:
        grads[1][-1, -1] = torch.nan
    return grads


def run(name: str, params: list[torch.nn.Parameter], spread, backend: str):
    """Some steps; `spread` makes of a whole gradient one that lies as its parameter."""
    optimizer = OPTIMIZERS[name]([(str(i), p) for i, p in enumerate(params)], backend=backend)
    for step in range(STEPS):
        for p, g in zip(params, gradients(name, step)):
            p.grad = spread(g)
        optimizer.step()
    return optimizer


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def result(optimizer, params) -> dict:
    """Weights, states and norms, gathered."""
    return {
        "params": [whole(p) for p in params],
        "states": [{key: whole(value) for key, value in optimizer.state[p].items()} for p in params],
        "grad_norm": optimizer.grad_norm,
        "skipped_steps": optimizer.skipped_steps,
    }


def placements(layout: Layout, t: torch.Tensor):
    """Those of a parameter of the dimensions of t."""
    there = [d if d is None else d % max(t.dim(), 1) if -t.dim() <= d < t.dim() else None for d in layout.dims]
    return [Replicate() if d is None else Shard(d) for d in there]


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    torch.set_num_threads(1)
    meshes = {shape: init_device_mesh("cpu", shape) for shape in {layout.mesh for layout in LAYOUTS.values()}}
    results = {}
    for name, layout_name, backend in cases():
        layout = LAYOUTS[layout_name]
        mesh = meshes[layout.mesh]

        def spread(t, mesh=mesh, layout=layout):
            return distribute_tensor(t, mesh, placements(layout, t))

        params = [torch.nn.Parameter(spread(t)) for t in tensors(0)]
        optimizer = run(name, params, spread, backend)
        results[name, layout_name, backend] = result(optimizer, params)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
