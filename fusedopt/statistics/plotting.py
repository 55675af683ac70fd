"""Pictures of a history of statistics: lines for a few parameters, a heat map for many.

Figures are made without pyplot, so no window, backend or global state is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusedopt.drawing import NEUTRAL, SMALL, WRONG, shortened, styles, text_width
from fusedopt.statistics.findings import QUANTITIES, findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from fusedopt.statistics.recorder import StatisticsRecorder

MOST_LINES = 12
"""Up to this many parameters are lines; more are rows of a heat map."""

PANELS = {"update_to_weight": "update/weight", "grad_norm": "gradient norm"}
"""The quantities that are drawn, and their titles."""

_NO_UPDATE = "#C9CCD1"
_USUAL = 1e-3  # the ratio of update to weight that is common wisdom for a healthy layer
# The most cells that a picture can show; each of them shows the number that stands out most.
_MOST_COLUMNS, _MOST_ROWS = 240, 400
# Points of a row's label, with its leading, and for its name.
_LABEL, _NAME_ROOM = 8.0, 190.0
_SUMMARY = 9.5
_NAMED_WORST = 3


class _Data:
    """What is drawn: parameters that were measured at least once.

    Attributes:
        names: without the modules that all of them are in, which are `inside`.
        kinds: what parameters are alike, see `kinds_of`.
        worst: rows of the parameters that stand out at the last step that changed something, and why; the worst
            first.
    """

    def __init__(self, recorder: StatisticsRecorder, sort: bool) -> None:
        history = recorder.history.astype(np.float64)
        measured = np.logical_not(np.isnan(history).all(axis=2))
        if not measured.any():
            raise ValueError("no step was measured; make the StatisticsRecorder before training, and train")
        kinds, numel, names = recorder.parameters.kinds, np.array(recorder.parameters.numel), recorder.names
        rows = np.flatnonzero(measured.any(axis=0)).tolist()
        if sort:
            first = {kind: -place for place, kind in reversed(list(enumerate(kinds)))}
            rows.sort(key=lambda row: (kinds[row][0], first[kinds[row]]), reverse=True)
        self.steps = recorder.steps
        self.skipped = recorder.skipped
        self.inside = _common([names[row] for row in rows])
        self.names = [names[row][len(self.inside) :] for row in rows]
        self.kinds = [kinds[row] for row in rows]
        self.history = history[:, rows]
        self.measured = measured[:, rows]

        updates = np.nan_to_num(self.history[:, :, QUANTITIES.index("update_norm")], nan=1.0)
        last = max(np.flatnonzero((updates != 0.0).any(axis=1) & self.measured.any(axis=1)), default=-1)
        here = np.flatnonzero(self.measured[last])
        found = findings(self.history[last, here], [self.kinds[row] for row in here], numel[rows][here])
        order = sorted(range(len(here)), key=lambda i: found[i][:2])
        self.worst = [(int(here[i]), found[i].text) for i in order if found[i].stands_out]

    def values(self, quantity: str) -> np.ndarray:
        """Returns [parameters, entries]; NaN where nothing was measured."""
        return self.history[:, :, QUANTITIES.index(quantity)].T

    def broken(self, quantity: str) -> np.ndarray:
        """True where a number is not finite, bool [parameters, entries]; a ratio to a weight of 0 is no such number."""
        norms = ("weight_norm", "update_norm") if quantity == "update_to_weight" else (quantity,)
        finite = [np.isfinite(self.values(norm)) for norm in norms]
        broken: np.ndarray = self.measured.T & ~np.logical_and.reduce(finite)
        return broken


def _common(names: list[str]) -> str:
    """Returns what all names begin with, up to a dot."""
    if len(names) < 2:
        return ""
    parts = [name.split(".")[:-1] for name in names]
    common = next((n for n, those in enumerate(zip(*parts)) if len(set(those)) > 1), min(map(len, parts)))
    return "".join(f"{part}." for part in parts[0][:common])


def plot_statistics(recorder: StatisticsRecorder) -> Figure:
    """Draws the update-to-weight ratio and the gradient norm of every parameter over the steps.

    Up to 12 parameters are lines, more are rows of a heat map: matrices first, then vectors, each kind in the order of
    the optimizer. Both scales are logarithmic. Numbers that are not finite are orange-red, and so are the names of the
    parameters that stand out at the end. Where there are more entries or parameters than a picture can show, each cell
    shows the number that stands out most.

    Args:
        recorder: has the history.

    Returns:
        The figure, with one Axes for the ratio and one for the gradient norm.

    Raises:
        ValueError: no step was measured.

    Example:
        >>> import fusedopt, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = fusedopt.AdamW(model.named_parameters(), lr=0.01, track_statistics=True)
        >>> recorder = fusedopt.StatisticsRecorder(optimizer)
        >>> for _ in range(3):
        ...     model(torch.ones(3)).sum().backward()
        ...     optimizer.step()
        >>> [ax.get_title(loc="left") for ax in plot_statistics(recorder).axes]
        ['update/weight', 'gradient norm']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6 if _few(recorder) else 11.0, height_of(recorder)), dpi=110, layout="constrained")
    draw_statistics(figure, recorder)
    return figure


