"""What torch.distributed.checkpoint wants of an optimizer that it calls, which it does not say."""

import sys
from types import FrameType


def torch_looks_at_state() -> bool:
    """True if the current step is one of torch.distributed.checkpoint, which only wants to see the state.

    Where an optimizer has no state, it calls `step()` with zero gradients and rates of 0, which would still count, and
    move the weights of optimizers that make their own rate. A first step of a warm-up on gradients that happen to be
    zero looks the same, so the caller tells them apart.
    """
    return _checkpointing() is not None


def _checkpointing() -> FrameType | None:
    """The function of torch.distributed.checkpoint that called, if one did."""
    module = "torch.distributed.checkpoint.state_dict"
    frame = sys._getframe(1) if module in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame


def torch_gathers_state() -> bool:
    """True if torch.distributed.checkpoint asks for whole tensors of a sharded state (`full_state_dict=True`)."""
    frame = _checkpointing()
    return frame is not None and getattr(frame.f_locals.get("info"), "full_state_dict", False) is True
