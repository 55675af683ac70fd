"""How Adafactor cuts tensors into the pieces that programs work on, and where their sums are kept.

A tensor is of one of three kinds. A *vector* (fewer than two dimensions) has an average of squares per element and is
cut into blocks. A *matrix* is cut into tiles of some rows and columns, whose sums meet in a workspace: a giant one is
spread over the machine, and no number is added to by two programs. *Small matrices*, kernels of convolutions above all,
come by the hundred thousand: a program takes many of them, which need no workspace.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from fusedopt_kernels.adafactor_cells import MATRIX, SMALL, VECTOR
from fusedopt_kernels.adafactor_splits import Room, Segment, Splits, unsplit
from fusedopt_kernels.table import launch_class

BLOCK = 2048
"""Elements of a matrix that a program has in hand at once, 8 for each of 256 threads: two 128-bit accesses to float32.
Half of it, of a vector and of whatever 128-bit accesses do not fit, so that no kernel needs many registers."""

TILE_BYTES = 512
"""Length of a tile's rows in bytes of the gradient: a warp reads one with a 128-bit access per lane, and so adds up
rows by itself."""

TILE_HEIGHT = 256
"""Rows of a tile, read some at a time. Each tile leaves a sum per row and per column. So a float32 matrix needs a
workspace of 1/128 + 1/256 of its size, a 16-bit one of 2/256 + 2/256, since its tiles are wider and sums are float32.
Higher tiles need less, and keep fewer programs busy: a matrix of 768 x 768 has 18 such tiles in float32."""

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
"""How many programs may share the rows of a matrix that are averaged: every later program adds up what they left."""


L2_BATCH_BYTES = 0
"""An experiment: tensors are updated in batches of so many bytes of gradients, all phases of one before the next, so
that their gradients are read from the L2 cache again. 0: all at once. To be swept from 10 to 50 MB on an H200."""


class Spec(NamedTuple):
    """What a kernel is compiled for: dtypes of parameter, gradient and arithmetic, and the sizes above.

    A kernel takes each by itself, and puts them together with `as_spec`: what serializes the constants of a kernel
    (compile hooks, `JITFunction.preload`) knows dtypes and numbers, but no tuple that holds them.
    """

    param: Any
    grad: Any
    compute: Any
    block: int
    half_block: int
    tile_width: int
    tile_height: int
    lines: int
    strip: int
    means: int


def spec_of(param: Any, grad: Any, compute: Any, grad_itemsize: int) -> Spec:
    """What the kernels of a dtype class are compiled for. `param`, `grad`, `compute`: dtypes of Triton."""
    return Spec(param, grad, compute, BLOCK, BLOCK // 2, TILE_BYTES // grad_itemsize, TILE_HEIGHT, LINES, STRIP, MEANS)


@triton.constexpr_function
def as_spec(*constants: Any) -> Spec:
    """The `Spec` of a kernel's constants, inside of the kernel."""
    return Spec(*constants)


class Shapes(NamedTuple):
    """What tensors look like, int64 [tensors] each.

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
        columns: int64 [tensors, 17], the last columns of the table.
        pieces: int64 [tensors], programs that read gradients.
        matrix_pieces: int64 [tensors], the same without vectors.
        averages: int64 [tensors], programs that bring rows and columns of whole matrices up to date.
        shard_averages: int64 [tensors], the same of shards.
        shard_matrices: int64 [tensors], how many matrices a shard has.
        whole: int64 [tensors], 1 but for tensors without elements.
        in_float64: int64 [tensors], 1 where arithmetic is in float64, 0 for float32.
        batch: int64 [tensors], which are updated together; see L2_BATCH_BYTES.
        work: elements of the workspace for sums that are float32, and for those that are float64.
        squares: float64 elements of the workspace, for what becomes root mean squares.
        splits: which tensors are shards.
        segments: by phase ("sums", "means", "squares"), what is added up over processes, in this order.
    """

    columns: np.ndarray
    pieces: np.ndarray
    matrix_pieces: np.ndarray
    averages: np.ndarray
    shard_averages: np.ndarray
    shard_matrices: np.ndarray
    whole: np.ndarray
    in_float64: np.ndarray
    batch: np.ndarray
    work: tuple[int, int]
    squares: int
    splits: Splits
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


