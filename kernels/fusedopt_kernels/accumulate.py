# mypy: allow-untyped-defs
"""Weighted sums of gradients: one launch adds all tensors of a launch class."""

import numpy as np
import triton
import triton.language as tl

from fusedopt_kernels.device import dtypes_of_names, load_number, narrow
from fusedopt_kernels.elementwise import launch_elementwise, open_piece, pieces_of, pointers
from fusedopt_kernels.record import INTEGER, NUMBER, TENSOR, Record, Tables
from fusedopt_kernels.table import LaunchTable

ROW = Record(sum=TENSOR, grad=TENSOR, previous=TENSOR, numel=INTEGER)
"""Destination, summand, and the tensor that it is added to: 0 for none."""

HYPER = Record(weight=NUMBER)
TABLES = Tables(ROW.places, HYPER.places)


@triton.jit
def add(chunks, rows, hyper, T: tl.constexpr, A: tl.constexpr):
    """One piece of one tensor."""
    S: tl.constexpr = dtypes_of_names(A)
    _, row, first, offsets, mask = open_piece(chunks, rows, T, S)
    weight = load_number(hyper + T.hyper.weight).to(S.compute)
    g = tl.load(pointers(row + T.row.grad, S.grad, first, offsets, S), mask=mask).to(S.compute)
    # A gradient of no weight may hold anything: the mean over no tokens is NaN.
    total = tl.where(weight == 0.0, 0.0, weight * g)
    if S.previous is not None:
        previous_at = pointers(row + T.row.previous, S.previous, first, offsets, S)
        total += tl.load(previous_at, mask=mask).to(S.compute)
    tl.store(pointers(row + T.row.sum, S.sum, first, offsets, S), narrow(total, S.sum), mask=mask)


def accumulate(table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> None:
    """`sum = previous + weight * grad` for all tensors of a table.

    Args:
        table: rows of `ROW`, one row of `HYPER`.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
    """
    tensors = len(ROW.tensors)
    launches = table.chunks("add", keys, pieces_of(numel))
    launch_elementwise(add, launches, ROW, (table.rows, table.hyper, TABLES), decisive=tensors)
