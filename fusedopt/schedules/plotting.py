"""Pictures of learning-rate schedules: one, several, all of them, and one against the rates that a run used.

Figures are made without pyplot, so no window, backend or global state is touched. Save one with
`figure.savefig("schedule.png")`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedopt.drawing import COLOURS, MOST_DISTINCT, NEUTRAL, SMALL, WRONG, shortened, styles, text_width
from fusedopt.schedules.curves import Curve, Plottable, curves_of
from fusedopt.schedules.recorder import LRRecorder
from fusedopt.schedules.registry import SchedulerType, example_arguments
from fusedopt.schedules.verification import functions_of, verify_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WARM_UP = "#F0E442"
_METRIC = "#8A8A8A"
# Of more curves than can be told apart, this many are named.
_NAMED_OF_MANY = 10
# The height of a row of a legend, in points.
_ROW = 14.5
_MOST_ROWS = 10


def plot_schedule(
    what: Plottable | Sequence[Plottable] | Mapping[str, Plottable],
    num_steps: int | None = None,
    ax: Axes | None = None,
    *,
    lr: float | None = None,
    title: str | None = None,
    metrics: Sequence[float] | None = None,
    **arguments: Any,
) -> Figure:
    """Draws the learning rate of one schedule or several over the optimizer steps.

    Args:
        what: A schedule object, a function from step to factor, a name with its `arguments`, a pair of a name and its
            own arguments, or a live scheduler (whose present step is marked). Several of them in a list, or in a dict
            with labels of your own, are drawn together.
        num_steps: Length of the step axis. Default: a little more than the longest schedule.
        ax: Axes to draw in. Default: those of a new figure.
        lr: The initial learning rate. Default: that of a live scheduler; without one, rates are drawn as multiples.
        title: Default: the name and parameters of a single schedule.
        metrics: The metrics for metric-driven schedulers, one per step. Default: a loss that twice falls and stalls.
        **arguments: `num_warmup_steps`, `num_training_steps` and specific arguments of schedules given by name.

    Returns:
        The figure.

    Raises:
        ValueError: A name is unknown, a schedule refuses its arguments, or something is not a schedule.

    Example:
        >>> figure = plot_schedule("cosine", num_warmup_steps=10, num_training_steps=100)
        >>> figure.axes[0].get_title(loc="left")
        'cosine'
        >>> two = ["linear", ("cosine", {"num_cycles": 1.0})]
        >>> figure = plot_schedule(two, lr=1e-3, num_warmup_steps=5, num_training_steps=50)
    """
    curves, relative = curves_of(what, num_steps, lr, metrics, arguments)
    created = ax is None
    figure, ax = _canvas(ax)
    drawn, others = _draw(ax, curves, metric="metric" if metrics is not None else "metric: an example loss")
    _place_legend(ax, drawn, others, below=created)
    label, details = (curves[0].label, curves[0].details) if len(curves) == 1 else ("learning-rate schedules", "")
    _finish(ax, relative, title or label, details)
    return figure


def plot_gallery(num_warmup_steps: int = 100, num_training_steps: int = 1000) -> Figure:
    """Draws every schedule that has a name, with its `example_arguments`, as small multiples.

    Args:
        num_warmup_steps: Length of the warm-up, if there is one.
        num_training_steps: Length of the training.

    Returns:
        The figure, with one Axes per name (and one more on top of each metric-driven one, for the metric).

    Raises:
        ValueError: A schedule refuses the counts.

    Example:
        >>> [ax.get_title(loc="left") for ax in plot_gallery().axes][:3]
        ['linear', 'cosine', 'cosine_with_restarts']
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 4
    figure = Figure(figsize=(13.2, 8.0), dpi=100, layout=ConstrainedLayoutEngine(h_pad=0.09))
    grid = figure.subplots(len(SchedulerType) // columns, columns, sharex=True)
    handles: dict[str, Any] = {}
    for index, (ax, kind) in enumerate(zip(grid.flat, SchedulerType)):
        specific = example_arguments(kind, num_training_steps, lr=1.0)
        counts = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
        end = round(1.2 * num_training_steps)
        curves, relative = curves_of((kind.value, {**counts, **specific}), end, None, None, {})
        lines, others = _draw(ax, curves, rate="learning rate", metric="example loss")
        drawn = [*lines, *others]
        drawn.append(ax.axvline(num_training_steps, color="#404040", linewidth=0.8, linestyle=":", label="last step"))
        shown = ", ".join(f"{name}={value:g}" for name, value in specific.items())
        _finish(ax, relative, kind.value, shown, lines=1)
        ax.set_ylim(-0.05, max(1.1, 1.05 * max(curve.rates.max() for curve in curves)))
        if index < len(SchedulerType) - columns:
            ax.set_xlabel("")
        if index % columns:
            ax.set_ylabel("")
        handles |= {handle.get_label(): handle for handle in drawn}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def plot_verification(
    recorder: LRRecorder, schedule: Any, ax: Axes | None = None, *, title: str | None = None, legend: bool = True
) -> Figure:
    """Draws the learning rates that a run used over those it was meant to use, and marks the steps where they differ.

    Args:
        recorder: The record of the run.
        schedule: The schedule that was meant, as for `verify_schedule`.
        ax: Axes to draw in. Default: those of a new figure.
        title: Default: that the run followed the schedule, or that it left it.
        legend: Draw a legend.

    Returns:
        The figure, with the finding of `verify_schedule` below its title.

    Raises:
        ValueError: As `verify_schedule`.

    Example:
        >>> import torch
        >>> from fusedopt.schedules import get_linear_schedule_with_warmup
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> recorder = LRRecorder(optimizer)
        >>> scheduler = get_linear_schedule_with_warmup(optimizer, 2, 10)
        >>> for _ in range(8):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> figure = plot_verification(recorder, scheduler)
        >>> figure.axes[0].get_title(loc="left").splitlines()[0]
        'the run followed the schedule'
    """
    run = verify_schedule(recorder, schedule)
    created = ax is None
    figure, ax = _canvas(ax)
    size = 4 if len(run.steps) <= 150 else 2
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    lines, dots, crosses = [], [], []
    for group, style in enumerate(styles(run.recorded.shape[1])):
        used, meant, wrong = run.recorded[:, group], run.expected[:, group], run.differs[:, group]
        if any(np.array_equal(used, other) and np.array_equal(meant, also) for other, also in drawn):
            continue
        drawn.append((used, meant))
        where = f", group {group}" if group else ""
        lines += ax.plot(run.steps, meant, **style, linewidth=1.6, label=f"schedule{where}", zorder=1)
        right, off = np.where(wrong, np.nan, used), np.where(wrong, used, np.nan)
        points: dict[str, Any] = {"linestyle": "", "markersize": size}
        label = f"used, as meant{where}"
        dots += ax.plot(run.steps, right, marker="o", color=style["color"], **points, label=label, zorder=2)
        if wrong.any():
            label = f"used, differs{where}"
            crosses += ax.plot(run.steps, off, marker="x", color=WRONG, **points, label=label, zorder=3)
            ax.fill_between(run.steps, off, meant, color=WRONG, alpha=0.15, linewidth=0, zorder=0)
    warm_up = max(getattr(function, "num_warmup_steps", 0) for function in functions_of(schedule))
    others = [_key(lines, dots, "used, as meant"), *(crosses[:1] and [_key(crosses, crosses, "used, differs")])]
    if warm_up > run.steps[0]:
        others.append(_shade_warm_up(ax, warm_up, start=run.steps[0]))
    _fit(ax)
    if legend:
        _place_legend(ax, lines, others, below=created)
    title = title or ("the run followed the schedule" if run.ok else "the run left the schedule")
    # Titles of adjacent panels stay on one line.
    _finish(ax, False, title, run.finding, lines=0 if created else 3)
    return figure


def _canvas(ax: Axes | None) -> tuple[Figure, Axes]:
    """Returns `ax` and its figure, or those of a new figure."""
    if ax is not None:
        given: Any = ax.figure
        return given, ax
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    return figure, figure.add_subplot()


def _draw(
    ax: Axes, curves: list[Curve], rate: str | None = None, metric: str = "metric"
) -> tuple[list[Any], list[Any]]:
    """Draws curves, a metric on an axis of its own; `rate` replaces all labels.

    Returns:
        The lines of the curves, and the other entries of a legend.
    """
    lines, nows, others = [], [], []
    looks = styles(len(curves))
    for curve, style in zip(curves, looks):
        marker = "." if len(curve.steps) <= 60 and len(curves) <= len(COLOURS) else ""
        label = rate or curve.label
        lines += ax.plot(curve.steps, curve.rates, marker=marker, **style, linewidth=1.8, label=label, zorder=2)
        if curve.position is not None:
            here = np.searchsorted(curve.steps, curve.position).clip(max=len(curve.steps) - 1)
            place, now = (curve.steps[here], curve.rates[here]), f"{curve.label} now: step {curve.position}"
            nows += ax.plot(*place, "o", color=style["color"], markersize=8, label=now, zorder=3)
        if curve.metric is not None:
            others += _draw_metric(ax, curve, metric, with_ticks=rate is None)
    if nows:
        positions = {curve.position for curve in curves if curve.position is not None}
        others.append(_key(lines, nows, f"now: step {positions.pop()}" if len(positions) == 1 else "now"))
    warm_ups = {curve.warm_up for curve in curves if curve.warm_up > 0}
    if len(warm_ups) == 1:
        others.append(_shade_warm_up(ax, warm_ups.pop()))
    elif 0 < len(warm_ups) <= len(COLOURS):
        ends = [
            ax.axvline(curve.warm_up, color=style["color"], linewidth=0.9, linestyle=":", label="end of its warm-up")
            for curve, style in zip(curves, looks)
            if curve.warm_up > 0
        ]
        others.append(ends[0])
    _fit(ax)
    return lines, others


def _fit(ax: Axes) -> None:
    """Sets limits around what is drawn, and around 0 if no rate is negative; limits that the user has set stay."""
    ax.margins(x=0.02, y=0.06)
    if _may_move(ax) and ax.dataLim.ymin >= 0:
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, -0.045 * high), high, auto=True)