def height_of(recorder: StatisticsRecorder) -> float:
    """Returns how high a picture should be, in inches."""
    return 6.6 if _few(recorder) else float(np.clip(2.2 + 0.135 * len(recorder.names), 4.5, 11.5))


def draw_statistics(figure: Figure | SubFigure, recorder: StatisticsRecorder) -> None:
    """Draws what `plot_statistics` does in a figure, or in a part of one, that has a constrained layout."""
    data = _Data(recorder, sort=not _few(recorder))
    handles: dict[str, Any] = {}
    if _few(recorder):
        panels = figure.subplots(2, 1, sharex=True)
        for ax, (quantity, title) in zip(panels, PANELS.items()):
            handles |= _draw_lines(ax, data, quantity, title)
        panels[0].set_xlabel("")
    else:
        panels = figure.subplots(1, 2, sharey=True)
        for ax, (quantity, title) in zip(panels, PANELS.items()):
            handles |= _draw_heat_map(ax, data, quantity, title, height=72 * height_of(recorder) - 150)
    _legend_below(figure, handles)
    summary = _summary(data, 0.97 * _width(figure) * SMALL / _SUMMARY)
    figure.suptitle(summary, x=0.012, ha="left", fontsize=_SUMMARY, color=NEUTRAL, parse_math=False)


def _few(recorder: StatisticsRecorder) -> bool:
    return len(recorder.names) <= MOST_LINES


def _width(figure: Figure | SubFigure) -> float:
    """Returns the width of a figure in points."""
    return 72 * figure.bbox.width / figure.get_dpi()


def _summary(data: _Data, room: float) -> str:
    """Returns what is drawn and what stands out, in lines that fit into `room`, in points of small letters."""
    first, last = data.steps[0], data.steps[-1]
    inside = f" in {data.inside.removesuffix('.')}" if data.inside else ""
    steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    number = int(data.skipped.sum())
    skipped = f"; {number:,} measured step{'s' * (number > 1)} changed nothing" if number else ""
    lines = [f"{len(data.names):,} parameters{inside}, {steps}{skipped}"]
    for row, text in data.worst[:_NAMED_WORST]:
        before, after = "stands out: ", f" ({text})"
        lines.append(before + shortened(data.names[row], room - text_width(before + after)) + after)
    if len(data.worst) > _NAMED_WORST:
        lines.append(f"and {len(data.worst) - _NAMED_WORST:,} more")
    return "\n".join(lines)


def _draw_lines(ax: Axes, data: _Data, quantity: str, title: str) -> dict[str, Any]:
    """Draws a line per parameter, and returns the entries of a legend by their labels."""
    values, broken = data.values(quantity), data.broken(quantity)
    worst = {row for row, _ in data.worst[:_NAMED_WORST]}
    handles = {}
    ax.set_yscale("log")
    drawable = np.where(np.isfinite(values) & (values > 0.0), values, np.nan)
    for row, (name, look) in enumerate(zip(data.names, styles(len(data.names)))):
        marker = "." if len(data.steps) <= 60 else ""
        width = 2.4 if row in worst else 1.4
        (handles[name],) = ax.plot(data.steps, drawable[row], marker=marker, markersize=4, linewidth=width, **look)
    if np.isfinite(drawable).any():
        low, high = np.nanmin(drawable), np.nanmax(drawable)
        ax.set_ylim(low / 1.6, high * 2.0)
        if quantity == "update_to_weight" and low < _USUAL < high:
            dotted: dict[str, Any] = {"color": NEUTRAL, "linewidth": 0.9, "linestyle": (0, (1, 3))}
            handles["0.001, as is common"] = ax.axhline(_USUAL, zorder=0, **dotted)
    for row in np.flatnonzero(broken.any(axis=1)).tolist():
        where = data.steps[broken[row]]
        style: dict[str, Any] = {"color": WRONG, "markersize": 5, "zorder": 4, "transform": ax.get_xaxis_transform()}
        (handles[f"not finite: {data.names[row]}"],) = ax.plot(where, np.full(len(where), 0.955), "x", **style)
    _finish(ax, title)
    return handles | _mark_skipped(ax, data)


