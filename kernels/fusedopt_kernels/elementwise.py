# mypy: allow-untyped-defs
"""Kernels that go over tensors element by element: what a program works on, and how they are launched."""

from collections import namedtuple
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from fusedopt_kernels.device import (
    device_function,
    dtype_name,
    load_pointer,
    load_size,
    my_piece,
    options,
)
from fusedopt_kernels.record import Record, Tables
from fusedopt_kernels.statistics import measuring
from fusedopt_kernels.step import room_for_scalars, run_prologue
from fusedopt_kernels.storage import load_keys, random_words
from fusedopt_kernels.table import LaunchTable, launch_class

BLOCK = 2048
THREADS = 256
"""A program's work: 8 elements per thread, which is two 128-bit accesses to a float32 tensor, one to a bfloat16 one."""


def pieces_of(numel: np.ndarray) -> np.ndarray:
    """Into how many pieces tensors of these sizes are cut."""
    return -(-numel // BLOCK)


@cache
def access_of(record: Record, key: int, decisive: int = 1, *, block: int) -> Any:
    """The constexpr argument of a kernel: dtypes, and how it reaches elements.

    Dtypes are here by name; `dtypes_of_names` puts them in, inside of the kernel.

    Args:
        record: of a row; each of its tensors has a dtype.
        key: the launch class.
        decisive: how many of these tensors, from the first, decide the arithmetic: float64 if one of them is.
        block: elements of a piece.
    """
    dtypes, aligned, rounding, sharded = launch_class(key, len(record.tensors))
    compute = torch.float64 if torch.float64 in dtypes[:decisive] else torch.float32
    names = map(dtype_name, (*dtypes, compute))
    make: Any = namedtuple
    width = 16 // max(dtype.itemsize for dtype in dtypes if dtype)
    access = make("Access", [*record.tensors, "compute", "aligned", "rounding", "sharded", "vector_width", "block"])
    return access(*names, aligned, rounding, sharded, width, block)


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


@device_function
def pointers_or_none(cell, DTYPE: tl.constexpr, first, offsets, A: tl.constexpr):
    """`pointers`, or None where the launch has no such tensor."""
    at = None
    if DTYPE is not None:
        at = pointers(cell, DTYPE, first, offsets, A)
    return at


@device_function
def words_of_piece(row, scalar, first, offsets, x, T: tl.constexpr, A: tl.constexpr):
    """The random words of the elements of a piece, x some of their numbers; None if nothing is random."""
    words = None
    if A.rounding > 0:
        key0, key1 = load_keys(scalar + T.scalars.keys)
        if A.sharded:
            # Lines of a shard, of `length` elements each, are apart in the whole parameter. `line` is that of the first
            # element, of whose line the piece has `rest`. Integers are divided by floating point, which is faster: half
            # a unit keeps quotients of numbers below 2^51 in float64, below 2^12 in float32, off the next integer.
            length = tl.load(row + T.row.shard_length)
            gap = tl.load(row + T.row.shard_gap)
            one_by_length = tl.load(scalar + T.scalars.one_by_length)
            line = ((first.to(tl.float64) + 0.5) * one_by_length).to(tl.int64)
            step = tl.minimum(length, A.block).to(tl.int32)
            rest = tl.minimum((line + 1) * length - first, step.to(tl.int64)).to(tl.int32)
            # Where all of these are multiples of 16, so many elements are next to each other, and no sum has a carry.
            together: tl.constexpr = 16 if A.aligned else 1
            of_group = offsets & -together
            one_by_step = tl.where(length < A.block, one_by_length.to(tl.float32), 1.0 / A.block)
            lines = ((of_group + (step - rest)).to(tl.float32) + 0.5) * one_by_step
            start = first + line * gap + tl.load(row + T.row.shard_offset)
            index = start + of_group + lines.to(tl.int32).to(tl.int64) * gap
            low = (index.to(tl.uint32) ^ key0) ^ (offsets & (together - 1)).to(tl.uint32)
            words = random_words(low, (index >> 32).to(tl.uint32), 0, key1)
        else:
            # `first` is a multiple of the power of two that offsets are below: with no carry, xor adds.
            key0 ^= first.to(tl.uint32)
            words = random_words(offsets.to(tl.uint32), (first >> 32).to(tl.uint32), key0, key1)
        # Plus 0, of which only the last compiler knows: threads make the words of the elements that they have in hand.
        # Else Triton may have others do it, where words have several uses, and exchange them through shared memory.
        words += (x.to(tl.float32).to(tl.uint32, bitcast=True) >> 31) >> 1
    return words


def launch_elementwise(
    kernel: Any,
    launches: dict[int, Tensor],
    record: Record,
    arguments: tuple[Any, ...],
    decisive: int = 1,
) -> None:
    """Launches a kernel once for each launch class of a table's rows.

    Args:
        kernel: takes the chunks, `arguments`, and what `access_of` returns.
        launches: the chunks of each, by launch class.
        record: of a row of the table.
        arguments: what the kernel takes after the chunks.
        decisive: as in `access_of`.
    """
    for key, chunks in launches.items():
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

    def make_room(self, table: LaunchTable, keys: np.ndarray, pieces: np.ndarray, measured: bool) -> dict[int, Tensor]:
        """Makes the memory that a step works in, and returns its launches. A table on "meta" tells how much it is.

        Args:
            table: of the step.
            keys: int64 [tensors], the launch class of each row.
            pieces: int64 [tensors], see `pieces_of`.
            measured: whether the step leaves measures.

        Raises:
            RuntimeError: during a capture, a launch that cannot be captured; nothing is queued then.
        """
        launches = table.chunks("measured update" if measured else "update", keys, pieces)
        room_for_scalars(table, self.scalars.places)
        return launches

    def step(self, table: LaunchTable, launches: dict[int, Tensor], partials: Tensor | None = None) -> None:
        """One step of all tensors of a table.

        Args:
            table: rows of `row`, sets of hyper-parameters of `hyper`.
            launches: what `make_room` returned.
            partials: memory for the measures of all pieces; None: there are to be none.
        """
        random = any(launch_class(key, len(self.row.tensors)).rounding for key in launches)
        tables = measuring(Tables(self.row.places, self.hyper.places, self.scalars.places, random), partials)
        scalars = run_prologue(self.prologue, table, tables._replace(measures=None))
        launch_elementwise(self.update, launches, self.row, (table.rows, scalars, partials, tables))
