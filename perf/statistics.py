"""AdamW that tracks statistics on a CPU, beside a plain step, and beside torch's operations around its fused step.

python -m perf.statistics --seconds 60
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fusedopt import AdamW
from perf.providers import ADAM
from perf.workloads import WORKLOADS, Workload

NAMES = ("gpt_50m", "matrices_50m", "tiny_2000")


class Around:
    """The same numbers by torch's operations: a copy of the weights before its fused step, norms, differences."""

    def __init__(self, params: list[Any]) -> None:
        self._params = params
        self._old = [torch.empty_like(p) for p in params]
        self._optimizer = torch.optim.AdamW(params, **ADAM, fused=True)

    @torch.no_grad()
    def step(self) -> Tensor:
        torch._foreach_copy_(self._old, self._params)
        gradients = torch._foreach_norm([p.grad for p in self._params])
        weights = torch._foreach_norm(self._old)
        self._optimizer.step()
        torch._foreach_sub_(self._old, self._params)  # the updates, but for their sign
        updates = torch._foreach_norm(self._old)
        # Of all ways to the largest magnitude the fastest here; the norm of order inf takes eight times as long.
        largest = [torch.maximum(-low, high) for low, high in map(torch.aminmax, self._old)]
        return torch.stack([torch.stack(list(column)) for column in (gradients, weights, updates, largest)])


def _params(workload: Workload) -> list[Any]:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in workload.shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _ours(workload: Workload, track: bool) -> Callable[[], object]:
    return AdamW(_params(workload), **ADAM, convention="torch", track_statistics=track).step


def compare(workload: Workload, seconds: float) -> list[tuple[float, ...]]:
    """Returns the times of a tracked step, a plain one and theirs, in turn, for so many seconds, but for the first."""
    steps = _ours(workload, True), _ours(workload, False), Around(_params(workload)).step
    rounds: list[tuple[float, ...]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        rounds.append(tuple(map(_seconds, steps)))
    return rounds[2:]


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _shown(ratios: Sequence[float]) -> str:
    ordered = sorted(ratios)
    return f"{ordered[len(ordered) // 2]:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def main() -> None:
    """Prints a line per workload: median times, and ratios with their best and worst round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all workloads together (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = []
    for name in tqdm(NAMES, "measuring", leave=False):
        rounds = compare(WORKLOADS[name], args.seconds / len(NAMES))
        tracked, plain, around = (sorted(column)[len(rounds) // 2] * 1e3 for column in zip(*rounds))
        over_plain, over_ours = _shown([r[0] / r[1] for r in rounds]), _shown([r[2] / r[0] for r in rounds])
        lines.append(f"{name:14} {tracked:8.1f} {plain:8.1f} {around:8.1f}   {over_plain:22}  {over_ours}")
    head = f"{'ms':14} {'tracked':>8} {'plain':>8} {'torch':>8}   {'tracked over plain':22}  torch over tracked"
    print(f"{head}, on {args.threads} threads", *lines, sep="\n")


if __name__ == "__main__":
    main()
