"""Unwraps the optimizers of Accelerate and Lightning: users pass on what `prepare()` and `self.optimizers()` return."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The innermost optimizer, on which hooks, state and options are; what wraps no optimizer is returned as it is."""
    while isinstance(optimizer, Optimizer) and isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def unwrapped_scheduler(scheduler: Any) -> Any:
    """The innermost scheduler; what wraps no scheduler is returned as it is."""
    while not isinstance(scheduler, LRScheduler) and hasattr(inner := getattr(scheduler, "scheduler", None), "step"):
        scheduler = inner
    return scheduler
