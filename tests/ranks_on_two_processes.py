"""What each of two processes sees of steps about which they disagree; at the end one is killed.

`python ranks_on_two_processes.py RANK FOLDER`
"""

import copy
import datetime
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers.memory import Allocations
from sharded_on_four_processes import counted
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion

OPTIMIZERS = {
    "AdamW": lambda named, **kw: AdamW(named, lr=0.1, weight_decay=0.1, **kw),
    "AdamW-skipping": lambda named, **kw: AdamW(named, lr=0.1, skip_nonfinite=True, max_grad_norm=1.0, **kw),
    "AdamWeightDecay": lambda named, **kw: AdamWeightDecay(named, 0.1, global_clipnorm=0.5, **kw),
    "Adafactor": lambda named, **kw: Adafactor(named, weight_decay=0.1, **kw),
    "Lion": lambda named, **kw: Lion(named, lr=0.1, **kw),
}

LAYOUTS = {"rows": Shard(0), "replicated": Replicate(), "whole": None}


def model(mesh, layout):
    generator = torch.Generator().manual_seed(0)
    named = [(name, torch.randn(4, 3, generator=generator)) for name in ("first", "second")]
    place = LAYOUTS[layout]
    return [
        (name, torch.nn.Parameter(t if place is None else distribute_tensor(t, mesh, [place]))) for name, t in named
    ]


def backward(named):
    for _, p in named:
        p.grad = torch.ones_like(p) + 0.0


def spoilt_gradient(optimizer, named):
    """On this process alone: the other's shard, or copy, is right."""
    g = named[0][1].grad
    (g.to_local() if isinstance(g, DTensor) else g)[0, 0] = torch.nan


def another_gradient(optimizer, named):
    g = named[0][1].grad
    (g.to_local() if isinstance(g, DTensor) else g)[0, 0] += 2.0**-20


def another_rate(optimizer, named):
    optimizer.param_groups[0]["lr" if optimizer.param_groups[0].get("lr") is not None else "weight_decay"] = 0.3


def frozen(optimizer, named):
    named[1][1].requires_grad_(False)
    named[1][1].grad = None


def refused(optimizer, named):
    optimizer.param_groups[0]["weight_decay"] = -1.0


def without_first_gradient(optimizer, named):
    named[0][1].grad = None


def without_state(optimizer, named):
    del optimizer.state[named[0][1]]


def another_limit(optimizer, named):
    optimizer.guard.skip_grad_norm_above = 5.0


def loaded(optimizer, named):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def with_one_group_more(optimizer, named):
    optimizer.add_param_group({"params": [("third", torch.nn.Parameter(torch.ones(2)))]})


SPOILT = {
    "a gradient is missing": without_first_gradient,
    "a parameter is frozen": frozen,
    "another rate": another_rate,
    "an option that is refused": refused,
    "no state": without_state,
    "another limit": another_limit,
    "NaN": spoilt_gradient,
    "another gradient": another_gradient,
    "one group more": with_one_group_more,
    "a load": loaded,
}
"""What happens to the second process alone before the second step."""


def cases():
    for name in OPTIMIZERS:
        for spoilt in SPOILT:
            for layout in LAYOUTS if "gradient" in spoilt or spoilt == "NaN" else ("rows",):
                yield name, spoilt, layout


PLANTED = RuntimeError("planted\nand more of it")


def planted(target, name):
    """A step in which something raises."""

    def take(optimizer, named):
        with mock.patch.object(target(optimizer), name, side_effect=PLANTED):
            optimizer.step()

    return take


def with_a_broken_state(optimizer, named):
    with mock.patch.dict(optimizer.state[named[1][1]], step="three"):
        optimizer.step()


def with_a_sparse_gradient(optimizer, named):
    p = named[0][1]
    g, p.grad = p.grad, p.grad.to_sparse()
    try:
        optimizer.step()
    finally:
        p.grad = g


def pairs(named):
    return [(p.grad, p) for _, p in named]


