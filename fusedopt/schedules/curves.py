"""From whatever names or holds schedules to the points of their curves; `fusedopt.schedules.plotting` draws them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from fusedopt import checks
from fusedopt.keras_schedules import RateSchedule
from fusedopt.schedules.registry import GreedyLR, Schedule, SchedulerType, get_scheduler
from fusedopt.wrappers import unwrapped_scheduler

MetricDriven = (GreedyLR, torch.optim.lr_scheduler.ReduceLROnPlateau)

# More points than pixels help nobody, except where a curve is steep: up to _MOST_POINTS in all.
_EVEN_POINTS = 2000
_MOST_POINTS = 20_000
# Between neighbouring points a curve rises by this share of its height at most, while there are steps between them.
_SMALL_RISE = 1 / 400
# A metric-driven schedule is simulated step by step, in a second for so many.
_MOST_METRICS = 1_000_000
# The end of a schedule is a place to see: a little of what follows is shown.
_BEYOND_THE_END = 1.05


@dataclass(frozen=True, eq=False)
class Curve:
    """One learning rate over the steps.

    Attributes:
        label: What it is, short.
        details: Its parameters, empty if it has none.
        steps: Numbers of optimizer steps, shape [n].
        rates: Learning rates, shape [n].
        warm_up: Length of the warm-up, 0 if there is none.
        position: The step that a live scheduler has come to.
        metric: Of a metric-driven scheduler the metric at each of the steps, shape [n].
    """

    label: str
    details: str
    steps: np.ndarray
    rates: np.ndarray
    warm_up: float = 0
    position: int | None = None
    metric: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """What a curve is drawn from.

    Attributes:
        label: See `Curve`.
        details: Its parameters by name.
        drive: A function from step to factor, or a metric-driven scheduler.
        initial: The initial rate, where a live scheduler has one; 1 where the function gives the rate itself.
        length: The number of steps worth showing, if it says.
        position: See `Curve`.
    """

    label: str
    details: Mapping[str, Any]
    drive: Any
    initial: float | None = None
    length: float | None = None
    position: int | None = None


def example_metric(num_steps: int) -> np.ndarray:
    """A loss that falls, stalls, falls and stalls, for num_steps + 1 steps: metric-driven schedulers react to both.

    Example:
        >>> [round(float(loss), 2) for loss in example_metric(4)]
        [1.0, 0.55, 0.55, 0.1, 0.1]
    """
    quarters = 4 * np.arange(num_steps + 1) / max(1, num_steps)
    fallen = np.clip(quarters, 0, 1) + np.clip(quarters - 2, 0, 1)
    return 1.0 - 0.45 * fallen


def curves_of(
    what: Any, num_steps: int | None, lr: float | None, metrics: Sequence[float] | None, arguments: Mapping[str, Any]
) -> tuple[list[Curve], bool]:
    """The curves of `what` (see `plot_schedule`), and whether their rates are multiples of the initial rate."""
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
        arriving = [source.length for source in sources if source.length]
        longest = max(arriving or [_long_enough(source.drive) for source in sources])
        num_steps = int(np.ceil(longest * _BEYOND_THE_END))
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    default = lr if lr is not None else (live[0] if live else 1.0)
    return [_curve(source, num_steps, default, metrics) for source in _told_apart(sources)], relative


def _items(what: Any) -> list[tuple[str | None, Any]]:
    if isinstance(what, Mapping):
        return list(what.items())
    several = isinstance(what, (list, tuple)) and not _is_named_with_arguments(what)
    return [(None, item) for item in (what if several else [what])]


def _is_named_with_arguments(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping)


def _stand_in(lrs: Sequence[float]) -> torch.optim.Optimizer:
    """An optimizer with nothing but learning rates."""
    options: Any = {"dtype": torch.float32, "device": "cpu", "requires_grad": True}
    groups = [{"params": [torch.zeros((), **options)], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups, lr=lrs[0])


def _sources(label: str | None, item: Any, lr: float | None, arguments: Mapping[str, Any]) -> list[Source]:
    item = unwrapped_scheduler(item)
    if isinstance(item, str) or _is_named_with_arguments(item):
        name, own = (item, {}) if isinstance(item, str) else item
        specific = {**arguments, **own}
        warm_up, total = specific.pop("num_warmup_steps", None), specific.pop("num_training_steps", None)
        scheduler = get_scheduler(name, _stand_in([1.0 if lr is None else lr]), warm_up, total, specific)
        if isinstance(scheduler, LambdaLR):
            return _sources(label, scheduler.lr_lambdas[0], lr, {})
        return [Source(label or SchedulerType(name).value, _settings(scheduler), scheduler, length=total)]
    if isinstance(item, LambdaLR):
        return _of_groups(label, item)
    if isinstance(item, MetricDriven):
        name = "greedy" if isinstance(item, GreedyLR) else "reduce_lr_on_plateau"
        return [Source(label or name, _settings(item), item, float(item.optimizer.param_groups[0]["lr"]))]
    if isinstance(item, Schedule):
        return [Source(label or item.name, _details(item), item, length=item.length)]
    if isinstance(item, RateSchedule):  # The rate itself, no factor of an initial one.
        numbers = {name: value for name, value in _details(item).items() if not callable(value)}
        return [Source(label or type(item).__name__, numbers, item, initial=1.0, length=item.length)]
    if callable(item):
        return [Source(label or str(getattr(item, "__name__", type(item).__name__)), {}, item)]
    raise ValueError(
        f"cannot plot {item!r}; give a schedule, the name of one, a LambdaLR, ReduceLROnPlateau or GreedyLR, or a "
        "function from step to factor"
    )


def _of_groups(label: str | None, scheduler: LambdaLR) -> list[Source]:
    """One source for each learning rate that differs from those of the groups before."""
    found: dict[tuple[int, float], Source] = {}
    for index, (function, base_lr) in enumerate(zip(scheduler.lr_lambdas, scheduler.base_lrs)):
        lr = float(base_lr)
        if (id(function), lr) not in found:
            (source,) = _sources(label, function, lr, {})
            name = f"{source.label}, group {index}" if index else source.label
            found[id(function), lr] = replace(source, label=name, initial=lr, position=scheduler.last_epoch)
    return list(found.values())


def _details(schedule: Schedule | RateSchedule) -> dict[str, Any]:
    shown = {field.name: getattr(schedule, field.name) for field in fields(schedule)}  # type: ignore[arg-type]
    return {name: value for name, value in shown.items() if value is not None}


def _settings(scheduler: Any) -> dict[str, Any]:
    names = ("factor", "patience", "cooldown", "min_lrs", "max_lrs")
    shown = {name.rstrip("s"): getattr(scheduler, name, None) for name in names}
    return {name: np.squeeze(value).tolist() for name, value in shown.items() if value is not None}


def _text(details: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in details.items())


def _long_enough(drive: Any) -> float:
    """How many steps show a schedule that never arrives."""
    own_pace = max(getattr(drive, "num_warmup_steps", 0), getattr(drive, "timescale", 0), 10)
    return float(10 * own_pace)


def _told_apart(sources: list[Source]) -> list[Source]:
    """The sources; where several bear the same label, it says in which parameters they differ."""
    named = []
    for source in sources:
        same = [other.details for other in sources if other.label == source.label]
        differing = {k: v for k, v in source.details.items() if any(other.get(k) != v for other in same)}
        named.append(replace(source, label=f"{source.label} ({_text(differing)})") if differing else source)
    return named


def _curve(source: Source, num_steps: int, default_lr: float, metrics: Sequence[float] | None) -> Curve:
    lr = default_lr if source.initial is None else source.initial
    if not isinstance(source.drive, MetricDriven):
        warm_up = getattr(source.drive, "num_warmup_steps", 0)
        corners = [corner for corner in (warm_up, source.length, source.position) if corner]
        steps, factors = _sampled(source.drive, num_steps, corners)
        return Curve(source.label, _text(source.details), steps, factors * lr, warm_up, source.position)
    if num_steps > _MOST_METRICS:
        raise ValueError(f"num_steps must be <= {_MOST_METRICS} for a metric-driven schedule, got {num_steps}")
    metric = example_metric(num_steps) if metrics is None else np.asarray(metrics, dtype=np.float64)
    if metrics is None and source.drive.mode == "max":
        metric = 1.0 - metric
    rates = _simulated(source.drive, lr, metric)
    return Curve(source.label, _text(source.details), np.arange(len(metric)), rates, metric=metric)


def _sampled(function: Any, num_steps: int, corners: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that show the curve of a function of the step, and its values there.

    All steps of a short run. Of a long one steps at even distances, more of them at its beginning, where warm-ups are,
    those around the corners that are known, and then halves of the gaps over which the curve is steep.
    """

    def values(at: np.ndarray) -> np.ndarray:
        array = function(at) if isinstance(function, Schedule) else [float(function(int(step))) for step in at]
        return np.asarray(array, dtype=np.float64)

    if num_steps <= _EVEN_POINTS:
        steps = np.arange(num_steps + 1)
        return steps, values(steps)
    # Two combs without a common distance: a wave that one of them takes for a line shows in the other.
    combs = [np.linspace(0, num_steps, count) for count in (_EVEN_POINTS * 3 // 5 + 1, _EVEN_POINTS * 2 // 5 - 2)]
    around = [np.floor(corner) + np.arange(-1, 3) for corner in corners]
    wanted = np.concatenate([*combs, np.geomspace(1, num_steps, _EVEN_POINTS // 5), *around])
    steps = np.unique(wanted.round().clip(0, num_steps).astype(np.int64))
    found = values(steps)
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
        found = np.insert(found, steepest + 1, values(between))


def _simulated(scheduler: Any, lr: float, metric: np.ndarray) -> np.ndarray:
    """The rates of a fresh scheduler with the same settings: rates[k] after the first k metrics."""
    fresh = copy.copy(scheduler)
    fresh.optimizer = _stand_in([lr] * len(fresh.min_lrs))
    if isinstance(fresh, GreedyLR):
        fresh._init_lrs = fresh._last_lr = [lr] * len(fresh.min_lrs)
    fresh._reset()
    rates = []
    for value in metric:
        rates.append(fresh.optimizer.param_groups[0]["lr"])
        fresh.step(float(value))
    return np.array(rates)
