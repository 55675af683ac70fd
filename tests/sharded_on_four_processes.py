"""What each of four processes does in the tests of sharded parameters: every case, one after the other.

`python sharded_on_four_processes.py RANK FOLDER` leaves the results in the folder; the test compares them with those of
the same optimizer of whole tensors.
"""

import copy
import dataclasses
import datetime
import itertools
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from helpers.loops import Net, train
from helpers.optimizers import OPTIMIZERS
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion
from fusedopt.backends import has_triton
from fusedopt.sharding import shard

WORLD = 4
STEPS = 2

# Rows and columns that four processes cannot share evenly: some have one more, or none at all.
SHAPES = [(5, 7), (9, 6), (3, 6, 5), (11,), (), (40, 3), (0, 5)]


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

CASES = {
    **OPTIMIZERS,
    "AdamW-clipped": lambda named, **kw: AdamW(named, lr=0.1, weight_decay=0.1, max_grad_norm=0.5, **kw),
    "AdamW-skipping": lambda named, **kw: AdamW(named, lr=0.1, skip_nonfinite=True, **kw),
    "AdamW-limited": lambda named, **kw: AdamW(named, lr=0.1, skip_grad_norm_above=17.0, skip_outliers=3.0, **kw),
    "AdamWeightDecay-clipnorm": lambda named, **kw: AdamWeightDecay(named, 0.1, clipnorm=0.5, clipvalue=1.0, **kw),
    "AdamWeightDecay-global_clipnorm": lambda named, **kw: AdamWeightDecay(named, 0.1, global_clipnorm=0.5, **kw),
    "AdamWeightDecay-clipped-skipping": lambda named, **kw: AdamWeightDecay(
        named, 0.1, max_grad_norm=0.5, skip_nonfinite=True, **kw
    ),
    "Adafactor-skipping": lambda named, **kw: Adafactor(named, skip_nonfinite=True, **kw),
    "Adafactor-beta1": lambda named, **kw: Adafactor(
        named, lr=0.1, relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.1, max_grad_norm=2.0, **kw
    ),
    "Lion-skipping": lambda named, **kw: Lion(
        named, lr=0.1, weight_decay=0.1, max_grad_norm=0.5, skip_nonfinite=True, **kw
    ),
}

BACKENDS = ("eager", "triton") if has_triton() else ("eager",)

POLICIES = {
    "AdamW-master": lambda params, **kw: AdamW(params, lr=0.01, weight_decay=0.1, master_weights=True, **kw),
    "AdamW-stochastic": lambda params, **kw: AdamW(params, lr=0.01, stochastic_rounding=True, seed=3, **kw),
    "AdamW-bfloat16 moments": lambda params, **kw: AdamW(params, lr=0.01, state_dtype=torch.bfloat16, **kw),
    "Lion-stochastic": lambda params, **kw: Lion(params, lr=0.01, stochastic_rounding=True, **kw),
    "Adafactor-master": lambda params, **kw: Adafactor(params, master_weights=True, **kw),
    "Adafactor-stochastic": lambda params, **kw: Adafactor(params, stochastic_rounding=True, **kw),
}
"""Of bfloat16 parameters, whose elements are rounded to the same bits wherever they are."""


def precise_cases():
    """Layouts of four processes, and of two: "replicas of rows" are halves, twice."""
    layouts = ("rows", "columns", "rows and columns", "replicas of rows", "rows twice")
    triton = {"rows", "rows and columns"}
    every = itertools.product(POLICIES, layouts, BACKENDS)
    return [case for case in every if case[2] == "eager" or (case[1] in triton and "Adafactor" not in case[0])]


def cases():
    """All of them, but for what kernels do not tell from other cases: the interpreter is slow."""
    spared = {"last rows", "replicated", "rows twice", "Adafactor-skipping", "AdamW-limited"}
    every = itertools.product(CASES, LAYOUTS, BACKENDS)
    return [case for case in every if case[2] == "eager" or not spared & set(case)]


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(name: str, step: int) -> list[torch.Tensor]:
    """The first step of those that skip has a NaN in the last row of a tensor, which one process has."""
    grads = tensors(step + 1)
    if "skipping" in name and step == 0:
        grads[1][-1, -1] = torch.nan
    return grads


def precise_shapes(layout: str) -> list:
    """Without those that have more than one row above what a second dimension of a mesh splits."""
    return [shape for shape in SHAPES if layout != "rows and columns" or len(shape) != 3]