def _draw_heat_map(ax: Axes, data: _Data, quantity: str, title: str, height: float) -> dict[str, Any]:
    """Draws a row per parameter, and returns the entries of a legend by their labels.

    Args:
        ax: where.
        data: the history.
        quantity: which.
        title: of the Axes.
        height: of the Axes in points, about; it decides how many rows have a name.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgba
    from matplotlib.patches import Patch

    values, broken = data.values(quantity), data.broken(quantity)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log10(values)
    drawable = np.isfinite(logarithms)
    middle = np.median(logarithms[drawable]) if drawable.any() else 0.0
    # How much a number deserves to be seen where several share a cell.
    deserves = np.where(drawable, np.abs(np.where(drawable, logarithms, 0.0) - middle), -1.0)
    deserves[broken] = np.inf
    deserves[~data.measured.T] = -2.0

    # A layer that starts at 0 has ratios of any size at first, which must not take the colours of all others.
    low, high = np.quantile(logarithms[drawable], (0.005, 0.995)) if drawable.any() else (0.0, 0.0)
    norm = LogNorm(10.0 ** (low - 0.05), 10.0 ** (high + 0.05))
    colours = colormaps["viridis"](norm(np.where(drawable, values, 1.0)))
    colours[~drawable] = to_rgba(_NO_UPDATE)
    colours[broken] = to_rgba(WRONG)
    colours[~data.measured.T] = to_rgba("white")

    rows, row_starts = _pooled(colours, deserves, 0, _MOST_ROWS)
    deserves, _ = _pooled(deserves[..., None], deserves, 0, _MOST_ROWS)
    cells, column_starts = _pooled(rows, deserves[..., 0], 1, _MOST_COLUMNS)
    across = _edges(data.steps)[[*column_starts, len(data.steps)]]
    down = np.array([*row_starts, len(data.names)]) - 0.5
    ax.pcolormesh(across, down, cells, shading="flat", rasterized=True)
    ax.set_ylim(len(data.names) - 0.5, -0.5)
    ax.margins(x=0)

    place: dict[str, Any] = {"orientation": "horizontal", "fraction": 12 / height, "pad": 6 / height, "aspect": 45}
    bar = ax.figure.colorbar(ScalarMappable(norm, "viridis"), ax=ax, extend="both", **place)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    _finish(ax, title)
    ax.grid(False)
    _name_rows(ax, data, height)
    for row in range(1, len(data.names)):
        if data.kinds[row] != data.kinds[row - 1]:
            ax.axhline(row - 0.5, color="white", linewidth=2.5)
    handles = {}
    if broken.any():
        handles["not finite"] = Patch(color=WRONG)
    if (~drawable & ~broken & data.measured.T).any():
        handles["0, or the weight is 0"] = Patch(color=_NO_UPDATE)
    if not data.measured.all():
        handles["not measured"] = Patch(facecolor="white", edgecolor=_NO_UPDATE)
    return handles | _mark_skipped(ax, data)


def _pooled(cells: np.ndarray, deserves: np.ndarray, axis: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most `most` cells along an axis, of neighbours the one that deserves it most, and where they begin."""
    length = deserves.shape[axis]
    starts = np.unique(np.linspace(0, length, min(length, most), endpoint=False).astype(int))
    if len(starts) == length:
        return cells, starts
    chosen = []
    for start, end in zip(starts, [*starts[1:], length]):
        part = np.take(deserves, range(start, end), axis)
        best = start + np.expand_dims(part.argmax(axis), (axis, 2))
        chosen.append(np.take_along_axis(cells, best, axis))
    return np.concatenate(chosen, axis), starts


def _edges(steps: np.ndarray) -> np.ndarray:
    """Returns where the columns of these steps begin and end."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    between = (steps[1:] + steps[:-1]) / 2
    return np.array([1.5 * steps[0] - 0.5 * steps[1], *between, 1.5 * steps[-1] - 0.5 * steps[-2]])


def _name_rows(ax: Axes, data: _Data, height: float) -> None:
    """Names as many rows as there is room for: those that stand out first, in vermilion, the others evenly spaced."""
    count = len(data.names)
    apart = max(1.0, _LABEL * count / height)
    worst = [row for row, _ in data.worst[:_NAMED_WORST]]
    evenly = np.arange(0, count, int(np.ceil(apart)))
    chosen: list[int] = []
    for row in [*worst, *evenly.tolist()]:
        if all(abs(row - other) >= apart for other in chosen):
            chosen.append(row)
    chosen.sort()
    labels = [shortened(data.names[row], _NAME_ROOM) for row in chosen]
    ax.set_yticks(chosen, labels, fontsize=7, parse_math=False)
    ax.tick_params(axis="y", length=2)
    for row, text in zip(chosen, ax.get_yticklabels()):
        if row in worst:
            text.set(color=WRONG, fontweight="bold")


def _mark_skipped(ax: Axes, data: _Data) -> dict[str, Any]:
    """Marks skipped steps above the Axes, and returns an entry for a legend if there are any."""
    where = data.steps[data.skipped > 0]
    if not len(where):
        return {}
    style: dict[str, Any] = {"color": NEUTRAL, "markersize": 4, "clip_on": False, "transform": ax.get_xaxis_transform()}
    (marks,) = ax.plot(where, np.full(len(where), 1.0), "|", **{**style, "markersize": 8})
    return {"steps that changed nothing": marks}


def _legend_below(figure: Figure | SubFigure, handles: dict[str, Any]) -> None:
    if not handles:
        return
    columns = max(1, int(_width(figure) / 195))
    labels = [shortened(label, _width(figure) / columns - 50) for label in handles]
    options: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": SMALL}
    # Matplotlib leaves out labels that begin with an underscore.
    labels = [" " + label if label.startswith("_") else label for label in labels]
    legend = figure.legend(list(handles.values()), labels, loc="outside lower left", **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _finish(ax: Axes, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=10)
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    ax.set_axisbelow(True)
