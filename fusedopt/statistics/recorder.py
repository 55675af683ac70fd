"""A history of statistics, kept beside the training that it watches and without waiting for its device."""

from __future__ import annotations

import math
from collections import deque
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.graphs import capturing, on_device
from fusedopt.files import save_figure
from fusedopt.optimizer.base import FusedOptimizer
from fusedopt.statistics.findings import QUANTITIES
from fusedopt.statistics.measured import MeasuredParameters
from fusedopt.statistics.values import Statistics
from fusedopt.wrappers import unwrapped_optimizer
from fusedopt_kernels.memory import lasting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UPDATE = QUANTITIES.index("update_norm")


class Writer(Protocol):
    """What a recorder needs of a `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class _OnItsWay:
    """The statistics of a step that the host has not seen yet, and to which rows of the history they belong."""

    def __init__(self, step: int, rows: list[int], tensor: Tensor) -> None:
        self.step = step
        self.rows = rows
        self._host, self._event = _sent(tensor)

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def values(self) -> np.ndarray:
        """Returns the statistics, float64 [parameters, quantities]; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


def _sent(tensor: Tensor) -> tuple[Tensor, Any]:
    """Returns where on the host a tensor will be, and an event that says when; None if it is there already."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    host = lasting(tensor.shape, tensor.dtype, "cpu", pinned=True)
    with on_device(tensor.device):
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


class StatisticsRecorder:
    """Keeps a history of `optimizer.statistics`, one entry per measured step, and never waits for the device.

    A hook of the optimizer sends the statistics of each measured step to pinned memory; they are read at a later step,
    when they have arrived. Only `steps`, `history`, `skipped`, `plot`, `close` and what uses them wait for the rest.
    Replays of a CUDA graph do not run Python: call `record()` after each.

    The history has at most `limit` entries, of 4 bytes per parameter and quantity: when it is full, every second entry
    is dropped, and from then on half as many are added. So it always spans the whole run; of the first `limit` measured
    steps it has all, of 10,000 every sixteenth. Skipped steps are counted whether or not their entry was dropped.

    A parameter keeps its row and its name when groups are edited: one that joins gets a row of its own, and one that
    left keeps what was measured of it.

    A copy of the optimizer, or one that was pickled, has no recorder.

    If the writer raises, its error comes out of the `step()` that had something to write, after the update. The history
    is whole; the scalars of that step that were not written yet are left out, and the writer gets the next ones.

    Args:
        optimizer: an optimizer of this package with `track_statistics`, or Accelerate's or Lightning's wrapper of one.
        writer: gets every quantity of every measured step as a scalar called "update_to_weight/<parameter>" and so on,
            also of those that the history drops: a `torch.utils.tensorboard.SummaryWriter`, or anything else with
            `add_scalar(tag, value, step)`. In a run of several processes, give it to one of them.
        limit: how many entries the history has at most, 2 or more.
        first_step: the number of the next step: 0, or where a resumed run goes on.

    Raises:
        ValueError: the optimizer has no statistics, or a number is out of range.

    Example:
        >>> import fusedopt, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = fusedopt.AdamW(model.named_parameters(), lr=0.01, track_statistics=2)
        >>> recorder = fusedopt.StatisticsRecorder(optimizer)
        >>> for _ in range(6):
        ...     model(torch.ones(3)).sum().backward()
        ...     optimizer.step()
        >>> recorder.steps.tolist()
        [0, 2, 4]
        >>> recorder.history.shape  # entries, parameters, quantities
        (3, 2, 6)
        >>> figure = recorder.plot()
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, writer: Writer | None = None, limit: int = 1000, first_step: int = 0
    ) -> None:
        inner = unwrapped_optimizer(optimizer)
        if not isinstance(inner, FusedOptimizer):
            raise ValueError(f"the optimizer must be one of fusedopt's, got {type(inner).__name__}: only they measure")
        if inner.statistics is None:
            raise ValueError(
                f"this {type(inner).__name__} measures nothing: construct it with track_statistics=True, or with "
                "track_statistics=N to measure every N-th step"
            )
        for name, value, least in (("limit", limit, 2), ("first_step", first_step, 0)):
            if isinstance(value, str) or not least <= value < math.inf or int(value) != value:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value}")
        self.optimizer = inner
        self.writer = writer
        self.limit = int(limit)
        self.parameters = MeasuredParameters(inner)
        self._statistics: Statistics = inner.statistics
        self._next_step = int(first_step)
        self._seen = inner.tracker.measured_steps
        self._on_their_way: deque[_OnItsWay] = deque()
        self._to_write: deque[tuple[int, np.ndarray]] = deque()
        # The history: of every `_stride`-th measured step its number and values, and how many steps up to the next
        # entry were skipped.
        self._stride = 1
        self._arrived = 0
        self._steps: list[int] = []
        self._values: list[np.ndarray] = []
        self._skipped: list[int] = []
        self._hook = inner.register_step_post_hook(lambda *_: self._after_step())

    def record(self, step: int | None = None) -> None:
        """Records the present statistics as those of one more step, for a step that does not run Python.

        Args:
            step: its number; None for the one after the last.
        """
        self._record(self._next_step if step is None else step)

    def close(self) -> None:
        """Waits for all that was measured, gives it to the writer, and removes the hook; the history stays."""
        self._hook.remove()
        self._receive(wait=True)

    @property
    def names(self) -> list[str]:
        """The parameters' names, in the order in which the optimizer got them, those that left it included."""
        self.parameters.rows()
        return self.parameters.names

    @property
    def quantities(self) -> tuple[str, ...]:
        """The names of the columns of `history`."""
        return QUANTITIES

    @property
    def steps(self) -> np.ndarray:
        """The numbers of the steps in the history, int64 [entries]; they begin with `first_step`."""
        self._receive(wait=True)
        return np.array(self._steps, np.int64)

    @property
    def history(self) -> np.ndarray:
        """The statistics of these steps, float32 [entries, parameters, quantities].

        NaN in all quantities of a parameter without a gradient, or which the optimizer did not have at that step.
        """
        self._receive(wait=True)
        history = np.full((len(self._values), len(self.names), len(QUANTITIES)), np.nan, np.float32)
        for entry, values in zip(history, self._values):
            entry[: len(values)] = values
        return history

    @property
    def skipped(self) -> np.ndarray:
        """How many measured steps changed no weight, from each entry up to the next, int64 [entries].

        Steps that the optimizer or a GradScaler skipped, or with a rate of 0.
        """
        self._receive(wait=True)
        return np.array(self._skipped, np.int64)

    def to_dict(self) -> dict[str, np.ndarray]:
        """The history by column: "step", "grad_norm/<parameter>" and so on, [entries] each; fits a pandas.DataFrame."""
        history = self.history
        columns = {
            f"{quantity}/{name}": history[:, row, column]
            for column, quantity in enumerate(QUANTITIES)
            for row, name in enumerate(self.names)
        }
        return {"step": self.steps, **columns}

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draws the update-to-weight ratio and the gradient norm of every parameter over the steps.

        Args:
            path: where to save the picture, too; its ending says in which format.

        Returns:
            The figure of matplotlib, made without pyplot; see `plot_statistics`.
        """
        from fusedopt.statistics.plotting import plot_statistics

        figure = plot_statistics(self)
        if path is not None:
            save_figure(figure, path)
        return figure

    def _after_step(self) -> None:
        if any(capturing(p.device) for group in self.optimizer.param_groups for p in group["params"]):
            # A capture is not a step, and a copy made in it would be part of the graph.
            self._seen = self.optimizer.tracker.measured_steps
            return
        if self._seen != self.optimizer.tracker.measured_steps:
            self._record(self._next_step)
        else:
            self._next_step += 1
            self._receive()

    def _record(self, step: int) -> None:
        self._seen = self.optimizer.tracker.measured_steps
        self._next_step = step + 1
        self._on_their_way.append(_OnItsWay(step, self.parameters.rows(), self._statistics.tensor))
        self._receive()

    def _receive(self, wait: bool = False) -> None:
        """Reads what has arrived, in the order of the steps; with `wait`, everything. Then the writer may raise."""
        while self._on_their_way and (wait or self._on_their_way[0].arrived()):
            first = self._on_their_way.popleft()
            values = np.full((len(self.parameters.names), len(QUANTITIES)), np.nan)
            values[first.rows] = first.values()
            self._keep(first.step, values)
            if self.writer is not None:
                self._to_write.append((first.step, values))
        while self.writer is not None and self._to_write:
            self._write(self.writer, *self._to_write.popleft())

    def _keep(self, step: int, values: np.ndarray) -> None:
        measured = values[~np.isnan(values).all(axis=1)]
        skipped = len(measured) > 0 and not measured[:, _UPDATE].any()
        if self._arrived % self._stride == 0 and len(self._steps) == self.limit:
            self._stride *= 2
            self._steps, self._values = self._steps[::2], self._values[::2]
            ends = range(0, self.limit, 2)
            self._skipped = [sum(self._skipped[end : end + 2]) for end in ends]
        if self._arrived % self._stride == 0:
            self._steps.append(step)
            with np.errstate(over="ignore"):
                self._values.append(values.astype(np.float32))
            self._skipped.append(0)
        self._skipped[-1] += int(skipped)
        self._arrived += 1

    def _write(self, writer: Writer, step: int, values: np.ndarray) -> None:
        for name, row in zip(self.parameters.names, values.tolist()):
            if not np.isnan(row).all():
                for quantity, value in zip(QUANTITIES, row):
                    writer.add_scalar(f"{quantity}/{name}", value, step)
