"""`python -m perf.report FILE...`: tables and pictures of results, whatever they are of.

Figures are made without pyplot: no window and no global state are touched.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from fusedopt import files
from fusedopt.columns import aligned
from perf import plans, results
from perf.plans import COPY
from perf.providers import LOOP
from perf.results import Record, Run
from perf.traffic import OWNERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS, INK = "#0072B2", "#B4BBC3", "#1F2933"
"""The package in blue, everyone else in grey: the eye should find one thing."""

SHARED = ("fusedopt", "torch fused", "optimi", "flashoptim", "bitsandbytes", "torch foreach", "timm", LOOP)
"""Providers in a table of shares: those with states of the parameter's dtype, or factored ones."""

_STACK = ("#56B4E9", "#E69F00")


def _plain(*fields: str) -> dict[str, str]:
    return {field: f"{{{field}}}" for field in fields}


TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "decay": (
        "weight decay in bfloat16, and bytes per parameter",
        {
            "optimizer": "{optimizer}",
            "": "{provider}",
            "weights left (right: {right:.3f})": "{left:.3f}",
            "weight + gradient + states": "{bytes[weight]:.0f} + {bytes[gradient]:.0f} + {bytes[state]:.2f}",
            "bytes": "{total:.2f}",
            "a step moves": "{moved:.1f}",
        },
    ),
    "part": ("parts of the evidence", _plain("part", "outcome", "seconds")),
    "traffic": (
        "bytes per parameter, read + written",
        {
            **_plain("rule", "case", "launches"),
            **{owner: f"{{bytes[{owner}][0]:.1f}} + {{bytes[{owner}][1]:.1f}}" for owner in OWNERS},
            "moved": "{moved:.1f}",
            "must": "{floor:.0f}",
            "": "{verdict}",
        },
    ),
    "counter": (
        "what the hardware counted of one step: time, and bytes per parameter from and to the memory",
        {
            **_plain("rule", "workload", "kernel", "launches"),
            "us": "{us:,.1f}",
            "read": "{read:.2f}",
            "written": "{written:.2f}",
            "of peak": "{of_peak:.0f}%",
            "registers": "{registers:.0f}",
        },
    ),
    "kernel": (
        "registers, spills, widths of memory accesses in bits; instructions per element, of those an H200 has time for",
        _plain(
            *("target", "rule", "kernel", "registers", "spilled", "shared", "reads", "writes", "instructions", "budget")
        ),
    ),
}
"""Title and columns (format strings over a record's fields) of all kinds of records but steps."""


def rows_of(kind: str, run: Run) -> list[dict[str, str]]:
    """Returns the rows of a table of `TABLES`; what could not be measured has its status in the first empty cell."""
    rows = []
    for r in run.of(kind):
        row = {head.format(**r): "" for head in TABLES[kind][1]}
        for head, form in zip(row, TABLES[kind][1].values()):
            with suppress(KeyError):
                row[head] = form.format(**r)
        if r.get("status", "measured") != "measured":
            row[next(head for head, cell in row.items() if not cell)] = r["status"]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, str]], markdown: bool = False) -> str:
    """Returns rows of the same fields as a table with its columns aligned, or as Markdown."""
    head, *lines = [list(rows[0]) if rows else [], *(list(row.values()) for row in rows)]
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
    return "\n".join(aligned([head, *lines], "<" * len(head), gap=2))


def _median_ms(record: Record) -> float:
    """The time of a step as it is compared: on a GPU the larger of what host and device need."""
    return float(record["step_ms"]["median"])


def _roofline(record: Record, run: Run) -> float | None:
    """The time that no step can beat, in milliseconds; None where parameters are so few that the host decides."""
    return run.floor_ms(record) if record["params"] > 1_000_000 else None


def _fastest_first(group: Iterable[Record]) -> list[Record]:
    return sorted((r for r in group if r["status"] == "measured"), key=_median_ms)


