# mypy: allow-untyped-defs
"""Sums of squares of gradients: one launch reads all tensors of a launch class once and writes no tensor."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels.device import dtypes_of_names, options
from fusedopt_kernels.elementwise import access_of, open_piece, pointers
from fusedopt_kernels.record import INTEGER, TENSOR, Record, Tables
from fusedopt_kernels.table import LaunchTable

ROW = Record(grad=TENSOR, numel=INTEGER)
TABLES = Tables(ROW.places)

BLOCK = 4096
THREADS = 256
"""16 elements per thread: four 128-bit reads in flight for float32, and one number written per 16 KiB read."""


@triton.jit
def sum_of_squares(chunks, rows, sums, T: tl.constexpr, A: tl.constexpr):
    """One piece of one gradient. Always added up in the same order."""
    S: tl.constexpr = dtypes_of_names(A)
    _, row, first, offsets, mask = open_piece(chunks, rows, T, S)
    g = tl.load(pointers(row + T.row.grad, S.grad, first, offsets, S), mask=mask, other=0.0).to(S.compute)
    # Relative to the largest, whose square float32 may not hold. NaN comes through as NaN, inf as inf.
    largest = tl.max(tl.abs(g), axis=0)
    unit = tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)
    g = g / unit
    total = tl.sum(g * g, axis=0).to(tl.float64)
    tl.store(sums + tl.program_id(0).to(tl.int64), total * unit.to(tl.float64) * unit.to(tl.float64))


def pieces(table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> dict[int, Tensor]:
    """The launches of `squares`, which takes the same."""
    return table.chunks("squares", keys, -(-numel // BLOCK))


def squares(table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> Tensor:
    """The sums of squares of all pieces of all tensors of a table, float64 [pieces].

    Args:
        table: rows of `ROW`.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
    """
    parts = []
    for key, chunks in pieces(table, keys, numel).items():
        parts.append(torch.empty(len(chunks), dtype=torch.float64, device=chunks.device))
        access = access_of(ROW, key, block=BLOCK)
        sum_of_squares[(len(chunks),)](chunks, table.rows, parts[-1], TABLES, access, **options(THREADS))
    return parts[0] if len(parts) == 1 else torch.cat([*parts, table.rows.new_zeros(1, dtype=torch.float64)])
