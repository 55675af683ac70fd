"""The points of the curves of schedules, however they are given; `fusedopt.schedules.plotting` draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from fusedopt import checks
from fusedopt.schedules.base import StepFunction, values_at
from fusedopt.schedules.metric import GreedyLR, start_over
from fusedopt.schedules.registry import SchedulerType, get_scheduler
from fusedopt.wrappers import unwrapped_scheduler

Plottable = str | tuple[str, Mapping[str, Any]] | LambdaLR | ReduceLROnPlateau | Callable[[Any], Any]
"""A name, a name with its arguments, a scheduler, or a function of the step, such as a schedule."""

# More points than pixels help nobody, except where a curve is steep: up to _MOST_POINTS in all.
_EVEN_POINTS = 2000
_MOST_POINTS = 20_000
# Between neighbouring points a curve rises by at most this share of its height, while there are steps between them.
_SMALL_RISE = 1 / 400
# A metric-driven schedule is simulated step by step, in one second for this many.
_MOST_METRICS = 1_000_000
# A schedule is shown a little beyond its end.
_BEYOND_THE_END = 1.05


@dataclass(frozen=True, eq=False)
class Curve:
    """One learning rate over the steps.

    Attributes:
        label: A short name.
        details: Its parameters, empty if it has none.
        steps: Numbers of optimizer steps, shape [n].
        rates: Learning rates, shape [n].
        warm_up: Length of the warm-up, 0 if there is none.
        position: The step that a live scheduler has reached.
        metric: The metric at each step, shape [n], if the schedule follows one.
    """

    label: str
    details: str
    steps: np.ndarray
    rates: np.ndarray
    warm_up: float = 0
    position: int | None = None
    metric: np.ndarray | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """A schedule of which a curve is drawn; subclasses know how.

    Attributes:
        label: See `Curve`.
        details: Its parameters by name.
        initial: The initial rate, if a live scheduler has one; 1 if a function gives the rate itself.
        length: Number of steps to the end of the schedule, None if it has none.
        pace: Number of steps in which a schedule without an end changes.
    """

    label: str
    details: Mapping[str, Any] = field(default_factory=dict)
    initial: float | None = None
    length: float | None = None
    pace: float = 0

    def curve(self, num_steps: int, lr: float, metrics: Sequence[float] | None) -> Curve:
        """Returns the curve from the initial rate `lr`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class FunctionSource(Source):
    """A function from the step to a factor, or to the rate itself; `position` as in `Curve`."""

    function: Callable[[Any], Any]
    position: int | None = None

    def curve(self, num_steps: int, lr: float, metrics: Sequence[float] | None) -> Curve:
        warm_up = getattr(self.function, "num_warmup_steps", 0)
        corners = [corner for corner in (warm_up, self.length, self.position) if corner]
        steps, factors = _sampled(self.function, num_steps, corners)
        return Curve(self.label, _text(self.details), steps, factors * lr, warm_up, self.position)


@dataclass(frozen=True, eq=False, kw_only=True)
class MetricSource(Source):
    """A metric-driven scheduler; one with the same settings is simulated."""

    scheduler: ReduceLROnPlateau

    def curve(self, num_steps: int, lr: float, metrics: Sequence[float] | None) -> Curve:
        if num_steps > _MOST_METRICS:
            raise ValueError(f"num_steps must be <= {_MOST_METRICS} for a metric-driven schedule, got {num_steps}")
        metric = example_metric(num_steps) if metrics is None else np.asarray(metrics, dtype=np.float64)
        if metrics is None and self.scheduler.mode == "max":
            metric = 1.0 - metric
        simulated = start_over(self.scheduler, _optimizer([lr] * len(self.scheduler.min_lrs)))
        rates = []
        for value in metric:
            rates.append(simulated.optimizer.param_groups[0]["lr"])
            simulated.step(float(value))
        return Curve(self.label, _text(self.details), np.arange(len(metric)), np.array(rates), metric=metric)