def steps_table(group: Sequence[Record], run: Run, markdown: bool = False) -> str:
    """Returns one comparison: fastest first; below it those without a number, with the reason."""
    measured = _fastest_first(group)
    ours = next((_median_ms(r) for r in measured if r["provider"] == "fusedopt"), None)
    counted = "launches" if any("launches" in r for r in measured) else "operations"
    rows = []
    for r in measured:
        floor = _roofline(r, run)
        rows.append(
            {
                "provider": r["provider"],
                "ms per step": f"{_median_ms(r):.3f}",
                "quartiles": "{p25:.3f} - {p75:.3f}".format(**r["step_ms"]),
                "times ours": f"{_median_ms(r) / ours:.2f}" if ours else "",
                "of roofline": f"{floor / (r.get('device_ms') or r['step_ms'])['median']:.0%}" if floor else "",
                counted: str(r.get(counted, "")),
                "state B/param": f"{r['state_bytes'] / r['params']:.2f}",
                "temporary": f"{r['temporary_bytes'] / 1e6:.1f} MB",
            }
        )
    reasons: dict[str, list[str]] = {}
    for r in group:
        if r["status"] != "measured":
            reasons.setdefault(r["status"], []).append(r["provider"])
    without = [f"{status} ({'; '.join(names)})" for status, names in reasons.items()]
    return "\n".join([table(rows, markdown), *([""] if markdown else []), *without])


def shares_table(run: Run, markdown: bool = False) -> str:
    """Returns what share of a copy's bandwidth each provider reaches with the fewest bytes that the update must move.

    By the time of the device, with the host ahead of it: what a training loop on large tensors waits for.
    """
    rows = []
    for (workload, _), group in run.comparisons.items():
        if shares := _shares(group, run):
            what = {"update": group[0]["rule"], "parameters": f"{workload.partition(':')[0]}, {group[0]['dtype']}"}
            rows.append(what | {name: f"{shares[name]:.1%}" if name in shares else "" for name in SHARED})
    return table(rows, markdown)


def _shares(group: Sequence[Record], run: Run) -> dict[str, float]:
    """Returns the share of each provider of one comparison; none of small tensors, whose time is the host's."""
    measured = [r for r in group if "device_ms" in r and "sweep" not in r]
    floors = [(r, floor) for r in measured if (floor := _roofline(r, run))]
    return {r["provider"].removeprefix("clip_grad_norm_ + "): floor / r["device_ms"]["median"] for r, floor in floors}


def goals_table(outcomes: Sequence[plans.Outcome], markdown: bool = False) -> str:
    """Returns every goal with what was measured."""
    rows = []
    for comparison, goal, verdict, *numbers in outcomes:
        form = "{:.1%}" if goal.theirs == COPY else "{:.3f}" if goal.kind == "time" else "{:.2f}"
        value, low, high, fastest = ("" if number is None else form.format(number) for number in numbers)
        aim = f"{comparison.rule}, {comparison.workload}: {goal}"
        interval = f"{low} - {high}" if low else ""
        rows.append(
            {"goal": aim, "measured": value, "95 % interval": interval, "by fastest": fastest, "verdict": verdict}
        )
    return table(rows, markdown)


def headlines(outcomes: Iterable[plans.Outcome]) -> str:
    """Returns the ratios that stand first as a Markdown list; of one that was not measured, why."""
    lines = []
    for _, goal, verdict, value, low, high, _ in outcomes:
        if goal.headline and value is None:
            lines.append(f"- ? {goal.headline}: {verdict}")
        elif goal.headline and goal.theirs == COPY:
            lines.append(f"- **{value:.1%}** of a copy's bandwidth: {goal.headline}")
        elif goal.headline:
            lines.append(f"- **{value:.2f} times** {goal.headline} ({low:.2f} to {high:.2f})")
    return "\n".join(lines)


def decay_table(run: Run, markdown: bool = False) -> str:
    """Returns what weight decay leaves of 16-bit weights, and the bytes per parameter, of every optimizer."""
    others = ", ".join(f"{name} {version}" for r in run.of("environment") for name, version in r["others"].items())
    return table(rows_of("decay", run), markdown) + (f"\n\nOther packages: {others}." if others else "")


