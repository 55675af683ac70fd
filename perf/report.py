"""`python -m perf.report FILE...`: tables and pictures of results.

Figures are made without pyplot: no window and no global state are touched.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perf import goals, results
from perf.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"

OURS, OTHERS, INK = "#0072B2", "#B4BBC3", "#1F2933"
"""The package in blue, everyone else in grey: the eye should find one thing."""

_STACK = ("#56B4E9", "#E69F00")
_LINES = ("#E69F00", "#CC79A7", "#009E73", "#8C6D31", "#404040")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Returns a table with its columns aligned, or as Markdown."""
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [head, *rows])


def comparisons(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Returns the records of steps by workload and rule or sweep, in the order of their measurement."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r.get("kind") == "step":
            groups.setdefault((r["workload"], str(r.get("sweep", r["rule"]))), []).append(r)
    return groups


def copy_bandwidth(records: Iterable[Record]) -> float | None:
    """Returns the best copy of a run, in bytes per second."""
    return max((r["bytes_per_second"] for r in records if r.get("kind") == "copy"), default=None)


def environment(records: Iterable[Record]) -> tuple[str, str]:
    """Returns a line about the machine, and "cpu" or "cuda"."""
    head = next((r for r in records if r.get("kind") == "environment"), None)
    return (results.machine(head), head["device"]) if head else ("", "cpu")


def floor_ms(record: Record, bandwidth: float) -> float:
    """Returns the time that the fewest bytes of this record's update take at a bandwidth."""
    return float(record["floor_bytes"] * record["params"] / bandwidth * 1e3)


def _median_ms(record: Record) -> float:
    """The time of a step as it is compared: on a GPU the larger of what host and device need."""
    return float(record["step_ms"]["median"])


def _fastest_first(group: Iterable[Record]) -> list[Record]:
    return sorted((r for r in group if r["status"] == "measured"), key=_median_ms)


def steps_table(group: Sequence[Record], bandwidth: float | None, markdown: bool = False) -> str:
    """Returns one comparison: fastest first; below it those without a number, with the reason."""
    measured = _fastest_first(group)
    ours = next((_median_ms(r) for r in measured if r["provider"] == "fusedopt"), None)
    counted = "launches" if any("launches" in r for r in measured) else "operations"
    rows = []
    for r in measured:
        q, on_device = r["step_ms"], r.get("device_ms") or r["step_ms"]
        large = bandwidth is not None and r["params"] > 1_000_000
        rows.append(
            (
                r["provider"],
                f"{q['median']:.3f}",
                f"{q['p25']:.3f} - {q['p75']:.3f}",
                f"{q['median'] / ours:.2f}" if ours else "",
                f"{floor_ms(r, bandwidth or 1.0) / on_device['median']:.0%}" if large else "",
                str(r.get(counted, "")),
                f"{r['state_bytes'] / r['params']:.2f}" if "state_bytes" in r else "",
                f"{r['temporary_bytes'] / 1e6:.1f} MB" if "temporary_bytes" in r else "",
            )
        )
    head = ("provider", "ms per step", "quartiles", "times ours", "of roofline", counted, "state B/param", "temporary")
    reasons: dict[str, list[str]] = {}
    for r in group:
        if r["status"] != "measured":
            reasons.setdefault(r["status"], []).append(r["provider"])
    without = [f"{status} ({'; '.join(names)})" for status, names in reasons.items()]
    return "\n".join([table(head, rows, markdown), *([""] if markdown else []), *without])


def goals_table(outcomes: Sequence[goals.Outcome], markdown: bool = False) -> str:
    """Returns every goal with what was measured."""
    rows = []
    for o in outcomes:
        form = {"bandwidth": "{:.1%}", "time": "{:.3f}", "speedup": "{:.2f}"}[o.goal.kind]
        numbers = (o.value, o.low, o.high, o.fastest)
        value, low, high, fastest = ("" if number is None else form.format(number) for number in numbers)
        rows.append((str(o.goal), value, f"{low} - {high}" if low else "", fastest, o.verdict))
    return table(("goal", "measured", "95 % interval", "by fastest", "verdict"), rows, markdown)


def text(records: Sequence[Record], markdown: bool = False) -> str:
    """Returns the whole report of one run."""
    machine, device = environment(records)
    bandwidth = copy_bandwidth(records)
    parts = [machine] if machine else []
    if bandwidth:
        parts.append(f"roofline: {bandwidth / 1e9:.1f} GB/s, bytes read plus bytes written")
    for (workload, name), group in comparisons(records).items():
        size = f"{group[0]['params']:,} {group[0]['dtype']} parameters in {group[0]['tensors']:,} tensors"
        title = f"{'### ' * markdown}{name}: {workload}, {size}\n{chr(10) * markdown}"
        parts.append(title + steps_table(group, bandwidth, markdown))
    return "\n\n".join([*parts, goals_table(goals.judge(records, device), markdown)])


def between_marks(document: str, records: Sequence[Record]) -> str:
    """Returns the document with machine and goals of a run between its marks, instead of what stood there."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document needs the marks {BEGIN} and {END}")
    machine, device = environment(records)
    table_of_goals = goals_table(goals.judge(records, device), markdown=True)
    return f"{before}{begin}\n\n{machine}\n\n{table_of_goals}\n\n{end}{after}"


def steps_picture(records: Sequence[Record], limit: int = 4) -> Figure:
    """Draws step times as bars, a panel per comparison of AdamW and Adafactor, and the roofline as a line."""
    bandwidth = copy_bandwidth(records)
    groups = {key: _fastest_first(group) for key, group in comparisons(records).items()}
    shown = [(key, group) for key, group in groups.items() if group and key[1] in ("adamw", "adafactor")][:limit]
    columns = min(2, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = _figure(6.4 * columns, 0.6 + 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, ((workload, rule), group) in zip(axes, shown):
        r, times = group[0], [_median_ms(r) for r in group]
        bars = ax.barh([r["provider"] for r in group], times, color=[OURS if r["ours"] else OTHERS for r in group])
        _label(ax, bars, times, [f"{t:,.0f}" if t >= 100 else f"{t:.3g}" for t in times])
        size = f"{r['params'] / 1e6:,.3g} M {r['dtype']} in {r['tensors']:,} tensors"
        _style(ax, f"{rule}: {workload}, {size}", "ms per step")
        if bandwidth and r["params"] > 1_000_000:
            _line(ax, floor_ms(r, bandwidth), "roofline")
    for ax in axes[len(shown) :]:
        ax.remove()
    figure.supxlabel(environment(records)[0], fontsize=8, color="#52606D")
    return figure


def stacked_picture(
    panels: Mapping[str, Mapping[str, tuple[float, float]]],
    labels: tuple[str, str],
    xlabel: str,
    floors: Mapping[str, float] = {},
) -> Figure:
    """Draws two quantities as stacked bars: title to provider to both of them; `floors`: title to the least total."""
    figure = _figure(6.4 * len(panels), 1.2 + 0.42 * max(map(len, panels.values())))
    for ax, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False).ravel(), panels.items()):
        names, (first, second) = list(rows), zip(*rows.values())
        ax.barh(names, first, color=_STACK[0], label=labels[0])
        bars = ax.barh(names, second, left=first, color=_STACK[1], label=labels[1])
        totals = [a + b for a, b in rows.values()]
        _label(ax, bars, totals, [f"{total:.4g}" for total in totals])
        _style(ax, title, xlabel)
        if title in floors:
            _line(ax, floors[title], "fewest possible")
        handles = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def lines_picture(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], xlabels: Sequence[str]) -> Figure:
    """Draws step time over something, both logarithmic: title to provider to (x, milliseconds), an x label each."""
    figure = _figure(6.4 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False).ravel()
    for ax, (title, curves), xlabel in zip(axes, panels.items(), xlabels):
        colours = iter(_LINES)
        for name, points in curves.items():
            ours = name == "fusedopt"
            colour = OURS if ours else next(colours)
            ax.plot(*zip(*points), "o-", color=colour, lw=2.4 if ours else 1.4, label=name, zorder=3 - ours)
        _style(ax, title, xlabel)
        ax.set(xscale="log", yscale="log", ylabel="ms per step")
        ax.grid(axis="both", color="#E3E6EA", lw=0.7)
        ax.legend(frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")


def _label(ax: Axes, bars: object, lengths: Sequence[float], labels: Sequence[str]) -> None:
    ax.bar_label(bars, labels, padding=4, fontsize=9, color=INK)  # type: ignore[arg-type]
    ax.set_ylim(len(lengths) - 0.1, -0.6)  # from above; below the last bar there is room for a word
    ax.set_xlim(0, 1.15 * max(lengths))


def _line(ax: Axes, at: float, label: str) -> None:
    ax.axvline(at, color=INK, linestyle="--", linewidth=1.2, zorder=4)
    ax.text(at, 0.01, f" {label}", transform=ax.get_xaxis_transform(), va="bottom", fontsize=8, color=INK)


def _style(ax: Axes, title: str, xlabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    ax.set_xlabel(xlabel, color=INK)
    ax.tick_params(colors=INK, length=0)
    ax.grid(axis="x", color="#E3E6EA", lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.report", description="Tables and pictures from results.")
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines of perf.bench or perf.evidence")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--picture", type=Path, help="also draw the bars into this file")
    parser.add_argument("--into", type=Path, help="also put machine and goals between the marks in this Markdown file")
    options = parser.parse_args(arguments)
    records = [record for path in options.files for record in results.read(path)]
    print(text(records, options.markdown))
    if options.into:
        options.into.write_text(between_marks(options.into.read_text(), records))
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        steps_picture(records).savefig(options.picture, dpi=130)


if __name__ == "__main__":
    main()
