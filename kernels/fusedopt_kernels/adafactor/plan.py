"""How Adafactor cuts tensors into the pieces that programs work on, and where their sums are kept.

A tensor is of one of three kinds. A *vector* (fewer than two dimensions) has an average of squares per element and is
cut into blocks. A *matrix* is cut into tiles of some rows and columns, whose sums meet in a workspace: a giant one is
spread over the machine, and no number is added to by two programs. *Small matrices*, kernels of convolutions above all,
come by the hundred thousand: a program takes many of them, which need no workspace.
"""

from collections import namedtuple
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels.adafactor.layout import MATRIX, SMALL, VECTOR
from fusedopt_kernels.adafactor.splits import Segment, Shards, Workspace, no_shards
from fusedopt_kernels.device import constant_function, dtype_name, dtypes_of_names
from fusedopt_kernels.table import launch_class

BLOCK = 2048
"""Elements of a matrix that a program has in hand at once, 8 for each of 256 threads: two 128-bit accesses to float32.
Half of it, of a vector and of whatever 128-bit accesses do not fit, so that no kernel needs many registers."""

TILE_BYTES = 512
"""Length of a tile's rows in bytes of the gradient: a warp reads one with a 128-bit access per lane, and so adds up
rows by itself."""

TILE_HEIGHT = 512
"""Rows of a tile, read some at a time. Each tile leaves a sum per row and per column. So a float32 matrix needs a
workspace of 1/128 + 1/512 of its size, a 16-bit one of 2/256 + 2/512, since its tiles are wider and sums are float32.
Higher tiles need less, and keep fewer programs busy: a matrix of 768 x 768 has 12 such tiles in float32."""

SMALL_SIDE = 32
"""Longest side of a small matrix, which one program walks along."""

LINES = 128
STRIP = 4
"""Rows (or columns) of small matrices that a program has in hand at once, and how much of each."""

SHARE = 8 * LINES
"""Rows of small matrices that are a program's work."""

ENTRIES = 128
PARTIALS = 32
"""Entries of a matrix's row or column that a program averages at once, and of how many tiles it adds up the sums."""

SQUARES = 1024
"""Sums of squares that the program that finishes a tensor has in hand at once."""

MEANS = 256
"""Programs that may share the rows of a matrix in averages: every later program adds up their partial sums."""


class Sizes(NamedTuple):
    """The sizes above, as far as a kernel that reads gradients depends on them."""

    block: int
    half_block: int
    tile_width: int
    tile_height: int
    lines: int
    strip: int
    means: int


class Access(NamedTuple):
    """The properties of a launch class, with dtypes by name."""

    param: str | None
    grad: str | None
    master: str | None
    exp_avg: str | None
    compute: str
    rounding: int
    sharded: bool


_named: Any = namedtuple
Spec = _named("Spec", ("row", "scalars", "measures", *Access._fields, *Sizes._fields))
"""The constexpr argument of a kernel that reads gradients: places of fields, `Access` with dtypes, `Sizes`.

Its device functions take it whole. The kernel takes the parts and puts them together with `as_spec`.
"""


