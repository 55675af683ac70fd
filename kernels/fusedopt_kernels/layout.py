"""How a tensor lies in memory: whether it fills its span, and whether two elements share a place."""

from torch import Tensor


def _dimensions(t: Tensor) -> list[tuple[int, int]]:
    return sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size > 1)


def is_dense(t: Tensor) -> bool:
    """True if the elements fill one block of memory, each once, in any order of dimensions."""
    if t.numel() == 0:
        return True
    expected = 1
    for stride, size in _dimensions(t):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if two tensors of one shape keep the same element at the same offset."""
    return all(s == t for s, t, size in zip(a.stride(), b.stride(), a.shape) if size > 1)


def overlaps_itself(t: Tensor) -> bool:
    """True if two indices may name one element: a stride is not longer than the span of the dimensions below it."""
    if t.numel() == 0:
        return False
    span = 0
    for stride, size in _dimensions(t):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False
