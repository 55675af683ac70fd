"""Memory that outlives the step that makes it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


@contextmanager
def _normally() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def outside_inference_mode() -> AbstractContextManager[None]:
    """Makes tensors that can be written to later; those made in `torch.inference_mode()` can only be in that mode."""
    return _normally() if torch.is_inference_mode_enabled() else nullcontext()


def lasting(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, pinned: bool = False) -> Tensor:
    """Memory, not initialised, that any later step may write to."""
    with outside_inference_mode():
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
