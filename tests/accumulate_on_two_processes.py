"""What each of two processes does in the test of GradientAccumulator under DistributedDataParallel."""

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fusedopt import AdamW
from fusedopt.accumulate import GradientAccumulator

# Tokens of each micro-batch, per process. The second has fewer micro-batches, and one that is shorter.
TOKENS = [[3, 5, 4], [2, 6]]


class Model(torch.nn.Module):
    """The expert is used by the second process only."""

    def __init__(self):
        super().__init__()
        self.shared = torch.nn.Linear(4, 1)
        self.expert = torch.nn.Linear(4, 1)
        self.unused = torch.nn.Linear(4, 1)

    def forward(self, x, expert):
        return self.shared(x) + (self.expert(x) if expert else 0.0)


def micro_batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(tokens, 4, generator=generator, dtype=torch.float64) for tokens in TOKENS[rank]]


def model():
    torch.manual_seed(0)
    return Model().double()


def loss(network, x, rank):
    """The mean over the tokens of the micro-batch."""
    return (network(x, expert=rank == 1) ** 2).mean()


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    ours = model()
    network = DistributedDataParallel(ours)
    optimizer = AdamW(ours.parameters(), lr=0.1)
    accumulator = GradientAccumulator()
    windows = []
    for _ in range(2):
        for x in micro_batches(rank):
            with network.no_sync():
                loss(network, x, rank).backward()
            accumulator.accumulate(ours.parameters(), weight=len(x))
        local = [None if g is None else g.clone() for g in accumulator.gradients]
        accumulator.all_reduce()
        windows.append({"local": local, "step": accumulator.step, "weight": accumulator.weight})
        optimizer.apply_gradients(zip(accumulator.gradients, ours.parameters()), scale=accumulator.scale)
        accumulator.reset()

    # Refusals come in both processes, or the other one would wait for ever.
    refused = []
    called = GradientAccumulator()
    called([torch.ones(2), torch.ones(2) if rank else None])
    twice = GradientAccumulator()
    twice([torch.ones(2)])
    twice.all_reduce()
    missing = GradientAccumulator()
    if rank:
        missing([torch.ones(2)])
    for accumulator in (called, twice, missing):
        try:
            accumulator.all_reduce()
        except ValueError as error:
            refused.append(str(error))
    params = {name: p.detach() for name, p in ours.named_parameters()}
    torch.save({"params": params, "windows": windows, "refused": refused}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
