"""The functions that give an optimizer a schedule, with the names and signatures of transformers.

Each returns a `ScheduleLR`, torch's `LambdaLR` around an object of `fusedopt.schedules.forms`. A learning rate that is
a tensor stays the same tensor, filled in place and never read by a step, so a scheduler may drive an optimizer step
captured in a CUDA graph.

Positional order, defaults and values are those of transformers 4.34 and 5, with these departures: negative counts and
parameters that are not finite are refused; where the original divides by zero, a rate is defined (see
`PolynomialSchedule` and `InverseSqrtSchedule`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fusedopt.schedules import checks, forms
from fusedopt.schedules.base import Schedule

__all__ = [
    "ScheduleLR",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_wsd_schedule",
]


class ScheduleLR(LambdaLR):
    """torch's `LambdaLR` around a `Schedule`.

    Like the schedules of transformers, whose states load too, it goes on from a state with its own arguments: the state
    says which step was reached, from which initial rates.
    """

    lr_lambdas: list[Schedule]  # type: ignore[assignment]

    def step(self, epoch: int | None = None) -> None:
        """Sets the rates of the next step.

        Raises:
            ValueError: a param group was added or removed; nothing was changed.
        """
        checks.refuse_changed_groups(
            len(self.base_lrs),
            self.optimizer,
            f"make a new one, with last_epoch={self.last_epoch - 1} to go on from here (then every group needs its "
            '"initial_lr")',
        )
        super().step(epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the step that was reached and the initial rates; the schedule keeps its arguments.

        Raises:
            ValueError: the state is that of another kind of schedule, or for another number of param groups; nothing
                was changed.
        """
        checks.refuse_other_kind(self, state_dict, "lr_lambdas", without=("initial_lr",))
        checks.refuse_other_groups(len(self.lr_lambdas), state_dict["lr_lambdas"])
        for schedule, saved in zip(self.lr_lambdas, state_dict["lr_lambdas"]):
            checks.refuse_other_schedule(vars(schedule), saved or {})
        super().load_state_dict({**state_dict, "lr_lambdas": [None] * len(self.lr_lambdas)})


def _drive(optimizer: Optimizer, schedule: Schedule, last_epoch: int) -> LambdaLR:
    last_epoch = int(checks.number("last_epoch", last_epoch))
    for index, group in enumerate(optimizer.param_groups):
        if group["lr"] is None:
            raise ValueError(
                f"param group {index} has lr=None, so there is no rate to schedule; give the optimizer an lr "
                "(Adafactor: with relative_step=False), or leave its rate to the optimizer itself"
            )
    return ScheduleLR(optimizer, schedule, last_epoch)


def _initial_rate(optimizer: Optimizer) -> Any:
    """Returns the learning rate that the optimizer was made with."""
    lr = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        # A tensor is shared by defaults and groups, and an earlier scheduler may have filled it with another rate.
        if isinstance(lr, torch.Tensor) and group["lr"] is lr and "initial_lr" in group:
            lr = group["initial_lr"]
    if lr is None:
        raise ValueError("the optimizer has lr=None, so there is no initial rate to start from; give it an lr")
    return lr


def _min_lr_rate(optimizer: Optimizer, min_lr: float | None, min_lr_rate: float | None) -> float:
    if min_lr is not None and min_lr_rate is not None:
        raise ValueError(f"min_lr={min_lr} and min_lr_rate={min_lr_rate} exclude each other; give one of them")
    if min_lr_rate is not None:
        return _not_above_1("min_lr_rate", min_lr_rate)
    if min_lr is None:
        raise ValueError("min_lr and min_lr_rate are both missing; give one of them")
    min_lr, rate = checks.number("min_lr", min_lr), _initial_rate(optimizer)
    initial_lr = float(rate)
    if initial_lr == 0:
        raise ValueError("min_lr is no share of an initial learning rate of 0; give min_lr_rate instead")
    if checks.is_above(min_lr, rate):
        raise ValueError(f"min_lr must not be above the initial learning rate {initial_lr}, got {min_lr}")
    return min_lr / initial_lr


