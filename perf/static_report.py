"""`python -m perf.static_report`: what can be known of the kernels without a GPU.

For each configuration: the launches of a step and the bytes per parameter that they read and write, counted in Triton's
interpreter and held against the roofline's. For each kernel and architecture: registers, spills and the widths of its
accesses, from the compiler; for sm_90, instructions per element beside those that an H200 may issue.
"""

import argparse
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

from perf import compiled, report, results, sass, traffic
from perf.cases import CASES, DTYPES, Case
from perf.providers import RULES
from perf.results import Record, Run

SHAPES = ((64, 96), (128, 32), (256,), (48, 64))
"""Of the parameters that bytes are counted on: sizes that are multiples of 16, as almost all tensors of models are."""


def count(case: Case) -> Record:
    """Returns the launches and bytes per parameter of a step; runs where TRITON_INTERPRET=1 is set.

    It is "ok" if the step moves no more than the floor, and partial sums, which are as large for 16-bit tensors as for
    float32. Launch tables and workspace ("else") are not counted in.
    """
    dtype = DTYPES[case.dtypes][0]
    traced = traffic.trace(case.make, SHAPES, dtype)
    numbers = 8 * len(SHAPES) / sum(map(prod, SHAPES))  # of the parameters, an int64 each, where rounding is random
    ok = traced.moved <= case.floor * (1 + RULES[case.rule].slack * 4 / dtype.itemsize) + numbers
    found = {"launches": len(traced.kernels), "bytes": traced.per_parameter(), "moved": traced.moved}
    verdict = {"floor": case.floor, "ok": ok, "verdict": "" if ok else "MOVES TOO MUCH"}
    return {"kind": "traffic", "rule": case.rule, "case": case.name, **found, **verdict}


def of_one_dtype(cases: Sequence[Case]) -> list[Case]:
    """Returns the cases with a floor: parameters, gradients and moments have the same dtype."""
    return [case for case in cases if len(set(DTYPES[case.dtypes])) == 1]


def compile_for(target: str, cases: Sequence[Case]) -> list[Record]:
    """Compiles the kernels of cases, where Triton's interpreter is off. They are "ok" if they spill no register."""
    found = []
    for case, name, launch in compiled.kernels(target, cases):
        takes = compiled.resources(launch.code)
        row = {"kind": "kernel", "target": target, "rule": case.rule, "kernel": name, **takes._asdict()}
        needs = sass.issued(launch) if target == "sm_90" else None
        row["instructions"] = f"{needs.instructions:.1f}" if needs else ""
        row["budget"] = f"{needs.share:.0%} of {needs.budget:.0f}" if needs else ""
        for access in ("reads", "writes"):  # width x number, the widest first
            row[access] = " ".join(f"{width}x{n}" for width, n in sorted(row[access].items(), reverse=True))
        found.append({**row, "ok": takes.spilled == 0})
    return found


def rows(targets: Sequence[str], cases: Sequence[Case] = CASES) -> list[Record]:
    """Compiles cases and, in a process of its own with Triton's interpreter, counts those with a floor."""
    with traffic.interpreted(count, of_one_dtype(cases)) as counts:
        kernels = [row for target in targets for row in compile_for(target, cases)]
        return [*counts, *kernels]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.static_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--smoke", action="store_true", help="the first case of each part")
    options = parser.parse_args(arguments)
    found = rows(["sm_90"], CASES[:1]) if options.smoke else rows(list(compiled.TARGETS))
    if options.out:
        results.append(options.out, found)
    print(report.text(Run(found)))
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