RAISES = {
    "a hook of the optimizer": planted(lambda optimizer: optimizer, "before_step"),
    "an option": planted(lambda optimizer: optimizer, "check_group"),
    "states that are settled": planted(lambda optimizer: optimizer._engine._states, "settle"),
    "states that are made": planted(lambda optimizer: sys.modules["fusedopt.optimizer.engine"], "make_states"),
    "the comparison": planted(lambda optimizer: sys.modules["fusedopt.optimizer.ranks"], "_digest"),
    "a broken state": with_a_broken_state,
    "a sparse gradient": with_a_sparse_gradient,
    "a factor": lambda optimizer, named: optimizer.apply_gradients(pairs(named), scale=math.nan),
    "a parameter twice": lambda optimizer, named: optimizer.apply_gradients(pairs(named) * 2),
    "a tensor of nobody": lambda optimizer, named: optimizer.apply_gradients([(torch.ones(3), torch.ones(3))]),
    "pairs that raise": lambda optimizer, named: optimizer.apply_gradients(1 / 0 for _ in named),
}
"""Steps that the second process alone takes, and which raise before all have compared theirs."""


def step(optimizer, take=None) -> str | None:
    """The error of a step, if there is one."""
    try:
        optimizer.step() if take is None else take()
    except (RuntimeError, ValueError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def everything(optimizer, named):
    """What lies in this process."""
    states = [{key: t for key, t in optimizer.state[p].items()} for _, p in named if p in optimizer.state]
    return copy.deepcopy([here([p.detach() for _, p in named]), [here(state) for state in states]])


def here(tensors):
    if isinstance(tensors, dict):
        return {key: here([t])[0] for key, t in tensors.items()}
    return [t.to_local().clone() if isinstance(t, DTensor) else t.clone() for t in tensors]


def one(rank, mesh, name, spoilt, layout):
    named = model(mesh, layout)
    optimizer = OPTIMIZERS[name](named, check_ranks=True)
    backward(named)
    optimizer.step()
    backward(named)
    if rank == 1:
        SPOILT[spoilt](optimizer, named)
    before = everything(optimizer, named)
    error = step(optimizer)
    return {"error": error, "before": before, "after": everything(optimizer, named)}


def raised(rank, mesh, name, where):
    """A second step that raises in one process; then both take it."""
    named = model(mesh, "whole")
    optimizer = OPTIMIZERS[name](named, check_ranks=True)
    if where != "states that are made":
        backward(named)
        optimizer.step()
    backward(named)
    before, start = everything(optimizer, named), time.monotonic()
    error = step(optimizer, None if rank == 0 else lambda: RAISES[where](optimizer, named))
    seconds, after = time.monotonic() - start, everything(optimizer, named)
    again = step(optimizer)
    return {
        "error": error,
        "seconds": seconds,
        "before": before,
        "after": after,
        "again": again,
        "end": named[0][1].sum().item(),
    }


def undisturbed(mesh, name, layout):
    """Weights after three steps with the check and without it, and the all-reduces of each."""
    found = []
    for check in (True, False):
        named = model(mesh, layout)
        optimizer = OPTIMIZERS[name](named, check_ranks=check)
        with counted() as calls:
            for _ in range(3):
                backward(named)
                optimizer.step()
        found.append((everything(optimizer, named), len(calls)))
    return found


def lost_step(rank, mesh, name, layout):
    """One process fails in the first step, when all have compared theirs, and tries it again; then comes the second.

    At last all load.
    """
    named = model(mesh, layout)
    optimizer = OPTIMIZERS[name](named, check_ranks=True)
    saved = copy.deepcopy(optimizer.state_dict())
    outcomes = []
    backward(named)
    if rank == 0:
        outcomes += [step(optimizer), None]
    else:
        with mock.patch.object(optimizer._engine, "param_sets", side_effect=PLANTED):
            outcomes.append(step(optimizer))
        outcomes.append(step(optimizer))
    for in_place in (True, False):
        if in_place:
            for _, p in named:
                p.grad.mul_(2.0)
        else:
            backward(named)
        outcomes.append(step(optimizer))
    optimizer.load_state_dict(saved)
    backward(named)
    return [*outcomes, step(optimizer)]


def waited_for(rank, mesh):
    """One process fails when all have compared, before the sums that the other waits for; nothing else is sent then."""
    named = model(mesh, "rows")
    optimizer = OPTIMIZERS["AdamW-skipping"](named, check_ranks=True)
    backward(named)
    if rank == 0:
        return step(optimizer), float(optimizer.grad_norm)
    outcomes = []
    with mock.patch("fusedopt.sharding.all_reduce_sums", side_effect=PLANTED):
        outcomes.append(step(optimizer))
    for _ in range(2):
        outcomes.append(step(optimizer))
        backward(named)
    dist.all_reduce(torch.full((1,), 3.0, dtype=torch.float64))  # in its place
    return outcomes


def out_of_memory(rank, mesh, name):
    """One process runs out of memory at the first allocation of a first step, the second one, and so on.

    Returns one row for each: the errors, where they are to be tried again, and what lies there after that.
    """
    rows = []
    while True:
        named = [*model(mesh, "whole"), ("third", torch.nn.Parameter(torch.ones(6, dtype=torch.bfloat16)))]
        optimizer = OPTIMIZERS[name](named, check_ranks=True)
        backward(named)
        with Allocations(len(rows) if rank == 1 else None):
            error = step(optimizer)
        enough = rank == 1 and error is None
        goes_on = optimizer._engine.unfinished is not None
        flags = torch.tensor([enough, goes_on])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        enough, goes_on = flags.tolist()
        if enough:
            return rows, everything(optimizer, named)
        row = {"error": error, "goes_on": goes_on, "after": everything(optimizer, named)}
        told = torch.tensor([error is not None])
        dist.all_reduce(told, dist.ReduceOp.MIN)
        row["told"] = bool(told)
        if row["told"] or (goes_on and rank == 1):
            row["again"] = step(optimizer)
            row["end"] = everything(optimizer, named)
        backward(named)
        row["next"] = step(optimizer)
        rows.append(row)


def went_on(rank):
    """One process is interrupted before the comparison, or runs out of memory after it; then come other gradients."""
    outcomes = []
    for at, error in (("before_step", KeyboardInterrupt), ("before_step", UnprintableError), ("finish", None)):
        named = model(None, "whole")
        optimizer = OPTIMIZERS["AdamW"](named, check_ranks=True)
        for number in range(3):
            backward(named)
            if rank == 0 or number != 1:
                outcomes.append(step(optimizer))
            elif error is None:
                with mock.patch("fusedopt.backends.work.Work.__call__", side_effect=torch.OutOfMemoryError("planted")):
                    outcomes.append(step(optimizer))
            else:
                with (
                    mock.patch.object(optimizer, at, side_effect=error()),
                    suppress(KeyboardInterrupt, UnprintableError),
                ):
                    optimizer.step()
                if error is KeyboardInterrupt:
                    outcomes.append(step(optimizer))
        outcomes.append(everything(optimizer, named))
    return outcomes


class UnprintableError(Exception):
    def __str__(self):
        raise TypeError("planted")


def after_the_other_was_killed(mesh, rank):
    """The errors of steps that need the other process, the seconds until then, and all there is before and after."""
    makes = {
        "AdamW-checked": lambda named: OPTIMIZERS["AdamW"](named, check_ranks=True),
        "Adafactor-checked": lambda named: OPTIMIZERS["Adafactor"](named, check_ranks=True),
        "AdamW-clipped": lambda named: AdamW(named, max_grad_norm=1.0),
        "Adafactor": OPTIMIZERS["Adafactor"],
    }
    made = {}
    for name, make in makes.items():
        named = model(mesh, "rows")
        optimizer = make(named)
        backward(named)
        optimizer.step()
        made[name] = named, optimizer
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    found = {}
    for name, (named, optimizer) in made.items():
        backward(named)
        before, start = everything(optimizer, named), time.monotonic()
        error = step(optimizer)
        found[name] = error, time.monotonic() - start, before, everything(optimizer, named)
    return found


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    results = {case: one(rank, mesh, *case) for case in cases()}
    for name in OPTIMIZERS:
        for layout in LAYOUTS:
            results["undisturbed", name, layout] = undisturbed(mesh, name, layout)
        for where in RAISES:
            results["raised", name, where] = raised(rank, mesh, name, where)
        for layout in ("whole", "rows") if name != "Adafactor" else ("whole",):  # others wait for sums of its rows
            results["lost", name, layout] = lost_step(rank, mesh, name, layout)
        results["out of memory", name] = out_of_memory(rank, mesh, name)
    results["went on",] = went_on(rank)
    results["waited for",] = waited_for(rank, mesh)
    torch.save(results, folder / f"{rank}.pt")
    found = after_the_other_was_killed(mesh, rank)
    torch.save(found, folder / "killed.pt")
    os._exit(0)  # what takes leave of the group would wait for the other process


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
