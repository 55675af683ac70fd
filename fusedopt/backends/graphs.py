"""CUDA devices and graphs, as far as all backends need them."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one: addresses in a table hide from Triton where a kernel has to run."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """True if the current stream of `device` is being captured into a CUDA graph."""
    with on_device(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
