"""Errors that say that there is no memory left."""

_TEXTS = ("can't allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """True for those of Python, of torch's devices, and of torch's allocator on the CPU, which has no class of its own.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
        True
        >>> is_out_of_memory(RuntimeError("shapes do not fit"))
        False
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # without importing torch
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
