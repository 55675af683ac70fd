"""Rows: tensors that a kernel goes through element by element, read anew at every step.

Anything may have moved since the last step: gradients that were dropped and made again, parameters after `model.to()`
or `p.data = ...`, states that were away on the host. Hence every address is read at every step, and what is derived
from a tensor is derived again where it is another one. Lists and arrays, no object per row: the host's time per step is
what thousands of small parameters cost.
"""

from collections.abc import Callable, Sequence
from operator import call, is_
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.triton.rounding import Rounding
from fusedopt.precision import COUNTS
from fusedopt_kernels.layout import is_dense, same_layout
from fusedopt_kernels.table import address_column, addresses, are_aligned, dtype_codes, launch_keys

Column = Sequence[Tensor | None]
"""One tensor per row, or None."""

Remembered = list[Callable[[], Tensor | None]]
"""A column, empty for one without tensors. They are not kept alive: states that go to the host, or are deleted, free
their memory at once, not after the next step."""

_ITEMSIZES = np.array([0, 2, 2, 4, 8, 2])  # by dtype code


def without_gaps(p: Tensor) -> Tensor:
    """p, or memory for its elements in the same order without gaps."""
    return p if is_dense(p) else torch.empty_like(p)


class Rows:
    """One row per parameter: itself, its gradient, and its states of the same shape.

    Attributes:
        addresses: int64 [rows, columns], in the order parameter, gradient, states; 0 for no tensor.
        numel: int64 [rows].
        keys: int64 [rows], the launch class. A missing gradient counts as aligned and of the dtype seen last, so that
            the class stays what it was.
    """

    addresses: np.ndarray
    numel: np.ndarray
    keys: np.ndarray

    def __init__(self) -> None:
        # Parameters are kept: another one must not get the id of one that is gone, by which a step is recognised, and
        # `torch.utils.swap_tensors`, as `model.to()` may call it, takes no tensor with weak references.
        self._params: list[Tensor] = []
        self._seen: list[Remembered] = []  # states
        self._lay_at = np.empty((0, 0), np.int64)
        self._dtypes: list[list[torch.dtype | None]] = []
        self._codes: list[np.ndarray] = []
        self._contiguous_states: list[bool] = []
        self._fit = False
        self._in_place = False  # no row is copied
        self._sizes = np.empty(0, np.int64)  # what must be multiples of 16 besides addresses, joined by "or"
        self._classes = np.empty(0, np.int64)  # as keys, of rows that are not aligned
        self._counts: Remembered = []
        self._counts_at: list[int] = []
        self._updated = np.empty((0, 0), np.int64)
        self.keys = np.empty(0, np.int64)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._grad_copies: list[Tensor] = []  # held until the kernel is queued: their memory must not be given away

    def refresh(
        self,
        params: Sequence[Tensor],
        grads: Column,
        *states: Column,
        like: Callable[[int], Tensor] | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """Takes the tensors of this step.

        `like`: for the place of a parameter, a tensor that lies in memory as the kernel wants that row to, itself if
        possible. Default: without gaps.

        Where a tensor does not lie in memory as its parameter does, or the parameter has gaps, the kernel gets a copy.
        `rounding`: of the rows. Default: to nearest.

        In the place of states that do not exist yet there may be any tensor of their dtype, such as the parameter.

        Raises:
            RuntimeError: a dtype is not supported, a state is not of its parameter's size or on another device, or two
                parameters that would be updated share memory.
        """
        columns: list[Column] = [params, grads, *states]
        lay_at = np.array(list(map(address_column, columns)), np.int64)
        numel = np.array([p.numel() for p in params], np.int64)
        self._refresh_dtypes(columns)
        if not self._are_as_before(columns, lay_at, numel):
            self._fit = _all_fit(params, grads, states)
            self._contiguous_states = [
                all(t is None or t.is_contiguous() for t in row[1:]) for row in zip(params, *states)
            ]
        self._params, self._seen, self._lay_at, self.numel = list(params), list(map(_remembered, states)), lay_at, numel
        self._copies, self._grad_copies = [], []
        strided = [
            i
            for i, (p, g, contiguous) in enumerate(zip(params, grads, self._contiguous_states))
            if g is not None and not (contiguous and p.is_contiguous() and g.is_contiguous())
        ]
        self._in_place = not strided
        at = lay_at.copy() if strided else lay_at
        for i in strided:
            like_row = like(i) if like else without_gaps(params[i])
            at[:, i] = addresses(self._laid_out(like_row, [column[i] for column in columns]))
        rounding = rounding or Rounding.to_nearest(len(params))
        position_bits = rounding.position_bits()
        self._sizes = self.numel | position_bits
        unaligned = np.zeros(len(params), bool)
        self._classes = launch_keys(self._codes, unaligned, rounding.kinds, position_bits != 0)
        self._lie(at)
        self._refuse_shared_memory()

    def follow(self, grads: Column) -> bool:
        """Takes these gradients, and else the tensors of the last step, wherever all of them lie now.

        All must be of the type, dtype, size and strides that they were of at the last `refresh`, and missing gradients
        in the same places. Returns False where kernels got copies, which only `refresh` makes; nothing is done then.

        Raises:
            RuntimeError: two parameters that would be updated share memory.
        """
        if not self._in_place:
            return False
        lay_at, columns = self._lay_at, (self._params, grads, *map(_recalled, self._seen))
        now = [address_column(column) if column else last for column, last in zip(columns, lay_at)]
        self._lay_at = np.array(now)
        self._lie(self._lay_at)
        if not np.array_equal(lay_at[0], self._lay_at[0]):
            self._refuse_shared_memory()
        return True

    def _lie(self, at: np.ndarray) -> None:
        """Takes addresses, int64 [columns, rows], and what depends on them: `keys` stays the same array if it can."""
        self.addresses = at.T
        keys = self._classes | are_aligned(np.vstack([at, self._sizes]).T)
        if not np.array_equal(keys, self.keys):
            self.keys = keys

    def update_classes(self, rounding: Rounding) -> np.ndarray:
        """As `keys`, whatever the alignment is: of parameters, gradients, and the first two columns of states.

        A missing second one counts as having the dtype of the arithmetic.
        """
        param, grad, master, average = self._codes[:4]
        narrow, wide = dtype_codes([torch.float32, torch.float64])
        average = np.where(average == 0, np.where(param == wide, wide, narrow), average)
        unaligned = np.zeros(len(self.numel), bool)
        sharded = rounding.position_bits() != 0
        return launch_keys([param, grad, master, average], unaligned, rounding.kinds, sharded)

    def counts(self, steps: Column) -> list[int]:
        """Addresses of step counts, one per row.

        Raises:
            RuntimeError: a count is not a float64 tensor on its parameter's device.
        """
        at = addresses(steps)
        if at != self._counts_at or not _same(steps, self._counts):
            for p, step in zip(self._params, steps):
                if step is not None and (step.dtype, step.device) != (COUNTS, p.device):
                    raise RuntimeError(
                        f"a step count is {step.dtype} on {step.device}: it must be a float64 tensor on {p.device}, as "
                        "init_state() and load_state_dict() make it"
                    )
            self._counts, self._counts_at = _remembered(steps), at
        return at

    def last_counts(self) -> np.ndarray:
        """`counts` of those seen last, wherever they lie now."""
        return address_column(_recalled(self._counts))

    def copy_back(self) -> None:
        """Brings what the kernel wrote into copies to where it belongs."""
        for original, copy in self._copies:
            original.copy_(copy)
        self._copies, self._grad_copies = [], []

    def _refresh_dtypes(self, columns: list[Column]) -> None:
        dtypes = [[None if t is None else t.dtype for t in column] for column in columns]
        last_seen = self._dtypes[1] if self._dtypes and self._are_same_params(columns[0]) else dtypes[0]
        dtypes[1] = [last if dtype is None else dtype for dtype, last in zip(dtypes[1], last_seen)]
        if dtypes != self._dtypes:
            self._codes = [dtype_codes(column) for column in dtypes]
            self._dtypes = dtypes

    def _are_as_before(self, columns: list[Column], lay_at: np.ndarray, numel: np.ndarray) -> bool:
        """True if sizes and strides of the states need not be checked again."""
        return (
            self._fit
            and self._are_same_params(columns[0])
            and all(map(_same, columns[2:], self._seen))
            and np.array_equal(lay_at[2:], self._lay_at[2:])
            and np.array_equal(numel, self.numel)
        )

    def _are_same_params(self, params: Column) -> bool:
        return len(params) == len(self._params) and all(map(is_, params, self._params))

    def _laid_out(self, like: Tensor, row: list[Tensor | None]) -> list[Tensor | None]:
        """A row, with copies of what does not lie as the kernel wants it to."""
        for column, t in enumerate(row):
            if t is not None and not same_layout(t, like):
                row[column] = copy = torch.empty_like(like, dtype=t.dtype).copy_(t)
                if column == 1:  # Gradients are not written.
                    self._grad_copies.append(copy)
                else:
                    self._copies.append((t, copy))
        return row

    def _refuse_shared_memory(self) -> None:
        rows = np.flatnonzero((self.addresses[:, 1] != 0) & (self.numel > 0))
        starts = self.addresses[rows, 0]
        updated = np.stack([rows, starts, starts + self.numel[rows] * _ITEMSIZES[self._codes[0][rows]]])
        if np.array_equal(updated, self._updated):
            return
        row, start, end = updated[:, np.argsort(starts)]
        shared = np.flatnonzero(end[:-1] > start[1:])
        if len(shared):
            one, other = (tuple(self._params[i].shape) for i in row[shared[0] : shared[0] + 2])
            raise RuntimeError(
                f"two parameters, of shapes {one} and {other}, share memory and both have a gradient: they would be "
                "updated twice, in any order; give the optimizer one of them, and add the gradients"
            )
        self._updated = updated


def _all_fit(params: Sequence[Tensor], grads: Column, states: Sequence[Column]) -> bool:
    """True if states fit their parameters, which may have been given other data, or have moved, and the states not.

    Raises for a parameter with a gradient; the kernels leave the others alone.
    """
    fit = True
    for column in states:
        for p, g, t in zip(params, grads, column):
            if t is not None and (t.numel() != p.numel() or t.device != p.device):
                if g is None:
                    fit = False
                    continue
                raise RuntimeError(
                    f"a state of shape {tuple(t.shape)} on {t.device} belongs to a parameter of shape "
                    f"{tuple(p.shape)} on {p.device}: let it follow its parameter, or delete optimizer.state[parameter]"
                )
    return fit


def _remembered(column: Column) -> Remembered:
    if all(t is None for t in column):
        return []
    return [_no_tensor if t is None else ref(t) for t in column]


def _recalled(column: Remembered) -> list[Any]:
    """Returns the tensors, None in the place of one that is no more."""
    return list(map(call, column))


def _no_tensor() -> None:
    return None


def _same(a: Column, b: Remembered) -> bool:
    """True if these are the tensors; None is the same as one that is no more, which addresses tell apart."""
    if not b:
        return all(t is None for t in a)
    return len(a) == len(b) and all(map(is_, a, map(call, b)))
