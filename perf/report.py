"""Tables and pictures from results. `python -m perf.report FILE... [--markdown] [--picture OUT.png]`."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from perf import goals, results
from perf.results import Record

COLUMNS = (
    "provider",
    "ms per step",
    "quartiles",
    "times ours",
    "of roofline",
    "launches",
    "state B/param",
    "temporary",
)


def comparisons(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The measured and the missing, by (workload, rule), in the order of their measurement."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.get("kind") == "step":
            groups.setdefault((record["workload"], record["rule"]), []).append(record)
    return groups


def copy_bandwidth(records: Iterable[Record]) -> float | None:
    """The best copy of a run, in bytes per second."""
    return max((r["bytes_per_second"] for r in records if r.get("kind") == "copy"), default=None)


def floor_ms(record: Record, bandwidth: float) -> float:
    """The time that the fewest bytes of this record's update take at a bandwidth."""
    return float(record["floor_bytes"]) * record["params"] / bandwidth * 1e3


def best_ms(record: Record) -> float:
    """The time of a step as it is compared: on a GPU the larger of what host and device need."""
    return float(record["step_ms"]["median"])


def table(group: Sequence[Record], bandwidth: float | None, markdown: bool = False) -> str:
    """One comparison: fastest first; below it those without a number, with the reason."""
    measured = sorted((r for r in group if r["status"] == "measured"), key=best_ms)
    ours = next((best_ms(r) for r in measured if r["provider"] == "fusedopt"), None)
    counted = "launches" if any("launches" in r for r in measured) else "operations"
    rows = grid([*COLUMNS[:5], counted, *COLUMNS[6:]], [_row(r, ours, bandwidth) for r in measured], markdown)
    reasons: dict[str, list[str]] = {}
    for r in group:
        if r["status"] != "measured":
            reasons.setdefault(r["status"], []).append(r["provider"])
    without = [f"{status} ({'; '.join(names)})" for status, names in reasons.items()]
    return "\n".join([rows, *([""] if markdown else []), *without])


def _row(r: Record, ours: float | None, bandwidth: float | None) -> tuple[str, ...]:
    q = r["step_ms"]
    on_device: Record = r.get("device_ms") or q
    share = floor_ms(r, bandwidth) / on_device["median"] if bandwidth else None
    return (
        r["provider"],
        f"{q['median']:.3f}",
        f"{q['p25']:.3f} - {q['p75']:.3f}",
        f"{q['median'] / ours:.2f}" if ours else "",
        f"{share:.0%}" if share is not None and r["params"] > 1_000_000 else "",
        str(r.get("launches", r.get("operations", ""))),
        f"{r['state_bytes'] / r['params']:.2f}" if "state_bytes" in r else "",
        f"{r['temporary_bytes'] / 1e6:.1f} MB" if "temporary_bytes" in r else "",
    )


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """A table with its columns aligned, or as Markdown."""
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [head, *rows])


def goal_table(outcomes: Sequence[goals.Outcome], markdown: bool = False) -> str:
    """Every goal with what was measured."""
    rows = []
    for o in outcomes:
        if o.value is None:
            rows.append((str(o.goal), "", "", "", o.verdict))
        else:
            form = "{:.1%}" if o.goal.kind == "bandwidth" else "{:.3f}" if o.goal.kind == "time" else "{:.2f}"
            value, low, high, fastest = (form.format(x) for x in (o.value, o.low, o.high, o.fastest))
            rows.append((str(o.goal), value, f"{low} - {high}", fastest, o.verdict))
    return grid(("goal", "measured", "95 % interval", "by fastest", "verdict"), rows, markdown)


def text(records: Sequence[Record], markdown: bool = False) -> str:
    """The whole report of one run."""
    head = next((r for r in records if r.get("kind") == "environment"), None)
    bandwidth = copy_bandwidth(records)
    parts = [results.machine(head)] if head else []
    if bandwidth:
        parts.append(f"roofline: {bandwidth / 1e9:.1f} GB/s, bytes read plus bytes written")
    for (_, rule), group in comparisons(records).items():
        r = group[0]
        parts.append(
            f"{'### ' if markdown else ''}{rule}: {r['workload']}, {r['params']:,} {r['dtype']} parameters "
            f"in {r['tensors']:,} tensors\n{chr(10) * markdown}{table(group, bandwidth, markdown)}"
        )
    outcomes = goals.judge(records, device_of(records))
    if outcomes:
        parts.append(goal_table(outcomes, markdown))
    return "\n\n".join(parts)


BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def between_marks(document: str, records: Sequence[Record]) -> str:
    """The document with machine and goals of a run between its marks, instead of what stood there.

    Raises:
        ValueError: the document has no marks.

    Example:
        >>> between_marks(f"a {BEGIN} old {END} b", []).split()[:3]
        ['a', '<!--', 'measured']
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document needs the marks {BEGIN} and {END}")
    head = next((results.machine(r) for r in records if r.get("kind") == "environment"), "")
    table_of_goals = goal_table(goals.judge(records, device_of(records)), markdown=True)
    return f"{before}{begin}\n\n{head}\n\n{table_of_goals}\n\n{end}{after}"


def device_of(records: Iterable[Record]) -> str:
    """ "cpu" or "cuda"."""
    return next((r["device"] for r in records if r.get("kind") == "environment"), "cpu")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines of perf.bench or perf.evidence")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--goals", action="store_true", help="only the goals and what was measured")
    parser.add_argument("--picture", type=Path, help="also draw the bars into this file")
    parser.add_argument("--into", type=Path, help="also put machine and goals between the marks in this Markdown file")
    options = parser.parse_args(arguments)
    from perf import pictures

    records = [record for path in options.files for record in results.read(path)]
    if options.goals:
        print(goal_table(goals.judge(records, device_of(records)), options.markdown))
    else:
        print(text(records, options.markdown))
    if options.into:
        options.into.write_text(between_marks(options.into.read_text(), records))
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        pictures.steps(records).savefig(options.picture, dpi=130)


if __name__ == "__main__":
    main()