def sizes_of(grad_itemsize: int) -> Sizes:
    """Returns the sizes for gradients with this many bytes per element."""
    return Sizes(BLOCK, BLOCK // 2, TILE_BYTES // grad_itemsize, TILE_HEIGHT, LINES, STRIP, MEANS)


@constant_function
def as_spec(tables: Any, sizes: Any, access: Any) -> Any:
    """The `Spec` of a kernel's constants, inside of the kernel: of dtypes, it gets the names."""
    return Spec(tables.row, tables.scalars, tables.measures, *dtypes_of_names(access), *sizes)


@cache
def access_of(key: int) -> Access:
    """Returns the properties of a launch class of parameters, gradients, `master`s and averages of updates."""
    dtypes, _, rounding, sharded = launch_class(key, 4)
    compute = torch.float64 if dtypes[0] is torch.float64 else torch.float32
    return Access._make([*map(dtype_name, (*dtypes, compute)), rounding, sharded])


class Shapes(NamedTuple):
    """The shapes of tensors, int64 [tensors] each.

    In memory, a tensor is [outer, height, width, inner]: of its `outer * inner` matrices, number `o * inner + i` has
    its element (y, x) at ((o * height + y) * width + x) * inner + i. `inner` is 1 except for small matrices, where it
    is the channels of a channels_last tensor. Vectors have height and width 1.
    """

    kind: np.ndarray
    numel: np.ndarray
    matrices: np.ndarray
    height: np.ndarray
    width: np.ndarray
    inner: np.ndarray


class Plan(NamedTuple):
    """How tensors are cut, and where in the workspace their sums are.

    Attributes:
        fields: those of `layout.ROW` that follow from shapes, int64 [tensors] each, by name.
        pieces: int64 [tensors], programs that read gradients.
        matrix_pieces: int64 [tensors], the same without vectors.
        averages: int64 [tensors], programs that bring rows and columns of whole matrices up to date.
        shard_averages: int64 [tensors], the same of shards.
        shard_matrices: int64 [tensors], how many matrices a shard has.
        whole: int64 [tensors], 1 but for tensors without elements.
        in_float64: int64 [tensors], 1 where arithmetic is in float64, 0 for float32.
        partial_sums: elements of that workspace in float32, and in float64.
        square_partials: elements of that workspace.
        shards: which tensors are shards.
        segments: by phase ("sums", "means", "squares"), what is added up over processes, in this order.
    """

    fields: dict[str, np.ndarray]
    pieces: np.ndarray
    matrix_pieces: np.ndarray
    averages: np.ndarray
    shard_averages: np.ndarray
    shard_matrices: np.ndarray
    whole: np.ndarray
    in_float64: np.ndarray
    partial_sums: tuple[int, int]
    square_partials: int
    shards: Shards
    segments: dict[str, list[Segment]]


def shape_of(t: Tensor, small: bool = True) -> tuple[int, int, int, int, int, int] | None:
    """A tensor's numbers in `Shapes`; None if it does not lie in memory as described there.

    `small`: whether its matrices may be small ones, of which one program takes many.
    """
    if t.dim() < 2:
        return (VECTOR.value, t.numel(), 1, 1, 1, 1) if t.is_contiguous() else None
    *lead, height, width = t.shape
    kind = (SMALL if small and max(height, width) <= SMALL_SIDE else MATRIX).value
    for outer in range(len(lead), -1, -1):
        inner = prod(lead[outer:])
        order = [*range(outer), len(lead), len(lead) + 1, *range(outer, len(lead))]
        if t.permute(order).is_contiguous() and (inner == 1 or (kind == SMALL.value and inner < 1 << 20)):
            return kind, t.numel(), prod(lead), height, width, inner
    return None


def plan_of(shapes: Shapes, keys: np.ndarray, shards: Shards | None = None) -> Plan:
    """Cuts tensors into pieces, each in a way that depends on nothing but itself.

    A matrix of h rows and w columns needs h * ceil(w / tile width) + w * ceil(h / TILE_HEIGHT) numbers of its compute
    dtype for sums, at most MEANS for what its rows' programs leave, and 16 bytes per tile; a vector or small matrices
    need 16 bytes per piece.

    Args:
        shapes: of the tensors.
        keys: int64 [tensors], their launch classes.
        shards: which of them are shards, and of what; default: none. Matrices of shards are never small ones.
    """
    shards = shards or no_shards(shapes.numel, shapes.height, shapes.width)
    is_shard = shards.is_shard > 0
    dtypes = {key: launch_class(key, 2).dtypes for key in set(keys.tolist())}
    widths = {key: TILE_BYTES // grad.itemsize for key, (_, grad) in dtypes.items() if grad is not None}
    tile_width = np.array([widths[key] for key in keys.tolist()])
    wide = np.array([dtypes[key][0] is torch.float64 for key in keys.tolist()]).astype(np.int64)
    kind, numel, matrices, height, width, _ = shapes
    is_matrix = (kind == MATRIX.value) & ((numel > 0) | is_shard)  # rows of an empty shard have averages too
    tiles_x, tiles_y = _ceil(width, tile_width), _ceil(height, TILE_HEIGHT)
    pieces = np.select(
        [numel == 0, kind == MATRIX.value, kind == SMALL.value],
        [0, matrices * tiles_y * tiles_x, _ceil(matrices * height, SHARE)],
        _ceil(numel, BLOCK // 2),
    )
    rows_per_program = ENTRIES * np.maximum(1, _ceil(height, ENTRIES * MEANS))
    row_programs = _ceil(height, rows_per_program)
    averages = np.where(is_matrix, matrices * (row_programs + _ceil(width, ENTRIES)), 0)

    sums = np.where(is_matrix, matrices * (tiles_x * height + tiles_y * width), 0)
    lengths = sums + np.where(is_matrix, matrices * row_programs, 0)
    narrow_lengths, wide_lengths = np.where(wide, 0, lengths), np.where(wide, lengths, 0)
    partial_sums = np.where(wide, _starts(wide_lengths), _starts(narrow_lengths))
    square_partials = _starts(2 * pieces)
    workspace = Workspace([int(narrow_lengths.sum()), int(wide_lengths.sum())])
    factored = np.flatnonzero(is_matrix & is_shard)
    lines = [(matrices * height, shards.reduce_columns), (matrices * width, shards.reduce_rows)]
    totals = workspace.place(factored, wide, lines)
    means = workspace.place(factored, wide, [(matrices, shards.reduce_rows)])
    square_workspace = Workspace([int(2 * pieces.sum())])
    squares = square_workspace.place(np.flatnonzero(is_shard), 0 * wide, [(2 * shards.is_shard, shards.reduce_all)])
    row_mean_partials = partial_sums + sums
    return Plan(
        fields={
            **{"tiles_x": tiles_x, "tiles_y": tiles_y, "pieces": pieces},
            **{"rows_per_program": rows_per_program, "row_programs": row_programs},
            **{"partial_sums": partial_sums, "row_mean_partials": row_mean_partials},
            "square_partials": square_partials,
            **{"whole_numel": shards.numel, "whole_height": shards.height, "whole_width": shards.width},
            **dict(zip(("row_totals", "column_totals"), totals.starts)),
            "row_means": np.where(is_shard, means.starts[0], row_mean_partials),
            "row_means_count": np.where(is_shard, 1, row_programs),
            "square_totals": np.where(is_shard, squares.starts[0], square_partials),
            "square_totals_count": np.where(is_shard, 1, pieces),
        },
        pieces=pieces,
        matrix_pieces=np.where(kind == VECTOR.value, 0, pieces),
        averages=np.where(is_shard, 0, averages),
        shard_averages=np.where(is_shard, averages, 0),
        shard_matrices=np.where(is_matrix & is_shard, matrices, 0),
        whole=np.where(is_shard, 1, np.minimum(numel, 1)),
        in_float64=wide,
        partial_sums=(workspace.ends[0], workspace.ends[1]),
        square_partials=square_workspace.ends[0],
        shards=shards,
        segments={"sums": totals.segments, "means": means.segments, "squares": squares.segments},
    )


def _ceil(a: np.ndarray, b: int | np.ndarray) -> np.ndarray:
    return -(-a // b)


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(lengths) - lengths
    return starts
