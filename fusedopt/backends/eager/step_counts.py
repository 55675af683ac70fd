"""Step counts on the eager backend: many 0-d tensors advanced in place, since others may hold them, by few calls."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.precision import COUNTS

_ITEMSIZE = COUNTS.itemsize


Advanced = tuple[list[float], Callable[[], object]]
"""The counts plus one, and what writes them, which takes no memory."""


def advanced(steps: Sequence[Tensor]) -> Advanced:
    """Returns every count plus one, and what advances them. On a device other than the CPU this synchronises.

    Thousands of counts in one storage, as a step makes them, are advanced in one operation; those in a storage of their
    own, as loading or sharing leaves them, one by one.

    Args:
        steps: 0-d float64 tensors on one device.
    """
    if not steps or steps[0].device.type != "cpu":
        return _each(steps)
    at = np.array(list(map(Tensor.data_ptr, steps)), np.int64)
    flat, start = _storage_of(steps[0])
    places = (at - start) // _ITEMSIZE
    if places.min() < 0 or places.max() >= len(flat):
        return _by_storage(steps, at)
    return _in_one(flat, places)


def _by_storage(steps: Sequence[Tensor], at: np.ndarray) -> Advanced:
    counts = np.empty(len(steps))
    single: list[int] = []
    writing: list[Callable[[], object]] = []
    order = np.argsort(at, kind="stable")
    done = 0
    while done < len(order):
        first = order[done]
        flat, start = _storage_of(steps[first])
        end = int(np.searchsorted(at, start + len(flat) * _ITEMSIZE, sorter=order))
        which = order[done:end]
        if len(which) == 1:
            single.append(int(first))
        else:
            counts[which], write = _in_one(flat, (at[which] - start) // _ITEMSIZE)
            writing.append(write)
        done = end
    counts[single], write = _each([steps[i] for i in single])
    writing.append(write)
    new: list[float] = counts.tolist()
    return new, lambda: [write() for write in writing]


def _in_one(flat: Tensor, places: np.ndarray) -> Advanced:
    first, count = int(places[0]), len(places)
    if np.array_equal(places, np.arange(first, first + count)):
        some = flat[first : first + count]
        return (some + 1).tolist(), lambda: some.add_(1)
    index, ones = torch.from_numpy(places), torch.ones(count, dtype=flat.dtype, device="cpu")
    return flat.index_add(0, index, ones)[index].tolist(), lambda: flat.index_add_(0, index, ones)


def _each(steps: Sequence[Tensor]) -> Advanced:
    if not steps:
        return [], lambda: None
    some, one = list(steps), torch.ones((), dtype=steps[0].dtype, device=steps[0].device)
    counts: list[float] = (torch.stack(some) + one).tolist()
    return counts, lambda: torch._foreach_add_(some, one)


def _storage_of(step: Tensor) -> tuple[Tensor, int]:
    """Returns the whole storage of `step` as counts, and its address."""
    storage = step.untyped_storage()
    flat = torch.empty(0, dtype=COUNTS, device="cpu").set_(storage, 0, (storage.nbytes() // _ITEMSIZE,), (1,))
    return flat, storage.data_ptr()
