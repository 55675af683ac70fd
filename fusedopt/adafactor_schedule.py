"""A schedule that sets nothing, but shows the learning rate that Adafactor uses."""

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fusedopt import checks
from fusedopt.adafactor import Adafactor
from fusedopt.schedules.checks import refuse_other_kind
from fusedopt.wrappers import unwrapped_optimizer


def _one(step: int) -> float:
    return 1.0


class AdafactorSchedule(LambdaLR):
    """Shows the rate that `Adafactor` uses where schedules show theirs: in `get_last_lr()` and `group["lr"]`.

    It is for trainers and loggers that ask a schedule for the learning rate, of an optimizer that finds its own. The
    rate of a group is the one that the last update of its first updated parameter used, parameter scale included, and
    `initial_lr` before that. Reading it does not synchronise: for parameters on a GPU it is a 0-d tensor there (of the
    first parameter that has state), else a float.

    With relative steps `group["lr"]` shows the rate, and the optimizer never reads it. A learning rate given by hand
    (`relative_step=False`) stays in `group["lr"]`; `get_last_lr()` shows it multiplied by the parameter scale.

    Departures from the original, which reads the gradients to find out which parameters were updated and always writes
    `group["lr"]`:

    - Gradients that are cleared before `step()` change nothing; in the original, `initial_lr` comes back.
    - A learning rate given by hand stays; in the original it becomes `initial_lr`, and is then multiplied by the
      parameter scale at every step.
    - A group without gradients shows its last rate; the original raises a ValueError, or with older torch shows the
      rates of other groups.
    - Gradients that exist before the first step raise no KeyError.
    - `step()` before `optimizer.step()` gives no warning, since nothing is missed.

    Args:
        optimizer: the `Adafactor` to read, or Accelerate's or Lightning's wrapper around it.
        initial_lr: rate to show before the first update, finite and >= 0.

    Raises:
        TypeError: the optimizer is not a `fusedopt.Adafactor`.
        ValueError: `initial_lr` is out of range.

    Source: transformers 4.34, `optimization.py`.

    Example:
        >>> import fusedopt, torch
        >>> w = torch.nn.Parameter(torch.full((2, 2), 0.5))
        >>> optimizer = fusedopt.Adafactor([w])
        >>> schedule = AdafactorSchedule(optimizer)
        >>> schedule.get_last_lr()
        [0.0]
        >>> w.grad = torch.ones(2, 2)
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> schedule.step()
        >>> schedule.get_last_lr()
        [0.005]
    """

    optimizer: Adafactor

    def __init__(self, optimizer: Adafactor, initial_lr: float = 0.0) -> None:
        optimizer = unwrapped_optimizer(optimizer)
        if not isinstance(optimizer, Adafactor):
            raise TypeError(
                f"AdafactorSchedule reads the rates of a fusedopt.Adafactor, got {type(optimizer).__name__}; other "
                "optimizers have the schedules of get_scheduler"
            )
        initial_lr = checks.plain(initial_lr)
        checks.finite_non_negative("initial_lr", initial_lr)
        self.initial_lr = initial_lr
        # LambdaLR reads its base rates from this key; those of another schedule of this optimizer are put back.
        theirs = [group.pop("initial_lr", None) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["initial_lr"] = initial_lr
        super().__init__(optimizer, _one)
        for group, rate in zip(optimizer.param_groups, theirs):
            group.pop("initial_lr")
            if rate is not None:
                group["initial_lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Returns the present rate of each group."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Reads the rates of the optimizer; call it after `optimizer.step()`."""
        self._step_count += 1
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr):
            if group["relative_step"]:
                group["lr"] = rate

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the number of steps and the rates shown last; `initial_lr` stays.

        Raises:
            ValueError: the state is that of another kind of schedule.
        """
        refuse_other_kind(self, state_dict, "lr_lambdas")
        if any(state_dict["lr_lambdas"]):
            refuse_other_kind(self, state_dict, "initial_lr")
        given = {"lr_lambdas", "base_lrs", "initial_lr"}
        self.__dict__.update({key: value for key, value in state_dict.items() if key not in given})

    def _rate(self, group: dict[str, Any]) -> float | Tensor:
        for p in group["params"]:
            state = self.optimizer.state.get(p)
            if state and (p.device.type != "cpu" or state["step"].item() > 0.0):
                return self.optimizer.rate_in(group, p, self.initial_lr)
        return self.initial_lr


def get_adafactor_schedule(optimizer: Adafactor, initial_lr: float = 0.0) -> AdafactorSchedule:
    """Returns an `AdafactorSchedule`; the function of transformers.

    Example:
        >>> import fusedopt, torch
        >>> optimizer = fusedopt.Adafactor([torch.nn.Parameter(torch.ones(2))])
        >>> get_adafactor_schedule(optimizer, initial_lr=1e-3).get_last_lr()
        [0.001]
    """
    return AdafactorSchedule(optimizer, initial_lr)
