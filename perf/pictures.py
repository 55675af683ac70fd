"""Pictures of results. Figures are made without pyplot: no window and no global state are touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perf import report, results
from perf.results import Record
from perf.roofline import Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS, INK = "#0072B2", "#B4BBC3", "#1F2933"
"""The package in blue, everyone else in grey: the eye should find one thing."""

_READ, _WRITTEN = "#56B4E9", "#E69F00"
_LINES = ("#E69F00", "#CC79A7", "#009E73", "#8C6D31", "#404040")


def steps(records: Sequence[Record], rules: Sequence[str] = ("adamw", "adafactor"), limit: int = 4) -> Figure:
    """Step time of each provider as bars, one panel per comparison, with the roofline as a line.

    Args:
        records: of one run: its environment, its copies, its steps.
        rules: which rules to show.
        limit: most panels.
    """
    bandwidth = report.copy_bandwidth(records)
    groups = [
        (key, sorted((r for r in group if r["status"] == "measured"), key=report.best_ms))
        for key, group in report.comparisons(records).items()
        if key[1] in rules
    ]
    groups = [(key, group) for key, group in groups if group][:limit]
    columns = min(2, max(1, len(groups)))
    rows = max(1, -(-len(groups) // columns))
    figure = _figure(6.4 * columns, 0.6 + 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, ((workload, rule), group) in zip(axes, groups):
        r = group[0]
        size = f"{count(r['params'])} {r['dtype']} in {r['tensors']:,} tensors"
        times = [report.best_ms(r) for r in group]
        _bars(ax, [r["provider"] for r in group], times, [r["ours"] for r in group])
        _style(ax, f"{rule}: {workload}, {size}", "ms per step")
        if bandwidth and r["params"] > 1_000_000:
            _roofline(ax, report.floor_ms(r, bandwidth))
    for ax in axes[len(groups) :]:
        ax.remove()
    head = next((r for r in records if r.get("kind") == "environment"), None)
    if head:
        figure.supxlabel(results.machine(head), fontsize=8, color="#52606D")
    return figure


def traffic(panels: Mapping[str, Mapping[str, Traffic]], floors: Mapping[str, float]) -> Figure:
    """Bytes per parameter and step, read and written, as stacked bars.

    Args:
        panels: title to provider to bytes.
        floors: title to the fewest bytes that are possible.
    """
    figure = _figure(6.4 * len(panels), 3.4)
    for ax, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False).ravel(), panels.items()):
        names = list(rows)
        read, written = [t.read for t in rows.values()], [t.written for t in rows.values()]
        ax.barh(names, read, color=_READ, height=0.68, label="read")
        bars = ax.barh(names, written, left=read, color=_WRITTEN, height=0.68, label="written")
        ax.bar_label(bars, [f"{t.total:.0f}" for t in rows.values()], padding=4, fontsize=9, color=INK)
        ax.set_ylim(len(names) - 0.1, -0.6)
        ax.set_xlim(0, 1.15 * max(t.total for t in rows.values()))
        _style(ax, title, "bytes per parameter and step")
        _roofline(ax, floors[title], "fewest possible")
        handles = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def lines(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], xlabels: Sequence[str]) -> Figure:
    """Step time over something, both logarithmic.

    Args:
        panels: title to provider to (x, milliseconds).
        xlabels: one per panel.
    """
    figure = _figure(6.4 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False).ravel()
    for ax, (title, curves), xlabel in zip(axes, panels.items(), xlabels):
        colours = iter(_LINES)
        for name, points in curves.items():
            ours = name == "fusedopt"
            colour = OURS if ours else next(colours)
            x, y = zip(*points)
            ax.plot(x, y, "o-", color=colour, lw=2.4 if ours else 1.4, ms=5 if ours else 4, label=name, zorder=3 - ours)
        ax.set_xscale("log")
        ax.set_yscale("log")
        _style(ax, title, xlabel)
        ax.set_ylabel("ms per step", color=INK)
        ax.grid(color="#E3E6EA", lw=0.7)
        ax.legend(frameon=False, fontsize=9)
    return figure


def memory(rows: Mapping[str, tuple[float, float]]) -> Figure:
    """Bytes per parameter beside the parameter and its gradient.

    Args:
        rows: configuration to (state, temporaries of a step).
    """
    figure = _figure(8.6, 0.9 + 0.42 * len(rows))
    ax = figure.subplots()
    names = list(rows)
    state, temporary = [s for s, _ in rows.values()], [t for _, t in rows.values()]
    ax.barh(names, state, color=_READ, height=0.68, label="state, kept between steps")
    bars = ax.barh(names, temporary, left=state, color=_WRITTEN, height=0.68, label="temporaries of a step")
    ax.bar_label(bars, [f"{s + t:.2f}" for s, t in rows.values()], padding=4, fontsize=9, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max(s + t for s, t in rows.values()))
    _style(ax, "memory of the optimizer", "bytes per parameter")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def count(number: float) -> str:
    """A number of parameters as people say it.

    Example:
        >>> count(124_439_808), count(1_100_048_384)
        ('124 M', '1.1 G')
    """
    return f"{number / 1e9:.1f} G" if number >= 1e9 else f"{number / 1e6:.0f} M" if number >= 1e6 else f"{number:,.0f}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")


def _bars(ax: Axes, names: Sequence[str], times: Sequence[float], ours: Sequence[bool]) -> None:
    bars = ax.barh(names, times, color=[OURS if mine else OTHERS for mine in ours], height=0.68)
    ax.bar_label(bars, [f"{t:,.0f}" if t >= 100 else f"{t:.3g}" for t in times], padding=4, fontsize=9, color=INK)
    ax.set_ylim(len(names) - 0.1, -0.6)  # from above; below the last bar there is room for a word
    ax.set_xlim(0, 1.15 * max(times))


def _roofline(ax: Axes, at: float, label: str = "roofline") -> None:
    ax.axvline(at, color=INK, linestyle="--", linewidth=1.2, zorder=4)
    style: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "textcoords": "offset points",
        "fontsize": 8,
        "color": INK,
    }
    ax.annotate(f" {label}", (at, 0.0), xytext=(0, 2), va="bottom", **style)


def _style(ax: Axes, title: str, xlabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    ax.set_xlabel(xlabel, color=INK)
    ax.tick_params(colors=INK, length=0)
    ax.grid(axis="x", color="#E3E6EA", lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
