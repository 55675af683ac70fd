"""What an update is given at a time, so that it stays in the cache: small tensors joined, large ones cut."""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from fusedopt.backends.scratch import scratch
from fusedopt_kernels.layout import is_dense, same_layout

Columns = Sequence[list[Tensor]]
"""Parameters, gradients, and a list for each state; a state that is not used has an empty one."""


class Piece(NamedTuple):
    """Tensors that are updated together.

    Attributes:
        which: the rows.
        start: the first element, of a flat piece of a tensor; else 0.
        columns: the tensors.
    """

    which: Sequence[int]
    start: int
    columns: Columns

    @property
    def sizes(self) -> list[int]:
        """Elements of each row."""
        return list(map(Tensor.numel, self.columns[0]))


def alike(columns: Columns) -> list[Sequence[int]]:
    """The rows, those of the same dtypes together."""
    dtypes = list(zip(*[map(attrgetter("dtype"), column) for column in columns if column]))
    if len(set(dtypes)) == 1:  # thousands are common
        return [range(len(dtypes))]
    rows: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, own in enumerate(dtypes):
        rows.setdefault(own, []).append(i)
    return list(rows.values())


def pieces(columns: Columns, which: Sequence[int], size: int, *, in_order: bool = False) -> Iterator[Piece]:
    """These rows of the columns, up to `size` elements at a time; those without elements are left out.

    Small tensors come together, as they are; of large ones of one layout come flat pieces, in which a step may not
    know them; of other large ones whole tensors. With `in_order`, tensors that are not contiguous come alone and whole.
    """
    # Other rows of a column may have None.
    rows = columns if len(which) == len(columns[0]) else [[c[i] for i in which] for c in columns if c]
    in_order = in_order and not all(all(map(Tensor.is_contiguous, column)) for column in rows)
    sizes = list(map(Tensor.numel, columns[0]))
    some: list[int] = []
    elements = 0
    for i in which:
        numel = sizes[i]
        if not numel:
            continue
        alone = in_order and not all(column[i].is_contiguous() for column in columns if column)
        if alone or 2 * numel >= size:
            one = [column[i : i + 1] for column in columns]
            yield from [Piece([i], 0, one)] if alone else _flat_pieces(i, one, size)
            continue
        if elements + numel > size:
            yield _together(columns, some)
            some, elements = [], 0
        some.append(i)
        elements += numel
    if some:
        yield _together(columns, some)


def _together(columns: Columns, some: list[int]) -> Piece:
    return Piece(some, 0, [[column[j] for j in some] if column else [] for column in columns])


def _flat_pieces(i: int, one: Columns, size: int) -> Iterator[Piece]:
    (p,), *others = one
    if not is_dense(p) or not all(same_layout(t, p) for column in others for t in column):
        yield Piece([i], 0, one)
        return
    cut = [t.as_strided((t.numel(),), (1,)).split(size) for column in one for t in column]
    used = [bool(column) for column in one]
    for k, tensors in enumerate(zip(*cut)):
        rest = iter(tensors)
        yield Piece([i], k * size, [[next(rest)] if here else [] for here in used])


def joined(tensors: list[Tensor]) -> Tensor:
    """A copy of several tensors; one is returned itself."""
    return tensors[0] if len(tensors) == 1 else _flatten_dense_tensors(tensors)


class Joined(NamedTuple):
    """Tensors of one dtype that are worked on as one.

    Attributes:
        tensors: what they are.
        whole: a flat copy of all of them; of a single one, itself.
        each: a view of `whole` for each.
    """

    tensors: list[Tensor]
    whole: Tensor
    each: list[Tensor]

    @classmethod
    def of(cls, tensors: list[Tensor], use: str) -> "Joined":
        """Joins some tensors; on a CPU in memory that the next ones for this use get."""
        if len(tensors) == 1:
            return cls(tensors, tensors[0], tensors)
        first = tensors[0]
        if first.device.type == "cpu":
            whole, each = scratch.row(tensors, use, first.dtype)
        else:
            whole = first.new_empty(sum(map(Tensor.numel, tensors)))
            each = [own.view(t.shape) for own, t in zip(whole.split(list(map(Tensor.numel, tensors))), tensors)]
        torch._foreach_copy_(each, tensors)
        return cls(tensors, whole, each)

    def write(self, values: Tensor) -> None:
        """Writes values, laid out as `whole` or `whole` itself, into the tensors."""
        if values.data_ptr() != self.whole.data_ptr():  # else they are there
            self.whole.copy_(values)
        if len(self.tensors) > 1:
            torch._foreach_copy_(self.tensors, self.each)
