# mypy: allow-untyped-defs
"""Kernels that go over tensors element by element: what a program works on, and how they are launched."""

from typing import Any

import numpy as np
import torch
import triton.language as tl

from fusedopt_kernels.device import TRITON_DTYPES, device_function, load_size, my_piece, options
from fusedopt_kernels.record import Record
from fusedopt_kernels.table import LaunchTable, launch_class

BLOCK = 2048
THREADS = 256
"""A program's work: 8 elements per thread, which is two 128-bit accesses to a float32 tensor, one to a bfloat16 one."""


@device_function
def open_piece(chunks, rows, T: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The piece of a tensor that this program works on.

    Returns the number of the row, where it is, the first element of the piece, the offsets from there, and which of
    them the tensor has. One int64 per tensor and small offsets to it take fewer registers than an int64 per element.
    """
    index, piece = my_piece(chunks)
    row = rows + index * T.row.length
    first = piece * BLOCK
    offsets = tl.arange(0, BLOCK)
    return index, row, first, offsets, offsets < load_size(row + T.row.numel, ALIGNED) - first


def launch_elementwise(
    kernel: Any,
    name: str,
    table: LaunchTable,
    record: Record,
    keys: np.ndarray,
    numel: np.ndarray,
    arguments: tuple[Any, ...],
    decisive: int = 1,
) -> None:
    """Launches a kernel once for each launch class of a table's rows.

    Args:
        kernel: takes the chunks, `arguments`, the dtypes of the record's tensors, and constexpr options.
        name: of the launches in the table.
        table: of rows of `record`.
        record: of a row.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
        arguments: what the kernel takes behind the chunks.
        decisive: how many of the record's tensors, from the first, decide the arithmetic: float64 if one of them is.
    """
    for key, chunks in table.chunks(name, keys, -(-numel // BLOCK)).items():
        dtypes, aligned = launch_class(key, len(record.tensors))
        kernel[(len(chunks),)](
            chunks,
            *arguments,
            *(TRITON_DTYPES[dtype] for dtype in dtypes),
            COMPUTE=tl.float64 if torch.float64 in dtypes[:decisive] else tl.float32,
            ALIGNED=aligned,
            VECTOR_WIDTH=16 // max(dtype.itemsize for dtype in dtypes if dtype),
            BLOCK=BLOCK,
            **options(THREADS),
        )
