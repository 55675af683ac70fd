"""The two schedulers that follow a metric instead of the step: reduce on plateau, and greedy.

Both are stepped with the metric, `scheduler.step(loss)`. They decide on the host, so a metric on a GPU is copied from
there; pass a number that you have read anyway. A learning rate that is a tensor is only ever written, in place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, SupportsFloat

import torch
from torch.optim import Optimizer

from fusedopt.schedules import checks

__all__ = ["GreedyLR", "ReduceLROnPlateau", "get_greedy_schedule", "get_reduce_on_plateau_schedule"]


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's `ReduceLROnPlateau`, except that it reduces a learning rate that is a tensor without reading it.

    It multiplies the learning rate by `factor` whenever a metric has stopped improving. Arguments, defaults and
    checkpoints are those of torch. A run that goes on from a checkpoint follows the arguments given now; with torch's
    class it follows those of the checkpoint.

    Raises:
        ValueError: The factor is 1 or more, the mode is unknown, an argument is not a number, or `min_lr` is above the
            rate, which could never be reduced to it, or is a list without one number per param group.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     scheduler.step(loss)
        >>> scheduler.get_last_lr()
        [0.5]
    """

    _progress: ClassVar[tuple[str, ...]] = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
    """The entries of a state that describe a run; the others are arguments."""

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: list[float] | float = 0,
        eps: float = 1e-8,
    ) -> None:
        factor, patience = checks.number("factor", factor), _count("patience", patience)
        threshold, cooldown = checks.number("threshold", threshold), _count("cooldown", cooldown)
        eps = checks.number("eps", eps)
        groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else []
        low = _per_group("min_lr", min_lr, len(groups))
        for index, (group, lowest) in enumerate(zip(groups, low)):
            # "lr" may be 0 now, at the start of a warm-up.
            rates = [group[key] for key in ("lr", "initial_lr") if group.get(key) is not None]
            if rates and all(checks.is_above(lowest, rate) for rate in rates):
                raise ValueError(
                    f"min_lr must not be above the rate, got {lowest} for param group {index} with "
                    f"lr={max(map(float, rates))}: it would never be reduced"
                )
        plain_low = low if isinstance(min_lr, (list, tuple)) or not low else low[0]
        super().__init__(
            optimizer, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr=plain_low, eps=eps
        )

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Takes in a metric, and reduces the learning rate if it is time to.

        Raises:
            ValueError: a param group was added or removed, and `min_lr` is a list; nothing was changed.
        """
        if len(self.min_lrs) != len(self.optimizer.param_groups):
            lowest: Any = getattr(self, "default_min_lr", None)  # the one number that was given for all groups
            if lowest is None:
                checks.refuse_changed_groups(
                    len(self.min_lrs), self.optimizer, "give min_lr as one number, or make a new one"
                )
            self.min_lrs = [lowest] * len(self.optimizer.param_groups)
        super().step(metrics, epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the progress of a run; the scheduler keeps its arguments.

        Raises:
            ValueError: the state is that of another kind of scheduler, or of another `mode`; nothing was changed.
        """
        greedy = () if "num_good_epochs" in self._progress else ("num_good_epochs",)
        checks.refuse_other_kind(self, state_dict, self._progress[1], without=greedy)
        if state_dict.get("mode", self.mode) != self.mode:
            raise ValueError(
                f"the best metric of the state was found with mode={state_dict['mode']!r}, and mode is {self.mode!r} "
                "now: make the scheduler with the mode that was saved, or leave the state out"
            )
        self.__dict__.update({key: state_dict[key] for key in self._progress if key in state_dict})

    def _reduce_lr(self, epoch: int) -> None:
        groups = self.optimizer.param_groups
        if not any(isinstance(group["lr"], torch.Tensor) for group in groups):
            super()._reduce_lr(epoch)
            return
        for group, min_lr in zip(groups, self.min_lrs, strict=True):
            lr = group["lr"]
            if isinstance(lr, torch.Tensor):
                before = lr.double()
                reduced = (before * self.factor).clamp(min=min_lr)
                lr.copy_(torch.where(before - reduced > self.eps, reduced, before))
            elif lr - max(lr * self.factor, min_lr) > self.eps:
                group["lr"] = max(lr * self.factor, min_lr)


def get_reduce_on_plateau_schedule(optimizer: Optimizer, **kwargs: Any) -> ReduceLROnPlateau:
    """Returns `ReduceLROnPlateau(optimizer, **kwargs)`; call `step(metric)` after every evaluation.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> get_reduce_on_plateau_schedule(optimizer, patience=3).patience
        3
    """
    return ReduceLROnPlateau(optimizer, **kwargs)