def _not_above_1(name: str, share: float) -> float:
    share = checks.number(name, share)
    if share > 1:
        raise ValueError(f"{name} must be <= 1, got {share}; the minimum is above the initial rate")
    return share


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    """Drives an optimizer with a `ConstantSchedule`: its learning rate, unchanged.

    Args:
        optimizer: Any torch optimizer.
        last_epoch: The last scheduler step of the run that goes on, -1 for a new run. If a run goes on, every param
            group needs its "initial_lr" (KeyError), and the first rate is that of step `last_epoch + 1`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_constant_schedule(optimizer).get_last_lr()
        [0.5]
    """
    return _drive(optimizer, forms.ConstantSchedule(), last_epoch)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: float, last_epoch: int = -1) -> LambdaLR:
    """Drives an optimizer with a `ConstantWithWarmupSchedule`: from 0 to the initial rate, then unchanged.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        last_epoch: See `get_constant_schedule`.

    Raises:
        ValueError: A count is missing or negative; the same in all functions here.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_constant_schedule_with_warmup(optimizer, 10).get_last_lr()
        [0.0]
    """
    return _drive(optimizer, forms.ConstantWithWarmupSchedule(num_warmup_steps), last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: float, num_training_steps: float, last_epoch: int = -1
) -> LambdaLR:
    """Drives an optimizer with a `LinearSchedule`: from 0 to the initial rate and back to 0, in straight lines.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        num_training_steps: Length of the whole training; the rate is 0 from there on.
        last_epoch: See `get_constant_schedule`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=10)
        >>> optimizer.step(); scheduler.step()
        >>> scheduler.get_last_lr()
        [0.25]
    """
    return _drive(optimizer, forms.LinearSchedule(num_warmup_steps, num_training_steps), last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Drives an optimizer with a `CosineSchedule`: warm-up, then a cosine wave, by default half a wave down to 0.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        num_training_steps: Length of the whole training. Past it the wave goes on.
        num_cycles: Number of full waves.
        last_epoch: See `get_constant_schedule`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_cosine_schedule_with_warmup(optimizer, 0, 10).get_last_lr()
        [0.5]
    """
    return _drive(optimizer, forms.CosineSchedule(num_warmup_steps, num_training_steps, num_cycles), last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 1,
    last_epoch: int = -1,
) -> LambdaLR:
    """Drives an optimizer with a `CosineWithRestartsSchedule`: warm-up, then `num_cycles` half cosine waves down to 0.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        num_training_steps: Length of the whole training; the rate is 0 from there on.
        num_cycles: Number of descents.
        last_epoch: See `get_constant_schedule`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 0, 10, num_cycles=3).get_last_lr()
        [0.5]
    """
    schedule = forms.CosineWithRestartsSchedule(num_warmup_steps, num_training_steps, num_cycles)
    return _drive(optimizer, schedule, last_epoch)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Drives an optimizer with a `PolynomialSchedule`: warm-up, then a polynomial decay to `lr_end`.

    As in the original, `lr_end` is compared with the optimizer's default rate: a param group with another rate ends at
    its own share, `lr_end * lr / default lr`.

    Args:
        optimizer: Any torch optimizer with an "lr" among its defaults.
        num_warmup_steps: Length of the warm-up.
        num_training_steps: Length of the whole training; the rate is `lr_end` from there on.
        lr_end: The last rate, below the optimizer's.
        power: Exponent of the decay, 1 for a straight line.
        last_epoch: See `get_constant_schedule`.

    Raises:
        ValueError: As `PolynomialSchedule`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_polynomial_decay_schedule_with_warmup(optimizer, 0, 10, lr_end=0.1).lr_lambdas[0](10)
        0.2
    """
    schedule = forms.PolynomialSchedule(
        num_warmup_steps, num_training_steps, float(_initial_rate(optimizer)), lr_end, power
    )
    return _drive(optimizer, schedule, last_epoch)


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: float, timescale: float | None = None, last_epoch: int = -1
) -> LambdaLR:
    """Drives an optimizer with an `InverseSqrtSchedule`: warm-up, then a rate of one over the square root of the step.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        timescale: Steps in which the rate falls by sqrt(2). Default: the length of the warm-up, or 10,000 without one.
        last_epoch: See `get_constant_schedule`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_inverse_sqrt_schedule(optimizer, 0).lr_lambdas[0](30_000)
        0.5
    """
    return _drive(optimizer, forms.InverseSqrtSchedule(num_warmup_steps, timescale), last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> LambdaLR:
    """Drives an optimizer with a `CosineWithMinLRSchedule`: warm-up, then a cosine wave that ends at a minimum above 0.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        num_training_steps: Length of the whole training. Past it the wave goes on.
        num_cycles: Number of full waves.
        last_epoch: See `get_constant_schedule`.
        min_lr: The minimum as a rate; it becomes a share of the optimizer's default rate for all param groups.
        min_lr_rate: The minimum as a share of the initial rate. Exactly one of the two must be given.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, 10, min_lr=0.05).lr_lambdas[0](10)
        0.1
    """
    rate = _min_lr_rate(optimizer, min_lr, min_lr_rate)
    schedule = forms.CosineWithMinLRSchedule(num_warmup_steps, num_training_steps, rate, num_cycles)
    return _drive(optimizer, schedule, last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> LambdaLR:
    """Drives an optimizer with a `CosineWarmupWithMinLRSchedule`: a warm-up from above 0, and one step ahead.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        num_training_steps: Length of the whole training; its last step, `num_training_steps - 1`, uses the minimum.
        num_cycles: Number of full waves.
        last_epoch: See `get_constant_schedule`.
        min_lr: The minimum as a rate; it becomes a share of the optimizer's default rate for all param groups.
        min_lr_rate: The minimum as a share of the initial rate. Exactly one of the two must be given.
        warmup_lr_rate: Where the warm-up starts, as a share of the initial rate. Default: `1 / num_warmup_steps`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_cosine_with_min_lr_schedule_with_warmup_lr_rate(optimizer, 10, 100, min_lr_rate=0.1).get_last_lr()
        [0.05]
    """
    rate = _min_lr_rate(optimizer, min_lr, min_lr_rate)
    schedule = forms.CosineWarmupWithMinLRSchedule(
        num_warmup_steps, num_training_steps, rate, num_cycles, warmup_lr_rate
    )
    return _drive(optimizer, schedule, last_epoch)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_decay_steps: float,
    num_training_steps: float | None = None,
    num_stable_steps: float | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Drives an optimizer with a `WarmupStableDecaySchedule`: warm-up, a stable phase at the initial rate, and a decay.

    Args:
        optimizer: Any torch optimizer.
        num_warmup_steps: Length of the warm-up.
        num_decay_steps: Length of the decay.
        num_training_steps: Length of all three phases.
        num_stable_steps: Length of the stable phase, instead of `num_training_steps`; used if both are given, with a
            UserWarning.
        warmup_type: Shape of the warm-up: "linear", "cosine" or "1-sqrt".
        decay_type: Shape of the decay, from the same three.
        min_lr_ratio: Where warm-up starts and decay ends, as a share of the initial rate.
        num_cycles: Number of full waves of a cosine decay.
        last_epoch: See `get_constant_schedule`.

    Raises:
        ValueError: As `WarmupStableDecaySchedule`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> get_wsd_schedule(optimizer, 10, 20, num_training_steps=100).lr_lambdas[0](50)
        1.0
    """
    schedule = forms.WarmupStableDecaySchedule(
        num_warmup_steps,
        num_decay_steps,
        num_training_steps,
        num_stable_steps,
        warmup_type,
        decay_type,
        _not_above_1("min_lr_ratio", min_lr_ratio),
        num_cycles,
    )
    return _drive(optimizer, schedule, last_epoch)