def example_metric(num_steps: int) -> np.ndarray:
    """Returns a loss at num_steps + 1 steps that twice falls and stalls: metric-driven schedulers react to both.

    Example:
        >>> [round(float(loss), 2) for loss in example_metric(4)]
        [1.0, 0.55, 0.55, 0.1, 0.1]
    """
    quarters = 4 * np.arange(num_steps + 1) / max(1, num_steps)
    fallen = np.clip(quarters, 0, 1) + np.clip(quarters - 2, 0, 1)
    return 1.0 - 0.45 * fallen


def curves_of(
    what: Plottable | Sequence[Plottable] | Mapping[str, Plottable],
    num_steps: int | None,
    lr: float | None,
    metrics: Sequence[float] | None,
    arguments: Mapping[str, Any],
) -> tuple[list[Curve], bool]:
    """Returns the curves of `what` (see `plot_schedule`), and True if their rates are multiples of the initial rate."""
    if lr is not None:
        checks.finite_non_negative("lr", lr)
    items = _items(what)
    if arguments and not any(isinstance(item, (str, tuple)) for _, item in items):
        raise ValueError(f"{', '.join(arguments)} go with the name of a schedule, and none was given by its name")
    sources = [source for label, item in items for source in _sources(label, item, lr, arguments)]
    if not sources:
        raise ValueError("there is nothing to plot; give a schedule, a name, a scheduler, or several of them")
    live = [source.initial for source in sources if source.initial is not None]
    relative = lr is None and not live
    if num_steps is None and metrics is not None:
        num_steps = len(metrics)
    if num_steps is None:
        ends = [source.length for source in sources if source.length]
        longest = max(ends or [max(10.0 * source.pace, 100.0) for source in sources])
        num_steps = int(np.ceil(longest * _BEYOND_THE_END))
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    default = lr if lr is not None else (live[0] if live else 1.0)
    initial = [default if source.initial is None else source.initial for source in sources]
    return [source.curve(num_steps, lr, metrics) for source, lr in zip(_disambiguate(sources), initial)], relative


def _items(what: Any) -> list[tuple[str | None, Any]]:
    if isinstance(what, Mapping):
        return list(what.items())
    several = isinstance(what, (list, tuple)) and not _is_name_with_arguments(what)
    return [(None, item) for item in (what if several else [what])]


def _is_name_with_arguments(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping)