class GreedyLR(ReduceLROnPlateau):
    """Raises the learning rate while a metric improves, lowers it while it does not.

    After more than `patience` better metrics in a row the rate is divided by `factor`, up to `max_lr`; after more than
    `patience` others it is multiplied by `factor`, down to `min_lr`. After `reset_start` attempts to lower it with all
    groups already at `min_lr`, everything starts over from the initial rates. As in the original, a rate that starts
    below `min_lr` is never lowered.

    It is a torch `ReduceLROnPlateau` only so that trainers step it with a metric; it shares none of its behaviour. A
    run that goes on from a checkpoint follows the arguments given now; in the original, those of the checkpoint.

    Source: GreedyLR (https://arxiv.org/abs/2512.14527) and `GreedyLR` of transformers 5.

    Args:
        optimizer: Any torch optimizer.
        mode: "min" if a smaller metric is better, "max" if a larger one is.
        factor: Below 1.
        patience: Number of metrics in a row that change nothing yet.
        threshold: By how much a metric must beat the best one to count as better.
        threshold_mode: "abs" (`threshold` is a difference) or "rel" (a share of the best one).
        cooldown: Number of metrics that are ignored after a reduction.
        warmup: Number of metrics that are ignored after an increase.
        min_lr: Lowest rate, one number or one per param group.
        max_lr: Highest rate, one number or one per param group.
        eps: Smaller changes of the rate are not made.
        verbose: Print every change.
        smooth: Compare the average of the last `window_size` metrics.
        window_size: See `smooth`.
        reset_start: See above.

    Raises:
        ValueError: The factor is not between 0 and 1, a mode is unknown, a list has the wrong length, a `min_lr` is
            above its `max_lr`, an argument is not a number, or a count is negative.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = GreedyLR(optimizer, factor=0.5, patience=0)
        >>> for loss in (3.0, 2.0, 2.0):
        ...     scheduler.step(loss)
        ...     print(scheduler.get_last_lr())
        [0.2]
        [0.4]
        [0.2]
    """

    _last_lr: list[float]  # type: ignore[assignment]
    _progress = (
        *("best", "num_good_epochs", "num_bad_epochs", "cooldown_counter", "warmup_counter", "last_epoch"),
        *("_last_lr", "_init_lrs"),
    )

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: str = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float | Sequence[float] = 1e-3,
        max_lr: float | Sequence[float] = 1.0,
        eps: float = 1e-8,
        verbose: bool = False,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
    ) -> None:
        factor = checks.number("factor", factor)
        if factor >= 1.0:
            raise ValueError(f"factor must be < 1, got {factor}; it lowers the rate, its inverse raises it")
        if factor <= 0.0:
            raise ValueError(f"factor must be > 0, got {factor}; the rate is divided by it")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(f"threshold_mode must be 'rel' or 'abs', got {threshold_mode!r}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"GreedyLR drives a torch optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.mode, self.threshold, self.threshold_mode = mode, checks.number("threshold", threshold), threshold_mode
        self.factor, self.patience = factor, _count("patience", patience)
        self.cooldown, self.warmup = _count("cooldown", cooldown), _count("warmup", warmup)
        self.min_lrs = _per_group("min_lr", min_lr, len(optimizer.param_groups))
        self.max_lrs = _per_group("max_lr", max_lr, len(optimizer.param_groups))
        for low, high in zip(self.min_lrs, self.max_lrs):
            if low > high:
                raise ValueError(f"min_lr must not be above max_lr, got min_lr={low} and max_lr={high}")
        self.eps, self.verbose = checks.number("eps", eps), verbose
        self.smooth, self.window_size = smooth, _count("window_size", window_size)
        if smooth and self.window_size < 1:
            raise ValueError(f"window_size must be >= 1 to smooth over, got {window_size}")
        self.reset_start_original = _count("reset_start", reset_start)
        self.last_epoch = 0
        # The only time that rates that are tensors are read; from here on _last_lr holds them.
        self._init_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._last_lr = list(self._init_lrs)
        self._reset()

    def _reset(self) -> None:
        self.best = float("inf") if self.mode == "min" else float("-inf")
        self.num_bad_epochs = self.num_good_epochs = 0
        self.cooldown_counter = self.warmup_counter = 0
        self.reset_start = self.reset_start_original
        self._window: list[float] = []
        self._window_sum = 0.0

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Takes in a metric, and changes the learning rate if it is time to.

        Args:
            metrics: The metric, a number or anything `float()` takes.
            epoch: The number of this call. Default: one more than the last.

        Raises:
            ValueError: A param group was added or removed; nothing was changed.
        """
        checks.refuse_changed_groups(
            len(self.min_lrs), self.optimizer, "make a new one; add groups before the scheduler"
        )
        if isinstance(metrics, str):
            raise ValueError(f"metrics must be a number, got {metrics!r}")
        current = self._smoothed(float(metrics))
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        for i, group in enumerate(self.optimizer.param_groups):
            if not isinstance(group["lr"], torch.Tensor):
                self._last_lr[i] = group["lr"]
        if self.cooldown_counter > 0 or self.warmup_counter > 0:
            if self.cooldown_counter > 0:
                self.cooldown_counter -= 1
            else:
                self.warmup_counter -= 1
            self.num_bad_epochs = self.num_good_epochs = 0
            return
        if self._is_better(current, self.best):
            self.best = current
            self.num_good_epochs, self.num_bad_epochs = self.num_good_epochs + 1, 0
        else:
            self.num_good_epochs, self.num_bad_epochs = 0, self.num_bad_epochs + 1
        if self.num_good_epochs > self.patience:
            self.num_good_epochs = 0
            self.warmup_counter = self.warmup
            self.reset_start = self.reset_start_original
            self._set([min(lr / self.factor, high) for lr, high in zip(self._last_lr, self.max_lrs)], rising=True)
        elif self.num_bad_epochs > self.patience:
            self._lower()

    def _lower(self) -> None:
        self._set([max(lr * self.factor, low) for lr, low in zip(self._last_lr, self.min_lrs)], rising=False)
        if all(lr <= low for lr, low in zip(self._last_lr, self.min_lrs)):
            self.reset_start -= 1
            if self.reset_start <= 0:
                self._reset()
                self._write(self._init_lrs)
        # As in the original these are set after a reset too, so that a cooldown follows it.
        self.num_bad_epochs = 0
        self.cooldown_counter = self.cooldown

    def _set(self, wanted: list[float], rising: bool) -> None:
        def changed(old: float, new: float) -> bool:
            return (new - old if rising else old - new) > self.eps

        rates = [new if changed(old, new) else old for old, new in zip(self._last_lr, wanted)]
        if rates == self._last_lr:
            return
        if self.verbose:
            print(f"metric {self.last_epoch}: learning rates {self._last_lr} -> {rates}")
        self._write(rates)

    def _write(self, rates: list[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = list(rates)

    def _smoothed(self, metric: float) -> float:
        if not self.smooth:
            return metric
        # A running sum, as in the original: after a NaN it stays NaN until a reset.
        self._window = [*self._window, metric]
        self._window_sum += metric
        if len(self._window) > self.window_size:
            self._window_sum -= self._window.pop(0)
        return self._window_sum / len(self._window)

    def _is_better(self, current: float, best: float) -> bool:
        margin = self.threshold if self.mode == "max" else -self.threshold
        to_beat = best * (1.0 + margin) if self.threshold_mode == "rel" else best + margin
        better: bool = current > to_beat if self.mode == "max" else current < to_beat
        return better

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """Returns the learning rates after the last step, one per param group, as Python floats."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the optimizer: settings, counters and rates, as plain Python values."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the progress of a run, and writes its learning rates to the optimizer.

        Args:
            state_dict: A `state_dict`, ours or that of transformers.

        Raises:
            ValueError: As `ReduceLROnPlateau`, or the state is for another number of param groups.
        """
        checks.refuse_other_groups(len(self.min_lrs), state_dict.get("_last_lr", self.min_lrs))
        super().load_state_dict(state_dict)
        average = state_dict.get("_streaming_avg") or {"values": state_dict.get("_window", [])}
        self._window = list(average["values"])
        # Older checkpoints have no sum.
        self._window_sum = float(average.get("sum", state_dict.get("_window_sum", sum(self._window))))
        left, of = state_dict.get("reset_start"), state_dict.get("reset_start_original")
        if left is not None and of is not None:
            self.reset_start = self.reset_start_original - (of - left)
        self._write(self._last_lr)


def get_greedy_schedule(optimizer: Optimizer, **kwargs: Any) -> GreedyLR:
    """Returns `GreedyLR(optimizer, **kwargs)`; call `step(metric)` after every optimizer step or evaluation.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> get_greedy_schedule(optimizer, patience=3).get_last_lr()
        [0.1]
    """
    return GreedyLR(optimizer, **kwargs)


def start_over(scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau, optimizer: Optimizer) -> Any:
    """Returns a scheduler with the same settings that has seen no metric yet, for an optimizer with as many groups."""
    fresh = copy.copy(scheduler)
    fresh.optimizer = optimizer
    if isinstance(fresh, GreedyLR):
        fresh._init_lrs = [group["lr"] for group in optimizer.param_groups]
        fresh._last_lr = list(fresh._init_lrs)
    fresh._reset()
    return fresh


def _per_group(name: str, value: float | Sequence[float], num_groups: int) -> list[float]:
    if not isinstance(value, (list, tuple)):
        return [checks.number(name, value)] * num_groups
    if len(value) != num_groups:
        raise ValueError(f"{name} must be one number or {num_groups}, one per param group, got {len(value)} numbers")
    return [checks.number(f"{name}[{index}]", one) for index, one in enumerate(value)]


def _count(name: str, value: float) -> int:
    return checks.non_negative(name, value)  # type: ignore[return-value]  # fractions are compared as they are