def text(run: Run, markdown: bool = False) -> str:
    """Returns the whole report of one run."""
    heading, below = ("### ", "\n") if markdown else ("", "")
    parts = [run.machine] if run.machine else []
    if run.bandwidth:
        parts.append(run.bandwidth_line)
    for (workload, name), group in run.comparisons.items():
        size = f"{group[0]['params']:,} {group[0]['dtype']} parameters in {group[0]['tensors']:,} tensors"
        parts.append(f"{heading}{name}: {workload}, {size}\n{below}{steps_table(group, run, markdown)}")
    if run.device == "cuda" and run.comparisons:
        parts.append(f"{heading}share of a copy's bandwidth\n{below}{shares_table(run, markdown)}")
    if run.comparisons:
        parts.append(goals_table(plans.judge(run), markdown))
    for kind, (title, _) in TABLES.items():
        if run.of(kind):
            shown = decay_table(run, markdown) if kind == "decay" else table(rows_of(kind, run), markdown)
            parts.append(f"{heading}{title}\n\n{shown}")
    return "\n\n".join(parts)


def between_marks(document: str, run: Run) -> str:
    """Returns the document with machine and tables of a run between the marks of what it measured.

    Raises:
        ValueError: the document has none of these marks.
    """
    parts = {}
    if run.comparisons:
        outcomes = plans.judge(run)
        prefix = "" if run.device == "cpu" else "gpu "
        parts[f"{prefix}ratios"], parts[f"{prefix}measured"] = headlines(outcomes), goals_table(outcomes, markdown=True)
        if run.device == "cuda":
            parts["shares"] = f"{run.bandwidth_line}\n\n{shares_table(run, markdown=True)}"
    if run.of("counter"):
        parts["counters"] = table(rows_of("counter", run), markdown=True)
    if run.of("decay"):
        parts["decay"] = decay_table(run, markdown=True)
    here = {name: part for name, part in parts.items() if f"<!-- {name} -->" in document}
    if parts and not here:
        marks = " or ".join(f"<!-- {name} --> and <!-- /{name} -->" for name in parts)
        raise ValueError(f"the document needs the marks {marks}")
    for name, part in here.items():
        document = filled(document, name, run.machine, part)
    return document


def filled(document: str, name: str, *parts: str) -> str:
    """Returns the document with these parts between the marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    shown = "\n\n".join([begin, *filter(None, parts), end])
    text, found = re.subn(f"(?s){begin}.*?{end}", lambda _: shown, document, count=1)
    if not found:
        raise ValueError(f"the document needs the marks {begin} and {end}")
    return text


class Panel(NamedTuple):
    """Bars side by side."""

    title: str
    rows: Mapping[str, Sequence[float]]  # by provider, the parts of its bar
    floor: float | None = None  # where the roofline is


def steps_picture(run: Run, limit: int = 4) -> Figure:
    """Draws step times, a panel per comparison of AdamW and Adafactor; on a GPU, shares of a copy's bandwidth."""
    panels = []
    on_gpu = run.device == "cuda"
    for (workload, rule), group in run.comparisons.items():
        r = group[0]
        title = f"{rule}: {workload}, {_number(r['params'])} {r['dtype']} in {r['tensors']:,} tensors"
        if on_gpu and (shares := _shares(group, run)):
            best = sorted(((share, name) for name, share in shares.items() if name in SHARED), reverse=True)
            panels.append(Panel(title, {name: [100 * share] for share, name in best}, 100.0))
        elif not on_gpu and rule in ("adamw", "adafactor") and (measured := _fastest_first(group)):
            panels.append(Panel(title, {r["provider"]: [_median_ms(r)] for r in measured}, _roofline(r, run)))
    xlabel = "% of a copy's bandwidth, by the time of the device" if on_gpu else "ms per step"
    return bars_picture(panels[:limit], xlabel, note=run.machine)


