"""`ncu --csv ... | python -m perf.counters --workload NAME --rule RULE`: what the hardware counted of one step.

Reads the metrics of `perf.evidence` on standard input; launches of one kernel are added up.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from perf import report, results, workloads
from perf.results import Record, Run

METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of_peak",
    "launch__registers_per_thread": "registers",
}
"""Names of ncu, and of the fields of a record."""

_FACTORS = {
    **{"ns": 1e-3, "us": 1.0, "ms": 1e3, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    **{"%": 1.0, "register/thread": 1.0},
}


def read(lines: Iterable[str], workload: str, rule: str) -> list[Record]:
    """Returns a record per kernel, in the order of their first launches, and one of all together.

    Times are in microseconds, bytes per parameter; `of_peak` is the share of the memory's peak in percent, of several
    launches that of the longest.

    Args:
        lines: of ncu; what comes before the head of its table is left out.
        workload: of the step.
        rule: of the step.

    Raises:
        ValueError: there is no launch among the lines, which say why.
    """
    lines = list(lines)
    params = workloads.get(workload).params
    launches: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row in csv.DictReader(_table(lines)):
        names[row["ID"]] = row["Kernel Name"]
        value = float(row["Metric Value"].replace(",", "")) * _FACTORS[row["Metric Unit"]]
        launches.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = value
    if not launches:
        raise ValueError("ncu counted no launch, and printed:\n" + "\n".join(map(str.rstrip, lines)))
    of: dict[str, list[dict[str, float]]] = {}
    for number, values in launches.items():
        of.setdefault(names[number], []).append(values)
    of["all"] = list(launches.values())
    records = []
    for kernel, steps in of.items():
        longest = max(steps, key=lambda values: values["us"])
        sums = {name: sum(values[name] for values in steps) for name in ("us", "read", "written")}
        record = {"kind": "counter", "workload": workload, "rule": rule, "kernel": kernel, "launches": len(steps)}
        record |= {"us": sums["us"], "read": sums["read"] / params, "written": sums["written"] / params}
        alone = {name: longest[name] for name in ("of_peak", "registers")} if kernel != "all" else {}
        records.append({**record, **alone})
    return records


def _table(lines: Iterable[str]) -> Iterable[str]:
    found = False
    for line in lines:
        found = found or line.startswith('"ID",')
        if found and line.startswith('"'):
            yield line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.counters", description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", required=True, help="of the step that ncu looks at")
    parser.add_argument("--rule", default="adamw", help="and the rule of that step")
    parser.add_argument("--out", type=Path, help="append the records to this file, as JSON lines")
    options = parser.parse_args(arguments)
    records = read(sys.stdin, options.workload, options.rule)
    if options.out:
        results.append(options.out, records)
    print(report.text(Run(records)))


if __name__ == "__main__":
    main()
