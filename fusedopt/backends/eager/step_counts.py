"""Step counts on the eager backend: many 0-d tensors advanced in place, since others may hold them, by few calls."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.precision import COUNTS

_ITEMSIZE = COUNTS.itemsize


def advance(steps: Sequence[Tensor]) -> list[float]:
    """Adds one to every count and returns the new counts. On a device other than the CPU this synchronises.

    Thousands of counts in one storage, as a step makes them, are advanced in one operation; those in a storage of their
    own, as loading or sharing leaves them, one by one.

    Args:
        steps: 0-d float64 tensors on one device.
    """
    if not steps or steps[0].device.type != "cpu":
        return _advance_each(steps)
    at = np.array(list(map(Tensor.data_ptr, steps)), np.int64)
    flat, start = _storage_of(steps[0])
    places = (at - start) // _ITEMSIZE
    if places.min() < 0 or places.max() >= len(flat):
        return _advance_by_storage(steps, at)
    return _advance_in(flat, places)


def _advance_by_storage(steps: Sequence[Tensor], at: np.ndarray) -> list[float]:
    counts = np.empty(len(steps))
    single: list[int] = []
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
            counts[which] = _advance_in(flat, (at[which] - start) // _ITEMSIZE)
        done = end
    counts[single] = _advance_each([steps[i] for i in single])
    new: list[float] = counts.tolist()
    return new


def _advance_in(flat: Tensor, places: np.ndarray) -> list[float]:
    first, count = int(places[0]), len(places)
    if np.array_equal(places, np.arange(first, first + count)):
        some = flat[first : first + count]
        some += 1
        return some.tolist()
    index = torch.from_numpy(places)
    flat.index_add_(0, index, torch.ones(count, dtype=COUNTS, device="cpu"))
    return flat[index].tolist()


def _advance_each(steps: Sequence[Tensor]) -> list[float]:
    if not steps:
        return []
    torch._foreach_add_(list(steps), torch.ones((), dtype=COUNTS, device=steps[0].device))
    counts: list[float] = torch.stack(list(steps)).tolist()
    return counts


def _storage_of(step: Tensor) -> tuple[Tensor, int]:
    """Returns the whole storage of `step` as counts, and its address."""
    storage = step.untyped_storage()
    flat = torch.empty(0, dtype=COUNTS, device="cpu").set_(storage, 0, (storage.nbytes() // _ITEMSIZE,), (1,))
    return flat, storage.data_ptr()
