"""Steps of sharded models on a CPU, beside torch's AdamW: time of the host, and Python objects made and left over.

python -m perf.dtensor --layers 100 --steps 300

Two processes of gloo, FSDP2 over each layer, and gradients that stay: what is measured is `optimizer.step()` alone. The
layers are small, so that its time is the host's. Steps of all optimizers are taken in turn.
"""

import argparse
import datetime
import gc
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from fusedopt import Adafactor, AdamW
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


class Found(NamedTuple):
    """What was found of one optimizer.

    Attributes:
        first_ms, last_ms: median time of the processor for a step, in the first and in the last tenth of all.
        calls: Python functions, and those of C, that a step calls.
        garbage: objects that a step leaves to the collector.
        left: objects that are there after all steps, and a collection, more than after the first ones.
        left_kib: memory of Python's objects, likewise.
    """

    first_ms: float
    last_ms: float
    calls: tuple[int, int]  # of an early step, and of the last one
    garbage: tuple[int, int]
    left: int
    left_kib: float


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


def calls_of(step: Callable[[], object]) -> int:
    """Returns how many functions a step calls."""
    number = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return number


def garbage_of(step: Callable[[], object]) -> int:
    """Returns how many more objects there are after a step than before it, none of which was collected."""
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        step()
        return len(gc.get_objects()) - before
    finally:
        gc.enable()


def there() -> tuple[int, int]:
    """Returns how many objects there are after a collection, and the bytes of those that were made while traced."""
    gc.collect()
    return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]


@contextmanager
def traced() -> Iterator[None]:
    """Counts the memory of Python's objects; makes steps slower."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def measure(steps: dict[str, Callable[[], object]], number: int, quiet: bool = True) -> dict[str, Found]:
    """Takes so many steps of each, in turn, and as many again to see what is left over."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    calls = {name: [calls_of(step)] for name, step in steps.items()}
    garbage = {name: [garbage_of(step)] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(number), "measuring", leave=False, disable=quiet):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            times[name].append(time.thread_time() - start)
    left = {}
    with traced():
        for name, step in tqdm(steps.items(), "looking for what is left", leave=False, disable=quiet):
            for _ in range(number):  # what lasts was made before it was traced, and is made anew
                step()
            objects, held = there()
            for _ in range(number):
                step()
            objects_now, held_now = there()
            left[name] = objects_now - objects, (held_now - held) / 1024
    for name, step in steps.items():
        calls[name].append(calls_of(step))
        garbage[name].append(garbage_of(step))
    tenth = max(1, number // 10)
    return {
        name: Found(
            1e3 * sorted(took[:tenth])[tenth // 2],
            1e3 * sorted(took[-tenth:])[tenth // 2],
            (calls[name][0], calls[name][1]),
            (garbage[name][0], garbage[name][1]),
            *left[name],
        )
        for name, took in times.items()
    }


def shown(found: dict[str, Found]) -> str:
    """Returns a table, a line for each optimizer."""
    return table(
        [
            {
                "": name,
                "ms": f"{f.first_ms:.2f}",
                "at the end": f"{f.last_ms:.2f}",
                "calls": " ".join(f"{n:,}" for n in dict.fromkeys(f.calls)),
                "garbage": " ".join(f"{n:,}" for n in dict.fromkeys(f.garbage)),
                "left over": f"{f.left:,}",
                "KiB": f"{f.left_kib:.1f}",
            }
            for name, f in found.items()
        ]
    )


def process(rank: int, folder: str, layers: int, width: int, steps: int) -> None:
    """What each process does; the first one writes the table."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(minutes=10),
    )
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
            "collector, by an early step and, where it differs, by the last one; objects and memory left over at the "
            "end\n"
        )
        print(Path(folder, "table.txt").read_text())


if __name__ == "__main__":
    main()