def plan_of(shapes: Shapes, keys: np.ndarray, splits: Splits | None = None) -> Plan:
    """Cuts tensors into pieces, each in a way that depends on nothing but itself.

    A matrix of h rows and w columns needs h * ceil(w / tile width) + w * ceil(h / TILE_HEIGHT) numbers of its compute
    dtype for sums, at most MEANS for what its rows' programs leave, and 16 bytes per tile; a vector or small matrices
    need 16 bytes per piece.

    Args:
        shapes: of the tensors.
        keys: int64 [tensors], the `launch_keys` of their parameters and gradients.
        splits: which of them are shards, and of what; default: none. Split matrices are no small ones.
    """
    splits = splits or unsplit(shapes.numel, shapes.height, shapes.width)
    is_split = splits.is_split > 0
    dtypes = {key: launch_class(key, 2).dtypes for key in set(keys.tolist())}
    widths = {key: TILE_BYTES // grad.itemsize for key, (_, grad) in dtypes.items() if grad is not None}
    tile_width = np.array([widths[key] for key in keys.tolist()])
    in_float64 = np.array([dtypes[key][0] is torch.float64 for key in keys.tolist()])
    kind, numel, matrices, height, width, _ = shapes
    is_matrix = (kind == MATRIX.value) & ((numel > 0) | is_split)  # rows of an empty shard have averages too
    across = _ceil(width, tile_width)
    down = _ceil(height, TILE_HEIGHT)
    pieces = np.select(
        [numel == 0, kind == MATRIX.value, kind == SMALL.value],
        [0, matrices * down * across, _ceil(matrices * height, SHARE)],
        _ceil(numel, BLOCK // 2),
    )
    span = ENTRIES * np.maximum(1, _ceil(height, ENTRIES * MEANS))
    shares = _ceil(height, span)

    sums = np.where(is_matrix, matrices * (across * height + down * width), 0)
    work = sums + np.where(is_matrix, matrices * shares, 0)
    work32, work64 = np.where(in_float64, 0, work), np.where(in_float64, work, 0)
    sums_at = np.where(in_float64, _starts(work64), _starts(work32))
    squares_at = _starts(2 * pieces)
    room = Room([int(work32.sum()), int(work64.sum())])
    wide = in_float64.astype(np.int64)
    factored = np.flatnonzero(is_matrix & is_split)
    of_lines = [(matrices * height, splits.over_columns), (matrices * width, splits.over_rows)]
    totals = room.lay_out(factored, wide, of_lines)
    means = room.lay_out(factored, wide, [(matrices, splits.over_rows)])
    kept = Room([int(2 * pieces.sum())])
    squares = kept.lay_out(np.flatnonzero(is_split), 0 * wide, [(2 * splits.is_split, splits.over_all)])
    averages = np.where(is_matrix, matrices * (shares + _ceil(width, ENTRIES)), 0)
    shards = [
        *(splits.numel, splits.height, splits.width, *totals.starts),
        np.where(is_split, means.starts[0], sums_at + sums),
        np.where(is_split, 1, shares),
        np.where(is_split, squares.starts[0], squares_at),
        np.where(is_split, 1, pieces),
    ]
    batched = L2_BATCH_BYTES and not is_split.any()
    return Plan(
        columns=np.column_stack([across, down, span, shares, pieces, sums_at, sums_at + sums, squares_at, *shards]),
        pieces=pieces,
        matrix_pieces=np.where(kind == VECTOR.value, 0, pieces),
        averages=np.where(is_split, 0, averages),
        shard_averages=np.where(is_split, averages, 0),
        shard_matrices=np.where(is_matrix & is_split, matrices, 0),
        whole=np.where(is_split, 1, np.minimum(numel, 1)),
        in_float64=wide,
        batch=_starts(numel * TILE_BYTES // tile_width) // L2_BATCH_BYTES if batched else np.zeros_like(numel),
        work=(room.ends[0], room.ends[1]),
        squares=kept.ends[0],
        splits=splits,
        segments={"sums": totals.segments, "means": means.segments, "squares": squares.segments},
    )


def _ceil(a: np.ndarray, b: int | np.ndarray) -> np.ndarray:
    return -(-a // b)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths
