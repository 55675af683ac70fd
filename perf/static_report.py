"""`python -m perf.static_report`: what can be known of the kernels without a GPU.

For each configuration: the launches of a step and the bytes per parameter that they read and write, counted in Triton's
interpreter and held against the roofline's. For each kernel and architecture: registers, spills and the widths of its
accesses, from the compiler.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fusedopt
from fusedopt import backends
from perf import compiled, report, traffic
from perf.providers import RULES
from perf.results import ROOT, Record

SHAPES = ((64, 96), (128, 32), (256,), (48, 64))
"""Of the parameters that bytes are counted on: sizes that are multiples of 16, as almost all tensors of models are."""

OWNERS = ("parameter", "gradient", "state")


class Case(NamedTuple):
    """A configuration whose bytes are counted."""

    name: str
    rule: str  # a key of `perf.providers.RULES`
    dtype: torch.dtype = torch.float32  # of parameters and gradients
    options: Mapping[str, Any] = {}  # of the constructor, beside the rule's
    extra: float = 0.0  # bytes per parameter beyond the floor of its rule

    @property
    def floor(self) -> float:
        return RULES[self.rule].floor(self.dtype) + self.extra

    @property
    def allowed(self) -> float:
        """Bytes per parameter; partial sums are as large for 16-bit tensors as for float32."""
        return self.floor * (1 + RULES[self.rule].slack * 4 / self.dtype.itemsize)

    def make(self, params: list[torch.Tensor]) -> torch.optim.Optimizer:
        rule = RULES[self.rule]
        limit = {"max_grad_norm": rule.max_grad_norm} if rule.max_grad_norm is not None else {}
        make = getattr(fusedopt, rule.ours)
        optimizer: torch.optim.Optimizer = make(params, backend="triton", **{**rule.options, **limit, **self.options})
        return optimizer


_CLIPPING = "adamw, clipped"

CASES = (
    Case("AdamW, float32", "adamw"),
    Case("AdamW, bfloat16", "adamw", torch.bfloat16),
    Case("AdamW, float16", "adamw", torch.float16),
    Case("AdamW, float64", "adamw", torch.float64),
    Case("AdamW, amsgrad, float32", "adamw", options={"amsgrad": True}, extra=8.0),
    Case("AdamW, clipping, float32", _CLIPPING),
    Case("AdamW, clipping, bfloat16", _CLIPPING, torch.bfloat16),
    Case("Adafactor, float32", "adafactor"),
    Case("Adafactor, bfloat16", "adafactor", torch.bfloat16),
)


def count(case: Case, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Record:
    """Returns the launches and bytes of a step; runs where TRITON_INTERPRET=1 is set."""
    traced = traffic.trace(case.make, shapes, case.dtype)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    kinds = {k: [traced.read[k] / elements, traced.written[k] / elements] for k in (*OWNERS, "else")}
    moved = sum(sum(kinds[owner]) for owner in OWNERS)
    row = {"kind": "traffic", "case": case.name, "launches": traced.kernels, "bytes": kinds}
    return {**row, "moved": moved, "floor": case.floor, "ok": moved <= case.allowed}


def count_all(cases: Sequence[Case] = CASES) -> list[Record]:
    """Counts cases, in a process of its own where Triton's interpreter is not already on."""
    if backends.interpreting():
        return [count(case) for case in cases]
    command = [sys.executable, "-m", "perf.static_report", "--count", *(case.name for case in cases)]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"counting failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def moved(row: Record) -> tuple[float, float]:
    """Returns the bytes per parameter that a counted case reads and writes, without tables and workspace."""
    read, written = (sum(row["bytes"][owner][side] for owner in OWNERS) for side in (0, 1))
    return read, written


def traffic_table(rows: Sequence[Record]) -> str:
    """Returns bytes per parameter, read and written, by whose memory it is."""
    head = ("step", "launches", *OWNERS, "moved", "must", "")
    body = []
    for row in rows:
        cells = ["{:.1f} + {:.1f}".format(*row["bytes"][owner]) for owner in OWNERS]
        numbers = (str(len(row["launches"])), *cells, f"{row['moved']:.1f}", f"{row['floor']:.0f}")
        body.append((row["case"], *numbers, "" if row["ok"] else "MOVES TOO MUCH"))
    return report.table(head, body)


def compile_all(targets: Sequence[str], dtypes: Sequence[str] | None = None) -> list[Record]:
    """Compiles every kernel for targets; not where Triton's interpreter is on. `dtypes`: those of `compiled.DTYPES`."""
    rows: list[Record] = []
    for target in targets:
        for name, launch, _ in compiled.variants(target, dtypes):
            found = compiled.resources(launch.code)._asdict()
            row = {"kind": "variant", "target": target, "kernel": launch.kernel, "variant": name}
            rows.append({**row, **found, "ok": found["spilled"] == 0})
    return rows


def variant_table(rows: Sequence[Record]) -> str:
    """Returns registers, spills, shared memory and the widths of the accesses, in bits (x how many)."""
    columns = ("target", "kernel", "variant", "registers", "spilled", "shared")
    body = [
        (
            *(str(row[column]) for column in columns),
            *(" ".join(f"{w}x{n}" for w, n in sorted(row[k].items(), reverse=True)) for k in ("reads", "writes")),
        )
        for row in rows
    ]
    return report.table((*columns, "reads", "writes"), body)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.static_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the rows to this file, as JSON lines")
    parser.add_argument("--smoke", action="store_true", help="the first case of each part")
    parser.add_argument("--count", nargs="+", help=argparse.SUPPRESS)  # cases, in a process with the interpreter
    options = parser.parse_args(arguments)
    if options.count:
        print("\n".join(json.dumps(row) for row in count_all([c for c in CASES if c.name in options.count])))
        return 0
    rows = count_all(CASES[:1] if options.smoke else CASES)
    print(f"bytes per parameter, read + written\n\n{traffic_table(rows)}")
    if not backends.interpreting():
        found = compile_all(["sm_90"], ["float16"]) if options.smoke else compile_all(list(compiled.TARGETS))
        print(f"\nregisters, spills and widths of memory accesses\n\n{variant_table(found)}")
        rows += found
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
