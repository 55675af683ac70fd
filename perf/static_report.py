"""`python -m perf.static_report`: what can be known of the kernels without a GPU.

For each configuration: the launches of a step and the bytes per parameter that they read and write, counted in Triton's
interpreter and held against the roofline's. For each kernel and architecture: registers, spills and the widths of its
accesses, from the compiler.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from perf import compiled, report, results, traffic
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
    elements = sum(map(prod, SHAPES))
    moved = {o: [traced.total(a, o) / elements for a in ("read", "written")] for o in (*traffic.OWNERS, "else")}
    read, written = (sum(moved[owner][access] for owner in traffic.OWNERS) for access in (0, 1))
    row = {"kind": "traffic", "rule": case.rule, "case": case.name, "launches": traced.kernels, "bytes": moved}
    allowed = case.floor * (1 + RULES[case.rule].slack * 4 / dtype.itemsize)
    return {**row, "read": read, "written": written, "floor": case.floor, "ok": read + written <= allowed}


def of_one_dtype(cases: Sequence[Case]) -> list[Case]:
    """Returns the cases with a floor: parameters, gradients and moments have the same dtype."""
    return [case for case in cases if len(set(DTYPES[case.dtypes])) == 1]


def compile_for(target: str, cases: Sequence[Case]) -> list[Record]:
    """Compiles the kernels of cases, where Triton's interpreter is off."""
    rows = []
    for case, name, launch in compiled.kernels(target, cases):
        found = compiled.resources(launch.code)._asdict()
        row = {"kind": "kernel", "target": target, "rule": case.rule, "kernel": name}
        rows.append({**row, **found, "ok": found["spilled"] == 0})
    return rows


def rows(targets: Sequence[str], cases: Sequence[Case] = CASES) -> list[Record]:
    """Compiles cases and, in a process of its own with Triton's interpreter, counts those with a floor."""
    counted = of_one_dtype(cases)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            counts = process.map(count, counted)  # which starts the process
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