def run_precisely(name: str, layout: str, spread, backend: str):
    """Some steps of bfloat16 parameters; `spread` lays out what is whole."""
    shapes = precise_shapes(layout)
    params, *grads = [
        [t.bfloat16() for t, shape in zip(tensors(seed), SHAPES) if shape in shapes] for seed in range(STEPS + 1)
    ]
    params = [torch.nn.Parameter(spread(t)) for t in params]
    optimizer = POLICIES[name](params, backend=backend)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = spread(g)
        optimizer.step()
    return optimizer, params


def precise_result(optimizer, params) -> dict:
    """Weights and states, gathered."""
    states = [{key: whole(value) for key, value in optimizer.state[p].items()} for p in params]
    return {"params": [whole(p) for p in params], "states": states}


def reshard(folder: Path, meshes) -> dict:
    """A checkpoint in a folder of four processes, and what two pairs and their next step make of it."""
    found = {}
    for name in ("AdamW-master", "AdamW-stochastic"):
        runs = {}
        for layout_name in ("rows", "replicas of rows"):
            layout = LAYOUTS[layout_name]
            mesh = meshes[layout.mesh]
            model = torch.nn.Module()
            for i, t in enumerate(tensors(0)[:4]):
                there = distribute_tensor(t.bfloat16(), mesh, placements(layout, t))
                setattr(model, f"p{i}", torch.nn.Parameter(there))
            runs[layout_name] = model, POLICIES[name](model.parameters(), backend="eager"), mesh, layout

        def go_on(layout_name, seed, runs=runs):
            model, optimizer, mesh, layout = runs[layout_name]
            for p, g in zip(model.parameters(), tensors(seed)):
                p.grad = distribute_tensor(g.bfloat16(), mesh, placements(layout, g))
            optimizer.step()
            optimizer.zero_grad()
            return precise_result(optimizer, list(model.parameters()))

        go_on("rows", 1)
        where = folder / f"checkpoint of {name}"
        model, optimizer, _, _ = runs["rows"]
        parts = dict(zip(("model", "optimizer"), dcp.get_state_dict(model, optimizer)))
        dist.checkpoint.save(parts, checkpoint_id=where)
        model, optimizer, _, _ = runs["replicas of rows"]
        into = dict(zip(("model", "optimizer"), dcp.get_state_dict(model, optimizer)))
        dist.checkpoint.load(into, checkpoint_id=where)
        dcp.set_model_state_dict(model, into["model"])
        dcp.set_optimizer_state_dict(model, optimizer, into["optimizer"])
        saved = precise_result(optimizer, list(model.parameters()))
        parts = dict(zip(("model", "optimizer"), dcp.get_state_dict(model, optimizer)))
        dist.checkpoint.save(parts, checkpoint_id=folder / f"second checkpoint of {name}")
        found[name] = saved, go_on("rows", 2), go_on("replicas of rows", 2)
    return found


def refused(meshes) -> dict:
    """What a step says of rows and columns of a stack of matrices, which are no lines of one length; None: nothing."""
    found = {}
    for policy in ({"master_weights": True}, {"stochastic_rounding": True}, {"state_dtype": torch.bfloat16}):
        t = torch.ones(3, 4, 6, dtype=torch.bfloat16)
        p = torch.nn.Parameter(distribute_tensor(t, meshes[2, 2], [Shard(1), Shard(2)]))
        try:
            AdamW([p], **policy).apply_gradients([(torch.ones_like(p), p)])
            found[next(iter(policy))] = None
        except RuntimeError as error:
            found[next(iter(policy))] = str(error)
    return found


def disagreement(rank: int, meshes) -> tuple[str | None, torch.Tensor]:
    """What a step says of another rate in the last process, which shares no dimension of the mesh with the first."""
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), meshes[2, 2], [Shard(0), Shard(1)]))
    optimizer = AdamW([p], lr=0.3 if rank == WORLD - 1 else 0.1, check_ranks=True)
    said = None
    try:
        optimizer.apply_gradients([(torch.ones_like(p), p)])
    except RuntimeError as error:
        said = str(error)
    return said, shard(p.detach()).clone()


def run(name: str, params: list[torch.nn.Parameter], spread, backend: str):
    """Some steps; `spread` makes of a whole gradient one that lies as its parameter."""
    optimizer = CASES[name]([(str(i), p) for i, p in enumerate(params)], backend=backend)
    for step in range(STEPS):
        for p, g in zip(params, gradients(name, step)):
            p.grad = spread(g)
        optimizer.step()
    return optimizer


def statistics_cases():
    names = ("AdamW-clipped", "AdamWeightDecay-clipnorm", "Adafactor-skipping", "Lion-skipping")
    eager = [(name, layout, "eager") for name in names for layout in LAYOUTS]
    return eager + [
        (name, "rows and columns", "triton") for name in names if "triton" in BACKENDS and "clip" not in name
    ]


