"""How many launches is one step? torch's fused optimizers, counted from the limits in torch's own header.

`multi_tensor_apply` hands a launch the addresses of its tensors as arguments, and as many fit as the argument space
has room for. The limits are read from `ATen/native/cuda/MultiTensorApply.cuh` of the torch that is installed.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

from perf.primers import Primer
from perf.report import Panel, bars_picture
from perf.traffic import watch
from perf.workloads import WORKLOADS

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "native" / "cuda" / "MultiTensorApply.cuh"
MODELS = {"GPT-2 124M": "gpt2", "Llama-2 7B": "llama2_7b"}
ADAMW, NORM, SCALE, COUNTS = 4, 1, 1, 1
"""Lists of tensors that a kernel takes: parameters, gradients and two moments; gradients; gradients; step counts."""

OURS = 2


class Limits(NamedTuple):
    """How much one launch takes.

    Attributes:
        name: of the builds of torch that have them.
        tensors: at most, by the number of lists.
        blocks: at most, by the number of lists; a block works on one chunk.
        chunk: elements.
    """

    name: str
    tensors: Sequence[int]
    blocks: Sequence[int]
    chunk: int


@cache
def limits() -> list[Limits]:
    """Returns the limits in torch's header: for 32 KB of arguments, then for 4 KB."""
    text = HEADER.read_text()

    def numbers(name: str) -> list[list[int]]:
        found = re.findall(rf"\b{name}\[5\] =\s*\{{([\d, ]+)\}}", text)
        return [[int(n) for n in row.split(",")] for row in found]

    (chunk,) = re.findall(r"kChunkSize = (\d+);", text)
    both = zip(numbers("depth_to_max_tensors"), numbers("depth_to_max_blocks"))
    names = ["built for CUDA 13", "built for CUDA 12 or ROCm"]
    return [Limits(name, *pair, int(chunk)) for name, pair in zip(names, both, strict=True)]


def launches(sizes: Iterable[int], lists: int, limit: Limits) -> int:
    """Returns the launches of `multi_tensor_apply` for tensors of these sizes, as its loop makes them.

    >>> launches([65536] * 3, 1, Limits("two blocks", [9], [2], 65536))
    2
    """
    count = tensors = blocks = 0
    for size in sizes:
        chunks = -(-size // limit.chunk)
        tensors += bool(chunks)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == limit.tensors[lists - 1] and last) or blocks == limit.blocks[lists - 1]:
                count, blocks, tensors = count + 1, 0, 0 if last else 1
    return count + bool(blocks)


def fused_adamw(sizes: Sequence[int], limit: Limits) -> int:
    """Returns the launches of a step of `torch.optim.AdamW(fused=True)`: the update, and before it the step counts."""
    return launches(sizes, ADAMW, limit) + launches([1] * len(sizes), COUNTS, limit)


def clipping(sizes: Sequence[int], limit: Limits) -> int:
    """Returns the least launches of `clip_grad_norm_`: those over the gradients, and one per operation on the norms."""
    return launches(sizes, NORM, limit) + launches(sizes, SCALE, limit) + _operations_on_norms()


@cache
def _operations_on_norms() -> int:
    """Returns the operations of `clip_grad_norm_` besides the two over the gradients, as torch dispatches them."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    return int(watch(lambda: clip_grad_norm_(params, 1.0))["operations"]) - 2


def sizes_of(workload: str) -> list[int]:
    """Returns the sizes of a model's parameters, in their order."""
    return [prod(shape) for shape in WORKLOADS[workload].shapes]


def run() -> Primer:
    rows, panels = [], []
    for model, workload in MODELS.items():
        sizes = sizes_of(workload)
        found = {f"torch fused, {limit.name}": fused_adamw(sizes, limit) for limit in limits()}
        bars = {"fusedopt": OURS, **{name.replace(", ", ",\n"): count for name, count in found.items()}}
        panels.append(Panel(f"{model}: {len(sizes)} tensors", {name: [count] for name, count in bars.items()}))
        row = {"model": model, "tensors": f"{len(sizes)}", "parameters": f"{sum(sizes) / 1e6:,.0f} M"}
        rows.append({**row, **{name: str(count) for name, count in found.items()}, "fusedopt": str(OURS)})
    return Primer(rows, bars_picture(panels, "launches per step of AdamW", most_columns=1))
