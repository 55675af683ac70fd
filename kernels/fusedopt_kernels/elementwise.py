# mypy: allow-untyped-defs
"""Kernels that go over tensors element by element: what a program works on, and how they are launched."""

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl

from fusedopt_kernels.device import (
    TRITON_DTYPES,
    constant_function,
    device_function,
    load_pointer,
    load_size,
    my_piece,
    options,
)
from fusedopt_kernels.record import Record, Tables
from fusedopt_kernels.step import run_prologue
from fusedopt_kernels.table import LaunchTable, launch_class

BLOCK = 2048
THREADS = 256
"""A program's work: 8 elements per thread, which is two 128-bit accesses to a float32 tensor, one to a bfloat16 one."""


def access_of(record: Record, key: int, decisive: int = 1, *, block: int) -> Any:
    """The constexpr argument of a kernel: dtypes, and how it reaches elements.

    What serializes the constants of a kernel (compile hooks, `JITFunction.preload`) knows no tuple that holds dtypes:
    they are here by name, and `with_dtypes` puts them in, inside of the kernel.

    Args:
        record: of a row; each of its tensors has a dtype.
        key: the launch class.
        decisive: how many of these tensors, from the first, decide the arithmetic: float64 if one of them is.
        block: elements of a piece.
    """
    dtypes, aligned = launch_class(key, len(record.tensors))
    compute = torch.float64 if torch.float64 in dtypes[:decisive] else torch.float32
    names = [None if dtype is None else TRITON_DTYPES[dtype].name for dtype in (*dtypes, compute)]
    make: Any = namedtuple
    access = make("Access", [*record.tensors, "compute", "aligned", "vector_width", "block"])
    return access(*names, aligned, 16 // max(dtype.itemsize for dtype in dtypes if dtype), block)


_BY_NAME = {dtype.name: dtype for dtype in TRITON_DTYPES.values() if dtype is not None}


@constant_function
def with_dtypes(access: Any) -> Any:
    """`access_of` with dtypes in the place of their names."""
    return type(access)(*(_BY_NAME[value] if isinstance(value, str) else value for value in access))


@device_function
def open_piece(chunks, rows, T: tl.constexpr, A: tl.constexpr):
    """The piece of a tensor that this program works on.

    Returns the number of the row, where it is, the first element of the piece, the offsets from there, and which of
    them the tensor has. One int64 per tensor and small offsets to it take fewer registers than an int64 per element.
    """
    index, piece = my_piece(chunks)
    row = rows + index * T.row.length
    first = piece * A.block
    offsets = tl.arange(0, A.block)
    return index, row, first, offsets, offsets < load_size(row + T.row.numel, A.aligned) - first


@device_function
def pointers(cell, DTYPE: tl.constexpr, first, offsets, A: tl.constexpr):
    """Where the elements of a piece are of the tensor whose address is in this cell of its row."""
    return load_pointer(cell, DTYPE, A.aligned, A.vector_width) + first + offsets


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
        kernel: takes the chunks, `arguments`, and what `access_of` returns.
        name: of the launches in the table.
        table: of rows of `record`.
        record: of a row.
        keys: int64 [tensors], the launch class of each row.
        numel: int64 [tensors].
        arguments: what the kernel takes behind the chunks.
        decisive: as in `access_of`.
    """
    for key, chunks in table.chunks(name, keys, -(-numel // BLOCK)).items():
        kernel[(len(chunks),)](chunks, *arguments, access_of(record, key, decisive, block=BLOCK), **options(THREADS))


class Elementwise(NamedTuple):
    """The kernels of an optimizer that updates parameters and states of their shape element by element.

    Attributes:
        row: of the launch table, made by `row_record`.
        hyper: of a set of hyper-parameters, made by `hyper_record`.
        scalars: what the prologue leaves for each row, made by `scalars_record`.
        prologue: kernel over the rows, which begins their steps.
        update: kernel over pieces of tensors.
    """

    row: Record
    hyper: Record
    scalars: Record
    prologue: Any
    update: Any

    def step(self, table: LaunchTable, keys: np.ndarray, numel: np.ndarray) -> None:
        """One step of all tensors of a table.

        Args:
            table: rows of `row`, sets of hyper-parameters of `hyper`.
            keys: int64 [tensors], the launch class of each row.
            numel: int64 [tensors].
        """
        tables = Tables(self.row.places, self.hyper.places, self.scalars.places)
        # First: a captured step whose launch cannot be captured is refused before anything is queued.
        table.chunks("update", keys, -(-numel // BLOCK))
        scalars = run_prologue(self.prologue, table, tables)
        launch_elementwise(self.update, "update", table, self.row, keys, numel, (table.rows, scalars, tables))