def _may_move(ax: Axes) -> bool:
    return ax.get_yscale() == "linear" and ax.get_autoscaley_on()


def _key(lines: list[Any], points: list[Any], label: str) -> Any:
    """Returns one legend entry for the points of all curves, in colour if there is one curve or they are mistakes."""
    from matplotlib.lines import Line2D

    colour = points[0].get_color() if len(lines) == 1 or points[0].get_color() == WRONG else NEUTRAL
    marker, size = points[0].get_marker(), points[0].get_markersize()
    return Line2D([], [], linestyle="", marker=marker, markersize=size, color=colour, label=label)


def _place_legend(ax: Axes, lines: list[Any], others: list[Any], below: bool) -> None:
    """Places a legend that covers no curve: below the axes of a new figure, which grows, else above the curves."""
    from matplotlib.lines import Line2D

    figure: Any = ax.figure
    title = None
    if len(lines) > MOST_DISTINCT:
        title = f"{_NAMED_OF_MANY} of {len(lines)} curves, coloured in their order"
        lines = [lines[index] for index in np.linspace(0, len(lines) - 1, _NAMED_OF_MANY).round().astype(int)]
    handles = [*lines, *others]
    height, width = 72 * figure.get_figheight(), 72 * figure.get_figwidth()
    if not below:
        height, width = height * ax.get_position().height, width * ax.get_position().width
    labels: list[str] = [shortened(handle.get_label(), 0.94 * width - 5 * SMALL) for handle in handles]
    columns = max(1, min(4, int(0.94 * width / (max(map(text_width, labels)) + 5 * SMALL))))
    if below and len(handles) > _MOST_ROWS * columns:  # shorten names rather than lengthen the page
        columns = -(-len(handles) // _MOST_ROWS)
        labels = [shortened(label, 0.94 * width / columns - 5 * SMALL) for label in labels]
    rows = -(-len(handles) // columns)
    if not below:
        most = max(1, int(0.45 * height / _ROW))
        if rows > most:
            rows, shown = most, max(1, most * columns - len(others) - 1)
            more = Line2D([], [], linestyle="", label=f"and {len(lines) - shown} more")
            handles = [*lines[:shown], more, *others]
            labels = [*labels[:shown], str(more.get_label()), *labels[len(lines) :]]
        # Make room above the curves, more than needed, for layout engines take some of the height for labels.
        share = min(0.6, (1.3 * _ROW * (rows + bool(title)) + 8) / height)
        for each in {ax, *(handle.axes for handle in handles if handle.axes is not None)}:
            low, high = each.get_ylim()
            if _may_move(each):
                each.set_ylim(low, low + (high - low) / (1 - share), auto=True)
    options: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": SMALL, "title": title}
    options |= {"title_fontsize": SMALL}
    # Matplotlib leaves out labels that begin with an underscore.
    named = [" " + label if label.startswith("_") else label for label in labels]
    if below:
        figure.set_figheight(figure.get_figheight() + max(0, rows + bool(title) - 1) * _ROW / 72)
        legend = figure.legend(handles, named, loc="outside lower center", **options)
    else:
        legend = ax.legend(handles, named, loc="upper right" if _may_move(ax) else "best", **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_metric(ax: Axes, curve: Curve, label: str, with_ticks: bool) -> list[Any]:
    right = ax.twinx()
    right.spines[["top", "left", "right"]].set_visible(False)
    right.tick_params(colors=_METRIC, right=with_ticks, labelright=with_ticks)
    right.set_ylabel("metric" if with_ticks else "", color=_METRIC)
    assert curve.metric is not None
    return right.plot(curve.steps, curve.metric, "--", color=_METRIC, linewidth=1.2, label=label)


def _shade_warm_up(ax: Axes, warm_up: float, start: float = 0) -> Any:
    return ax.axvspan(start, warm_up, color=_WARM_UP, alpha=0.35, linewidth=0, label="warm-up", zorder=0)


def _finish(ax: Axes, relative: bool, title: str, below: str = "", lines: int = 0) -> None:
    """Adds labels with units, and a title with a smaller text below it that takes the room of `lines` lines or more."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # The exponent of the largest number on the axis, so that no tick reads 10 or more.
    largest = np.abs(ax.get_ylim()).max() if np.abs(ax.dataLim.intervaly).max() > 0 else 0.0
    exponent = int(np.floor(np.log10(largest))) if 0 < largest < np.inf else 0
    exponent = exponent if not -2 <= exponent <= 3 else 0
    unit = "× initial rate" if relative else ("per step" if exponent == 0 else f"$10^{{{exponent}}}$ per step")
    ax.set(xlabel="optimizer step", ylabel=f"learning rate ({unit})")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate / 10.0**exponent:.4g}"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    ax.set_axisbelow(True)
    below = textwrap.fill(below, _letters_that_fit(ax))
    lines = max(lines, below.count("\n") + 1 if below else 0)
    text_height = 11 * lines
    title = textwrap.fill(title, round(0.6 * _letters_that_fit(ax)))
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=9 + text_height, parse_math=False)
    if below:
        style: dict[str, Any] = {"fontsize": 8, "color": "#505050", "va": "top", "ha": "left"}
        ax.annotate(below, (0, 1), (0, 4 + text_height), "axes fraction", "offset points", **style)


def _letters_that_fit(ax: Axes) -> int:
    """Returns how many letters of 8 points fit above the Axes in a row, before the layout has set their width."""
    place, width = ax.get_subplotspec(), ax.figure.bbox.width / ax.figure.dpi
    share = ax.get_position().width if place is None else 0.88 / place.get_gridspec().ncols
    return max(30, int(16.5 * width * share))
