# mypy: allow-untyped-defs
"""Weighted sums of gradients: one launch adds all tensors of a launch class."""

import numpy as np
import torch
import triton
import triton.language as tl

from fusedopt_kernels.device import (
    TRITON_DTYPES,
    load_number,
    load_pointer,
    load_size,
    my_piece,
    narrow,
    options,
)
from fusedopt_kernels.table import LaunchTable, launch_class

COLUMNS = ("sum", "grad", "previous", "numel")
"""A row of the table: addresses of what is written, what is added and what it is added to (0: nothing); the size."""

TENSORS = 3

HYPER = ("weight", "weight32", "weight64", "unused")
"""The weight as bits of a float64, or as an address of a float32 or float64; the fourth keeps the rows aligned."""

BLOCK = 2048
THREADS = 256
"""As in AdamW, whose memory traffic per element is of the same kind."""

_SUM, _GRAD, _PREVIOUS, _NUMEL = map(tl.constexpr, range(4))
_COLUMNS = tl.constexpr(len(COLUMNS))


@triton.jit
def add(
    chunks,
    rows,
    hyper,
    S: tl.constexpr,
    G: tl.constexpr,
    PREVIOUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one tensor. S, G, PREVIOUS: dtypes of sum, gradient and what it is added to; None for nothing."""
    index, piece = my_piece(chunks)
    row = rows + index * _COLUMNS
    start = piece * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < load_size(row + _NUMEL, EVEN) - start
    weight = load_number(hyper, hyper + 1, hyper + 2).to(COMPUTE)
    g = tl.load(load_pointer(row + _GRAD, G, EVEN, TOGETHER) + start + offsets, mask=mask).to(COMPUTE)
    # A gradient of no weight may hold anything: the mean over no tokens is NaN.
    total = tl.where(weight == 0.0, 0.0, weight * g)
    if PREVIOUS is not None:
        previous_at = load_pointer(row + _PREVIOUS, PREVIOUS, EVEN, TOGETHER) + start + offsets
        total += tl.load(previous_at, mask=mask).to(COMPUTE)
    tl.store(load_pointer(row + _SUM, S, EVEN, TOGETHER) + start + offsets, narrow(total, S), mask=mask)


def accumulate(table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> None:
    """`sum = previous + weight * grad` for all tensors of a table.

    Args:
        table: rows of `COLUMNS`; one row of `HYPER`.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
    """
    for key, chunks in table.chunks("add", keys, -(-numel // BLOCK)).items():
        dtypes, even = launch_class(key, TENSORS)
        add[(len(chunks),)](
            chunks,
            table.rows,
            table.hyper,
            *(TRITON_DTYPES[dtype] for dtype in dtypes),
            COMPUTE=tl.float64 if torch.float64 in dtypes else tl.float32,
            EVEN=even,
            TOGETHER=16 // max(dtype.itemsize for dtype in dtypes if dtype),
            BLOCK=BLOCK,
            **options(THREADS),
        )
