"""Steps of sharded models on a CPU, beside torch's AdamW: time of the host, and Python objects made and left over.

python -m perf.dtensor --layers 100 --steps 300

Two processes of gloo, FSDP2 over each layer, and gradients that stay: what is measured is `optimizer.step()` alone. The
layers are small, so that its time is the host's. Steps of all optimizers are taken in turn.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from fusedopt import Adafactor, AdamW
from perf.long_run import Memory, median_ms
from perf.providers import ADAM
from perf.report import table

PROCESSES = 2
WARM_UP = 3

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fusedopt.AdamW": lambda params: AdamW(params, **ADAM, convention="torch"),
    "fusedopt.AdamW, max_grad_norm": lambda params: AdamW(params, **ADAM, convention="torch", max_grad_norm=1.0),
    "fusedopt.AdamW, check_ranks": lambda params: AdamW(params, **ADAM, convention="torch", check_ranks=True),
    "fusedopt.Adafactor": Adafactor,
    "torch.optim.AdamW, foreach": lambda params: torch.optim.AdamW(params, **ADAM, foreach=True),
    "torch.optim.AdamW, fused": lambda params: torch.optim.AdamW(params, **ADAM, fused=True),
}


class Made(NamedTuple):
    """What one step makes: functions that it calls, of Python and of C, and objects that it leaves to the collector."""

    calls: int
    garbage: int


class Found(NamedTuple):
    """What was found of one optimizer.

    Attributes:
        first_ms, last_ms: median time of the processor for a step, in the first and in the last tenth of all.
        early, late: of an early step, and of the last one.
        grown: memory after as many steps again.
    """

    first_ms: float
    last_ms: float
    early: Made
    late: Made
    grown: Memory


def sharded_layers(layers: int, width: int, mesh: DeviceMesh) -> nn.Module:
    """Returns a model of these layers, each of them sharded, whose parameters have gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def made_by(step: Callable[[], object]) -> Made:
    """Takes a step whose calls are counted, and some without the collector."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    # Of one step it may be one more or fewer: what torch waits for is dropped a little later.
    return Made(calls, statistics.median_low([left_by(step) for _ in range(3)]))


def left_by(step: Callable[[], object]) -> int:
    """Returns how many objects a step leaves to the collector."""
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        step()
        return len(gc.get_objects()) - before
    finally:
        gc.enable()


def measure(steps: dict[str, Callable[[], object]], number: int, quiet: bool = True) -> dict[str, Found]:
    """Takes so many steps of each, in turn, and as many again to see what is left over."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    early = {name: made_by(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(number), "measuring", leave=False, disable=quiet):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            times[name].append(time.thread_time() - start)
    grown = {}
    for name, step in tqdm(steps.items(), "looking for what is left", leave=False, disable=quiet):
        before = Memory.now()
        for _ in range(number):
            step()
        grown[name] = Memory.now().since(before)
    late = {name: made_by(step) for name, step in steps.items()}
    tenth = max(1, number // 10)
    return {
        name: Found(
            median_ms(times[name][:tenth]), median_ms(times[name][-tenth:]), early[name], late[name], grown[name]
        )
        for name in steps
    }


def shown(found: dict[str, Found]) -> str:
    """Returns a table, a line for each optimizer; two numbers where the last step made another one than the early."""
    rows = []
    for name, (first, last, early, late, grown) in found.items():
        made = {what: " ".join(f"{n:,}" for n in dict.fromkeys(both)) for what, *both in zip(Made._fields, early, late)}
        rows.append({"": name, "ms": f"{first:.2f}", "at the end": f"{last:.2f}", **made, **grown.shown()})
    return table(rows)


def process(rank: int, folder: str, layers: int, width: int, steps: int) -> None:
    """What each process does; the first one writes the table."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    models = {name: sharded_layers(layers, width, mesh) for name in OPTIMIZERS}
    made = {name: make(list(models[name].parameters())) for name, make in OPTIMIZERS.items()}
    found = measure({name: optimizer.step for name, optimizer in made.items()}, steps, quiet=rank > 0)
    if rank == 0:
        Path(folder, "table.txt").write_text(shown(found))
    distributed.destroy_process_group()


def main() -> None:
    """Prints, for each optimizer, times of its first and last steps, and what they call, make and leave over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=100, help="two parameters each (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16, help="of a layer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each optimizer (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(process, (folder, args.layers, args.width, args.steps), PROCESSES)
        print(
            f"optimizer.step() of {2 * args.layers} parameters on {PROCESSES} processes: median time of the processor, "
            f"of the first and the last tenth of {args.steps} steps; functions called, and objects left to the "
            "collector, by an early step and, where it differs, by the last one; growth of memory by as many steps "
            "again\n"
        )
        print(Path(folder, "table.txt").read_text())


if __name__ == "__main__":
    main()
