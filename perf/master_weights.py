"""AdamW with master weights on a CPU, beside torch's fused AdamW on a float32 copy of the weights and the copies.

python -m perf.master_weights --seconds 30
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from fusedopt import AdamW
from perf.providers import ADAM
from perf.workloads import WORKLOADS, Workload

NAMES = ("gpt_50m", "matrices_50m", "tiny_2000")


class Float32Copy:
    """torch's fused AdamW on a float32 copy: gradients are copied there, weights are copied back."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self._copies = [torch.nn.Parameter(p.detach().float()) for p in params]
        for copy in self._copies:
            copy.grad = torch.empty_like(copy)
        self._optimizer = torch.optim.AdamW(self._copies, **ADAM, fused=True)

    def step(self) -> None:
        torch._foreach_copy_([copy.grad for copy in self._copies if copy.grad is not None], _grads(self._params))
        self._optimizer.step()
        torch._foreach_copy_([p.detach() for p in self._params], [copy.detach() for copy in self._copies])


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _params(workload: Workload) -> list[Tensor]:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in workload.shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(workload: Workload, seconds: float) -> list[tuple[float, float]]:
    """Returns the times of one step of ours and of theirs, in turn, for so many seconds; the first two are left out."""
    ours = AdamW(_params(workload), **ADAM, convention="torch", master_weights=True).step
    theirs = Float32Copy(_params(workload)).step
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        pairs.append((_seconds(ours), _seconds(theirs)))
    return pairs[2:]


def main() -> None:
    """Prints a line per workload: median times, and the ratio of ours to theirs, with its best and its worst pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for all workloads together (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = []
    for name in tqdm(NAMES, "measuring", leave=False):
        pairs = compare(WORKLOADS[name], args.seconds / len(NAMES))
        ours, theirs = (sorted(column)[len(pairs) // 2] * 1e3 for column in zip(*pairs))
        ratios = sorted(a / b for a, b in pairs)
        ratio = f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"{name:14} {ours:8.1f} ms {theirs:8.1f} ms   {ratio}")
    print(f"{'':14} {'fusedopt':>11} {'copy':>11}   time over theirs, of {args.threads} threads", *lines, sep="\n")


if __name__ == "__main__":
    main()
