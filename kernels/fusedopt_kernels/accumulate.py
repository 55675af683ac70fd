# mypy: allow-untyped-defs
"""Weighted sums of gradients: one launch adds all tensors of a launch class."""

import numpy as np
import triton
import triton.language as tl

from fusedopt_kernels.device import load_number, load_pointer, narrow
from fusedopt_kernels.elementwise import launch_elementwise, open_piece
from fusedopt_kernels.record import INTEGER, NUMBER, TENSOR, Record, Tables
from fusedopt_kernels.table import LaunchTable

ROW = Record(sum=TENSOR, grad=TENSOR, previous=TENSOR, numel=INTEGER)
"""What is written, what is added, and what it is added to: 0 for nothing."""

HYPER = Record(weight=NUMBER)
TABLES = Tables(ROW.places, HYPER.places)


@triton.jit
def add(
    chunks,
    rows,
    hyper,
    T: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    PREVIOUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one tensor. S, G, PREVIOUS: dtypes of sum, gradient and what it is added to; None for nothing."""
    _, row, first, offsets, mask = open_piece(chunks, rows, T, ALIGNED, BLOCK)
    weight = load_number(hyper + T.hyper.weight).to(COMPUTE)
    g = tl.load(load_pointer(row + T.row.grad, G, ALIGNED, VECTOR_WIDTH) + first + offsets, mask=mask).to(COMPUTE)
    # A gradient of no weight may hold anything: the mean over no tokens is NaN.
    total = tl.where(weight == 0.0, 0.0, weight * g)
    if PREVIOUS is not None:
        previous_at = load_pointer(row + T.row.previous, PREVIOUS, ALIGNED, VECTOR_WIDTH) + first + offsets
        total += tl.load(previous_at, mask=mask).to(COMPUTE)
    tl.store(load_pointer(row + T.row.sum, S, ALIGNED, VECTOR_WIDTH) + first + offsets, narrow(total, S), mask=mask)


def accumulate(table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> None:
    """`sum = previous + weight * grad` for all tensors of a table.

    Args:
        table: rows of `ROW`, one row of `HYPER`.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
    """
    tensors = len(ROW.tensors)
    launch_elementwise(add, "add", table, ROW, keys, numel, (table.rows, table.hyper, TABLES), decisive=tensors)
