"""Records the learning rates that a training run used, at every optimizer step and without slowing it down."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from fusedopt.schedules.checks import number
from fusedopt.wrappers import unwrapped_optimizer

# Rates that are tensors are stacked in blocks of this many: on a GPU even the smallest tensor takes 512 bytes.
_BLOCK = 1024


class _Column:
    """The rates of one param group. Tensors are copied on their device and are read only by `read()`."""

    def __init__(self, group: dict[str, Any], first_row: int) -> None:
        self.initial = _copied(group.get("initial_lr", group["lr"]))
        self.first_row = first_row
        self._blocks: list[torch.Tensor] = []
        self._recent: list[Any] = []

    def append(self, lr: Any) -> None:
        self._recent.append(lr)
        if len(self._recent) == _BLOCK:
            self._blocks.append(_stacked(self._recent))
            self._recent = []

    def read(self) -> np.ndarray:
        blocks = [*self._blocks, _stacked(self._recent)]
        return np.concatenate([np.full(self.first_row, np.nan), *(block.double().cpu().numpy() for block in blocks)])


def _copied(lr: Any) -> Any:
    if isinstance(lr, torch.Tensor):
        return lr.detach().clone()
    return float("nan") if lr is None else float(lr)


def _stacked(lrs: list[Any]) -> torch.Tensor:
    if lrs and all(isinstance(lr, torch.Tensor) for lr in lrs):
        return torch.stack([lr.reshape(()) for lr in lrs])
    return torch.tensor([float(lr) for lr in lrs], dtype=torch.float64, device="cpu")


class LRRecorder:
    """Records the learning rate that every `optimizer.step()` used, for each param group.

    It uses the step hooks of the optimizer; a step that raised is not recorded. Rates that are tensors are copied on
    their device, and read when `rates` is asked for. Replays of a CUDA graph do not run Python: call `note()` before
    each. `verify_schedule` and `plot_verification` compare the record with a schedule.

    Args:
        optimizer: Any torch optimizer, or Accelerate's or Lightning's wrapper around one.
        first_step: The number of optimizer steps before these: 0, or that of the checkpoint from which a run goes on.

    Raises:
        ValueError: `first_step` is negative, or not a whole number.

    Example:
        >>> from fusedopt.schedules import get_linear_schedule_with_warmup
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = get_linear_schedule_with_warmup(optimizer, 2, 4)
        >>> recorder = LRRecorder(optimizer)
        >>> for _ in range(4):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> recorder.rates.tolist()
        [[0.0], [0.5], [1.0], [0.5]]
    """

    def __init__(self, optimizer: Optimizer, first_step: int = 0) -> None:
        before = number("first_step", first_step)
        if before < 0 or before != int(before):
            raise ValueError(
                f"first_step must be a whole number >= 0, got {before}; it counts the optimizer steps before these"
            )
        self.optimizer = optimizer = unwrapped_optimizer(optimizer)
        self.first_step = int(before)
        self._length = 0
        self._columns: list[_Column] = []
        self._used: list[Any] | None = None
        self._skipped = _Column({"lr": 0.0}, 0)  # not 0 for a step that a GradScaler or the optimizer skipped
        self._overflow: Any = 0.0
        self._skipped_before: Any = None
        self._see_new_groups()
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def _see_new_groups(self) -> None:
        for group in self.optimizer.param_groups[len(self._columns) :]:
            self._columns.append(_Column(group, self._length))

    def _before_step(self) -> None:
        # A capture is not a step, and copies made in it would be part of the graph and change with every replay.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._used = None if capturing else [_copied(group["lr"]) for group in self.optimizer.param_groups]
        if not capturing:
            # A GradScaler sets this on optimizers that skip steps by themselves.
            overflow = getattr(self.optimizer, "found_inf", None)
            self._overflow = 0.0 if overflow is None else _copied(overflow)
            self._skipped_before = self._skips_so_far()

    def _skips_so_far(self) -> Any:
        """Returns the number of steps that the optimizer has skipped by itself, None if it is unknown."""
        numbers = getattr(getattr(self.optimizer, "skipped_steps", None), "tensor", None)
        return None if numbers is None else numbers.sum()

    def _after_step(self) -> None:
        if self._used is None:
            return
        skipped, now = self._overflow, self._skips_so_far()
        if now is not None:
            skipped = skipped + now - (0.0 if self._skipped_before is None else self._skipped_before)
        self._append(self._used, skipped)

    def _append(self, lrs: list[Any], skipped: Any = 0.0) -> None:
        self._skipped.append(skipped)
        self._see_new_groups()
        for column, lr in zip(self._columns, lrs):
            column.append(lr)
        self._length += 1

    def note(self) -> None:
        """Records the present rates as those of one more step, for a step that does not run Python."""
        self._append([_copied(group["lr"]) for group in self.optimizer.param_groups])

    def close(self) -> None:
        """Removes the hooks; the record stays."""
        for hook in self._hooks:
            hook.remove()

    def __len__(self) -> int:
        return self._length

    @property
    def steps(self) -> np.ndarray:
        """The numbers of the recorded steps, int64: `first_step`, `first_step + 1`, ..."""
        return np.arange(self.first_step, self.first_step + self._length)

    @property
    def rates(self) -> np.ndarray:
        """The recorded rates, float64 of shape [steps, param groups]; NaN if a group was not there, or had no rate."""
        return np.stack([column.read() for column in self._columns], axis=1)

    @property
    def skipped(self) -> np.ndarray:
        """True for steps that changed nothing, bool of shape [steps]: overflows that the optimizer itself skips."""
        skipped: np.ndarray = self._skipped.read() != 0.0
        return skipped

    @property
    def initial_rates(self) -> np.ndarray:
        """The rate of each param group that the factors of a schedule multiply, float64."""
        return np.array([float(column.initial) for column in self._columns])

    @property
    def precision(self) -> float:
        """The relative spacing of the rates: that of float64, or of the dtype of their tensors."""
        dtypes = [getattr(column.initial, "dtype", torch.float64) for column in self._columns]
        return max(torch.finfo(dtype).eps for dtype in dtypes)