def run_tracked(name: str, params: list[torch.nn.Parameter], spread, backend: str) -> list[torch.Tensor]:
    """The statistics of some steps, of which one may be skipped; one parameter has no gradient."""
    optimizer = CASES[name]([(str(i), p) for i, p in enumerate(params)], backend=backend, track_statistics=True)
    found = []
    for step in range(STEPS):
        for p, g in list(zip(params, gradients(name, step)))[1:]:
            p.grad = spread(g)
        optimizer.step()
        found.append(optimizer.statistics.tensor)
    return found


@contextmanager
def counted():
    """A list that grows with every all-reduce: elements and bytes of each."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda t, *args, **kwargs: (calls.append((t.numel(), t.nbytes)), all_reduce(t, *args, **kwargs))[
        1
    ]
    try:
        yield calls
    finally:
        dist.all_reduce = all_reduce


def whole(t: torch.Tensor) -> torch.Tensor:
    """gloo moves no int16."""
    wide = t.to(torch.int32) if t.dtype is torch.int16 else t
    return (wide.full_tensor() if isinstance(wide, DTensor) else wide).detach().to(t.dtype).clone()


def placements_of(optimizer, params) -> list:
    """Of states, as text."""
    return [
        {name: str(getattr(value, "placements", None)) for name, value in optimizer.state[p].items()} for p in params
    ]


def result(optimizer, params) -> dict:
    """Weights, states and norms, gathered."""
    return {
        "params": [whole(p) for p in params],
        "states": [{key: whole(value) for key, value in optimizer.state[p].items()} for p in params],
        "placements": placements_of(optimizer, params),
        "grad_norm": optimizer.grad_norm,
        "average": optimizer.state_dict()["param_groups"][0].get("grad_norm_average", ()),
        "skipped_steps": None if optimizer.skipped_steps is None else dict(optimizer.skipped_steps),
    }


def placements(layout: Layout, t: torch.Tensor):
    """Those of a parameter of the dimensions of t."""
    there = [d if d is None else d % max(t.dim(), 1) if -t.dim() <= d < t.dim() else None for d in layout.dims]
    return [Replicate() if d is None else Shard(d) for d in there]


def stopped(rank: int, meshes) -> dict:
    """Weights before and after a step that the last process alone finds an overflow for, on two meshes."""
    found = {}
    for name in ("AdamW", "AdamW-clipped", "AdamWeightDecay-global_clipnorm", "Adafactor"):
        layouts = [LAYOUTS["rows"], LAYOUTS["rows and columns"]] * len(SHAPES)
        params = [
            torch.nn.Parameter(distribute_tensor(t, meshes[layout.mesh], placements(layout, t)))
            for t, layout in zip(tensors(0), layouts)
        ]
        optimizer = CASES[name]([(str(i), p) for i, p in enumerate(params)], backend="eager")
        before = [whole(p) for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(rank == WORLD - 1))
        optimizer.step()
        found[name] = before, [whole(p) for p in params]
    return found


def laid_out_anew(meshes) -> dict:
    """States loaded from one layout into another, and as they were."""
    found = {}
    for source, target in (("rows", "columns"), ("columns", "replicated"), ("rows", "rows and columns")):
        optimizers = []
        for layout in (LAYOUTS[source], LAYOUTS[target]):

            def spread(t, layout=layout):
                return distribute_tensor(t, meshes[layout.mesh], placements(layout, t))

            params = [torch.nn.Parameter(spread(t)) for t in tensors(0)]
            optimizers.append((run("Adafactor-beta1", params, spread, "eager"), params))
        (old, old_params), (new, params) = optimizers
        fresh = placements_of(new, params)
        new.load_state_dict(old.state_dict())
        states = [
            [{key: whole(value) for key, value in o.state[p].items()} for p in own]
            for o, own in ((new, params), (old, old_params))
        ]
        found[source, target] = (*states, placements_of(new, params), fresh)
    return found


MODELS = ("fully_shard", "tensor parallel and fully_shard")
MODEL_OPTIMIZERS = {
    "bfloat16-AdamW-master": lambda model: AdamW(model.parameters(), lr=0.1, master_weights=True),
    "bfloat16-AdamW-stochastic": lambda model: AdamW(model.parameters(), lr=0.1, stochastic_rounding=True),
    "AdamW": lambda model: AdamW(model.parameters(), lr=0.1, max_grad_norm=0.05, skip_nonfinite=True),
    "Adafactor": lambda model: Adafactor(model.parameters(), weight_decay=0.1),
}


def model_cases():
    return list(itertools.product(MODELS, MODEL_OPTIMIZERS))


def model_of(name: str, seed: int = 0) -> torch.nn.Module:
    """The model for one of these optimizers."""
    return Net(seed).to(torch.bfloat16 if "bfloat16" in name else torch.float32)


def sharded_model(how: str, name: str, seed: int = 0) -> torch.nn.Module:
    """FSDP2 over all processes, or over two pairs, each of which shares the rows of a matrix: shards of shards."""
    model = model_of(name, seed)
    if how == "fully_shard":
        mesh = init_device_mesh("cpu", (WORLD,))
    else:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        mesh = both["dp"]
        parallelize_module(model, both["tp"], {"first": ColwiseParallel(output_layouts=Replicate())})
    for child in model.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_and_resume(how: str, name: str) -> dict:
    """A run, its checkpoint gathered, and the weights of the run that goes on from it in a new model."""
    model = sharded_model(how, name)
    optimizer = MODEL_OPTIMIZERS[name](model)
    with counted() as calls:
        train(model, optimizer, 2)
    options = dcp.StateDictOptions(full_state_dict=True)
    saved = {"model": dcp.get_model_state_dict(model, options=options)}
    saved["optimizer"] = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    kept = copy.deepcopy(saved)  # what every process has is not gathered: it is the state itself
    placements = {type(placement).__name__ for p in model.parameters() for placement in p.placements}
    train(model, optimizer, 2, seed=2)

    resumed = sharded_model(how, name, seed=9)
    other = MODEL_OPTIMIZERS[name](resumed)
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(resumed, kept["model"], options=options)
    dcp.set_optimizer_state_dict(resumed, other, copy.deepcopy(kept["optimizer"]), options=options)
    train(resumed, other, 2, seed=2)
    return {
        "saved": kept,
        "placements": placements,
        "params": [whole(p) for p in model.parameters()],
        "resumed": [whole(p) for p in resumed.parameters()],
        "all_reduces": calls,
    }


def laid_out(t: torch.Tensor, meshes, layout_name: str) -> torch.Tensor:
    """A whole tensor, sharded."""
    layout = LAYOUTS[layout_name]
    return distribute_tensor(t, meshes[layout.mesh], placements(layout, t))


def whole_stories(rank: int, folder: Path, meshes) -> dict:
    """What is not a case of an optimizer in a layout: loading, overflows, checkpoints, models."""
    results = {}
    plain = [torch.nn.Parameter(t) for t in tensors(0)]
    saved = run("Adafactor-beta1", plain, lambda g: g, "eager").state_dict()
    for layout_name in LAYOUTS:
        params = [torch.nn.Parameter(laid_out(t, meshes, layout_name)) for t in plain]
        optimizer = CASES["Adafactor-beta1"](params, backend="eager")
        optimizer.load_state_dict(copy.deepcopy(saved))
        states = [{key: whole(value) for key, value in optimizer.state[p].items()} for p in params]
        results["loaded", layout_name] = states, placements_of(optimizer, params)
    results["overflow in the last process"] = stopped(rank, meshes)
    results["from one layout to another"] = laid_out_anew(meshes)
    results["resharded"] = reshard(folder, meshes)
    results["refused"] = refused(meshes)
    results["disagreement"] = disagreement(rank, meshes)
    for how, name in model_cases():
        results[how, name] = train_and_resume(how, name)
    return results


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    torch.set_num_threads(1)
    if has_triton():
        from triton.runtime.interpreter import interpreter_builder

        # Without checks for overflow, which take the interpreter as long again: nothing here is that large.
        interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    meshes = {shape: init_device_mesh("cpu", shape) for shape in {layout.mesh for layout in LAYOUTS.values()}}
    results = {}
    for name, layout_name, backend in cases():
        params = [torch.nn.Parameter(laid_out(t, meshes, layout_name)) for t in tensors(0)]
        with counted() as calls:
            optimizer = run(name, params, partial(laid_out, meshes=meshes, layout_name=layout_name), backend)
        mine = sum(shard(t).nbytes for p in params for t in optimizer.state[p].values())
        results[name, layout_name, backend] = {**result(optimizer, params), "all_reduces": calls, "state_bytes": mine}
    for name, layout_name, backend in precise_cases():
        spread = partial(laid_out, meshes=meshes, layout_name=layout_name)
        results["precise", name, layout_name, backend] = precise_result(
            *run_precisely(name, layout_name, spread, backend)
        )
    for name, layout_name, backend in statistics_cases():
        spread = partial(laid_out, meshes=meshes, layout_name=layout_name)
        params = [torch.nn.Parameter(spread(t)) for t in tensors(0)]
        results["statistics", name, layout_name, backend] = run_tracked(name, params, spread, backend)
    results.update(whole_stories(rank, folder, meshes))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