def _number(params: int) -> str:
    return f"{params / 1e9:.2g} G" if params >= 1e9 else f"{params / 1e6:.3g} M"


def bars_picture(
    panels: Sequence[Panel], xlabel: str, parts: Sequence[str] = ("",), note: str = "", most_columns: int = 2
) -> Figure:
    """Draws bars; of more than one part, each part in its colour with its name in the legend."""
    from matplotlib.figure import Figure

    rows, columns = -(-len(panels) // most_columns) or 1, min(most_columns, len(panels)) or 1
    figure = Figure((6.4 * columns, 0.6 + 3.1 * rows), dpi=100, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (title, bars, floor) in zip(axes, panels):
        totals = [sum(lengths) for lengths in bars.values()]
        for index, part in enumerate(parts):
            begin, length = zip(*((sum(lengths[:index]), lengths[index]) for lengths in bars.values()))
            who = [OURS if name.startswith("fusedopt") else OTHERS for name in bars]
            drawn = ax.barh(list(bars), length, left=begin, color=_STACK[index] if part else who, label=part)
        labels = [f"{total:,.0f}" if total >= 100 else f"{total:.3g}" for total in totals]
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # a number may lie across the roofline
        ax.bar_label(drawn, labels, padding=4, fontsize=9, color=INK, zorder=5, bbox=behind)
        ax.set_ylim(len(bars) - 0.1, -0.6)  # from above; below the last bar there is room for a word
        ax.set_xlim(0, 1.15 * max(totals))
        _dress(ax, title, xlabel, "x")
        if floor:
            ax.axvline(floor, color=INK, linestyle="--", linewidth=1.2, zorder=4)
            place = ax.get_xaxis_transform()
            ax.text(floor, 0.01, " roofline", transform=place, va="bottom", fontsize=8, color=INK)
    for ax in axes[len(panels) :]:
        ax.remove()
    if len(parts) > 1:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(parts), frameon=False, fontsize=9)
    figure.supxlabel(note, fontsize=8, color="#52606D")
    return figure


def lines_picture(curves: Mapping[str, tuple[Sequence[float], str]], every: int, title: str, xlabel: str) -> Figure:
    """Draws curves by name: values `every` so many steps, and a colour. Each is thinner than the last; all show."""
    from matplotlib.figure import Figure

    figure = Figure((8.0, 3.9), dpi=100, layout="constrained", facecolor="white")
    ax: Axes = figure.subplots()
    for index, (name, (y, color)) in enumerate(curves.items()):
        x, width = range(0, every * len(y), every), 2.0 * (len(curves) - index) - 0.5
        ax.plot(x, y, color=color, linewidth=width, label=name, solid_capstyle="butt")
    _dress(ax, title, xlabel, "y")
    ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _dress(ax: Axes, title: str, xlabel: str, grid: Literal["x", "y"]) -> None:
    """Title, label and grid, and as few lines as possible."""
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    ax.set_xlabel(xlabel, color=INK)
    ax.tick_params(colors=INK, length=0)
    ax.grid(axis=grid, color="#E3E6EA", lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)


def publish(run: Run, pages: Sequence[Path] = (), markdown: bool = False) -> None:
    """Prints the report of a run, and puts machine and tables between the marks in these files."""
    print(text(run, markdown), flush=True)
    for page in pages:
        files.write_text(page, between_marks(page.read_text(), run))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.report", description="Tables and pictures from results.")
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines of any command of perf")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--picture", type=Path, help="also draw the bars into this file")
    parser.add_argument(
        "--into", type=Path, nargs="*", default=[], help="also put machine and tables between the marks in these files"
    )
    options = parser.parse_args(arguments)
    run = Run([record for path in options.files for record in results.read(path)])
    publish(run, options.into, options.markdown)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        files.save_figure(steps_picture(run), options.picture, dpi=130)


if __name__ == "__main__":
    main()
