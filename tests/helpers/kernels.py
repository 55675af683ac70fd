"""The kernels under test: constants that cut tensors into small pieces, and CUDA graphs without a GPU.

What a captured step queues is recorded, and run again at every replay. The stand-in graph keeps what a real one keeps:
the copies from pinned memory and the launches, with their addresses.
"""

import weakref
from contextlib import contextmanager

import torch
from triton.runtime.jit import KernelInterface

from fusedopt.backends.triton.capture import Tables
from fusedopt_kernels import norm
from fusedopt_kernels.adafactor import averages as adafactor_averages
from fusedopt_kernels.adafactor import plan, shards
from fusedopt_kernels.adafactor import step as adafactor

KERNELS = {
    adafactor: ("prologue", "sums", "averages", "squares", "finish", "apply"),
}

TINY = {
    **{"BLOCK": 16, "TILE_BYTES": 16, "TILE_HEIGHT": 8, "ENTRIES": 4, "PARTIALS": 2, "MEANS": 2, "SQUARES": 4},
    **{"LINES": 4, "STRIP": 2, "SHARE": 8},
}
"""Constants that send tensors of a few elements across borders of pieces."""


def set_constants(monkeypatch, constants):
    for name, value in constants.items():
        for module in (plan, adafactor_averages, shards, adafactor):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


class Graph:
    def __init__(self):
        self.queued = []
        self.launches = 0

    def replay(self):
        for work in self.queued:
            work()


def by_address(arg):
    """What a graph knows of an argument: nothing that would keep it alive."""
    if not isinstance(arg, torch.Tensor):
        return lambda: arg
    reference = weakref.ref(arg)

    def alive():
        tensor = reference()
        assert tensor is not None, "a graph was replayed whose memory is gone"
        return tensor

    return alive


def captures(monkeypatch):
    """Returns a context manager like `torch.cuda.graph`, for a new `Graph`."""
    capturing: list[Graph] = []
    for module in (
        "fusedopt.optimizer.engine",
        "fusedopt.optimizer.clipping",
        "fusedopt.optimizer.numbering",
        "fusedopt.optimizer.state",
        "fusedopt.optimizer.tracking",
        "fusedopt.backends.graphs",
        "fusedopt.backends.triton.capture",
        "fusedopt.backends.triton.verdict",
        "fusedopt.backends.triton.scalars",
        "fusedopt.keras.adam_weight_decay",
        "fusedopt.keras.step_count",
    ):
        monkeypatch.setattr(f"{module}.capturing", lambda *device: bool(capturing))
    launcher = KernelInterface.__getitem__

    def queue(kernel, grid):
        def launch(*args, **kwargs):
            if not capturing or kernel is norm.sum_of_squares:  # torch goes on with the sums, and is not recorded
                launcher(kernel, grid)(*args, **kwargs)
                return
            kept = [by_address(arg) for arg in args]
            capturing[-1].queued.append(lambda: launcher(kernel, grid)(*(arg() for arg in kept), **kwargs))
            capturing[-1].launches += 1

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", queue)
    # Other tests of this process may have left memory for captures behind.
    monkeypatch.setattr("fusedopt.backends.triton.capture._reserves", {})
    copy_at_every_replay = Tables._copy_at_every_replay

    def copied(self, host, device):
        table = copy_at_every_replay(self, host, device)
        staging = self._kept[-1]
        assert torch.equal(staging, table)  # which reads nothing that counts as a wait for the device
        table.fill_(-1)
        kept_table, kept_staging = by_address(table), by_address(staging)
        capturing[-1].queued.append(lambda: kept_table().copy_(kept_staging()))
        return table

    monkeypatch.setattr(Tables, "_copy_at_every_replay", copied)

    @contextmanager
    def capture():
        capturing.append(Graph())
        try:
            yield capturing[-1]
        finally:
            capturing.pop()

    return capture