def _optimizer(lrs: Sequence[float]) -> torch.optim.Optimizer:
    """Returns an optimizer that has learning rates and nothing to train."""
    options: Any = {"dtype": torch.float32, "device": "cpu", "requires_grad": True}
    groups = [{"params": [torch.zeros((), **options)], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups, lr=lrs[0])


def _sources(label: str | None, item: Any, lr: float | None, arguments: Mapping[str, Any]) -> list[Source]:
    item = unwrapped_scheduler(item)
    if isinstance(item, str) or _is_name_with_arguments(item):
        name, own = (item, {}) if isinstance(item, str) else item
        specific = {**arguments, **own}
        warm_up, total = specific.pop("num_warmup_steps", None), specific.pop("num_training_steps", None)
        scheduler = get_scheduler(name, _optimizer([1.0 if lr is None else lr]), warm_up, total, specific)
        if isinstance(scheduler, LambdaLR):
            return [_of_function(label, scheduler.lr_lambdas[0])]
        return [replace(_of_metric(label, scheduler), initial=None, length=total)]
    if isinstance(item, LambdaLR):
        return list(_of_groups(label, item))
    if isinstance(item, ReduceLROnPlateau):
        return [_of_metric(label, item)]
    if callable(item):
        return [_of_function(label, item)]
    raise ValueError(
        f"cannot plot {item!r}; give a schedule, the name of one, a LambdaLR, ReduceLROnPlateau or GreedyLR, or a "
        "function from step to factor"
    )


def _of_function(label: str | None, function: Any) -> FunctionSource:
    if not isinstance(function, StepFunction):
        label = label or str(getattr(function, "__name__", type(function).__name__))
        return FunctionSource(label=label, pace=getattr(function, "num_warmup_steps", 0), function=function)
    return FunctionSource(
        label=label or function.label,
        details=function.parameters,
        initial=1.0 if function.is_rate else None,
        length=function.length,
        pace=function.pace,
        function=function,
    )


def _of_metric(label: str | None, scheduler: ReduceLROnPlateau) -> MetricSource:
    kind = SchedulerType.GREEDY if isinstance(scheduler, GreedyLR) else SchedulerType.REDUCE_ON_PLATEAU
    names = ("factor", "patience", "cooldown", "min_lrs", "max_lrs")
    settings = {name.rstrip("s"): getattr(scheduler, name, None) for name in names}
    return MetricSource(
        label=label or kind.value,
        details={name: np.squeeze(value).tolist() for name, value in settings.items() if value is not None},
        initial=float(scheduler.optimizer.param_groups[0]["lr"]),
        scheduler=scheduler,
    )


def _of_groups(label: str | None, scheduler: LambdaLR) -> Iterator[Source]:
    """Yields one source for each learning rate that differs from those of the groups before."""
    seen: set[tuple[int, float]] = set()
    for index, (function, base_lr) in enumerate(zip(scheduler.lr_lambdas, scheduler.base_lrs)):
        lr = float(base_lr)
        if (id(function), lr) not in seen:
            seen.add((id(function), lr))
            source = _of_function(label, function)
            name = f"{source.label}, group {index}" if index else source.label
            yield replace(source, label=name, initial=lr, position=scheduler.last_epoch)


def _text(details: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in details.items())


def _disambiguate(sources: list[Source]) -> list[Source]:
    """Returns the sources; where several have the same label, it names the parameters in which they differ."""
    named = []
    for source in sources:
        same = [other.details for other in sources if other.label == source.label]
        differing = {k: v for k, v in source.details.items() if any(other.get(k) != v for other in same)}
        named.append(replace(source, label=f"{source.label} ({_text(differing)})") if differing else source)
    return named


def _sampled(function: Any, num_steps: int, corners: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps that show the curve of a function of the step, and its values there.

    These are all steps of a short run. Of a long one they are steps at even distances, more at its beginning, where
    warm-ups are, and around the corners that are known; then gaps over which the curve is steep are halved.
    """
    if num_steps <= _EVEN_POINTS:
        steps = np.arange(num_steps + 1)
        return steps, values_at(function, steps)
    # Two combs without a common spacing: a wave that one of them takes for a line shows in the other.
    combs = [np.linspace(0, num_steps, count) for count in (_EVEN_POINTS * 3 // 5 + 1, _EVEN_POINTS * 2 // 5 - 2)]
    around = [np.floor(corner) + np.arange(-1, 3) for corner in corners]
    wanted = np.concatenate([*combs, np.geomspace(1, num_steps, _EVEN_POINTS // 5), *around])
    steps = np.unique(wanted.round().clip(0, num_steps).astype(np.int64))
    found = values_at(function, steps)
    finite = found[np.isfinite(found)]
    height = np.ptp(finite) if len(finite) else 0.0
    while True:
        rise = np.abs(np.diff(found))
        rise[~np.isfinite(rise)] = 0
        steep = np.flatnonzero((np.diff(steps) > 1) & (rise > _SMALL_RISE * height))
        room = _MOST_POINTS - len(steps)
        if not len(steep) or room <= 0:
            return steps, found
        steepest = np.sort(steep[np.argsort(-rise[steep], kind="stable")[:room]])
        between = (steps[steepest] + steps[steepest + 1]) // 2
        steps = np.insert(steps, steepest + 1, between)
        found = np.insert(found, steepest + 1, values_at(function, between))
