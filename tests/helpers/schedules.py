"""For tests of schedules: one schedule of each kind, and optimizers with learning rates and nothing to train."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt import schedules
from fusedopt.schedules import example_arguments, get_scheduler

# For values computed on Python floats in the order of the original; what remains is the difference of two libms.
RTOL = 1e-13

CLOSED_FORMS = {
    "constant": schedules.ConstantSchedule(),
    "constant_with_warmup": schedules.ConstantWithWarmupSchedule(5),
    "linear": schedules.LinearSchedule(5, 40),
    "cosine": schedules.CosineSchedule(5, 40),
    "cosine_with_restarts": schedules.CosineWithRestartsSchedule(5, 40, num_cycles=3),
    "polynomial": schedules.PolynomialSchedule(5, 40, lr_init=0.1, lr_end=0.001, power=1.7),
    "inverse_sqrt": schedules.InverseSqrtSchedule(5, timescale=12),
    "cosine_with_min_lr": schedules.CosineWithMinLRSchedule(5, 40, min_lr_rate=0.1),
    "cosine_warmup_with_min_lr": schedules.CosineWarmupWithMinLRSchedule(5, 40, min_lr_rate=0.1, warmup_lr_rate=0.2),
    "warmup_stable_decay": schedules.WarmupStableDecaySchedule(5, 9, 40, warmup_type="1-sqrt", decay_type="1-sqrt"),
}
METRIC_DRIVEN = ("reduce_lr_on_plateau", "greedy")
EVERY_NAME = [*CLOSED_FORMS, *METRIC_DRIVEN]


def sgd(*lrs: float | torch.Tensor, default: float | torch.Tensor = 0.1, **extra: list[float]) -> torch.optim.SGD:
    """Returns an optimizer with one param group per learning rate."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs or (default,)]
    for key, values in extra.items():
        for group, value in zip(groups, values):
            group[key] = value
    return torch.optim.SGD(groups, lr=default)


def by_name(name: str, optimizer: torch.optim.Optimizer, num_training_steps: int = 40) -> Any:
    specific = example_arguments(name, num_training_steps, lr=0.1)
    return get_scheduler(name, optimizer, 5, num_training_steps, scheduler_specific_kwargs=specific)


def advance(scheduler: Any, metric: float = 1.0) -> None:
    scheduler.optimizer.step()
    scheduler.step(*[metric] if isinstance(scheduler, (schedules.GreedyLR, schedules.ReduceLROnPlateau)) else [])


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


class NoReading(TorchDispatchMode):
    """Fails on what copies the value of a tensor to the host: item(), float(), bool(), tolist(), to(device)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read"
        assert func is not torch.ops.aten._to_copy.default or "device" not in (kwargs or {}), "a tensor was moved"
        return func(*args, **(kwargs or {}))
