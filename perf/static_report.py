"""`python -m perf.static_report`: what can be known of the kernels without a GPU.

For each configuration: the launches of a step and the bytes per parameter that they read and write, counted in Triton's
interpreter and held against the roofline's. For each kernel variant and architecture: registers, spills and the widths
of its accesses, from the compiler.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf import roofline
from perf.results import ROOT, Record

SHAPES = ((64, 96), (128, 32), (256,), (48, 64))
"""Of the parameters that bytes are counted on: sizes that are multiples of 16, as almost all tensors of models are."""


class Case(NamedTuple):
    """A configuration whose bytes are counted.

    Attributes:
        name: for the table.
        optimizer: a class of `fusedopt`.
        options: of its constructor.
        dtype: of parameters and gradients.
        rule: of `perf.roofline.floor`.
        storage: as there.
        extra: bytes per parameter that this configuration must move beyond the floor of its rule.
        slack: share of the floor that partial sums and the like may add.
    """

    name: str
    optimizer: str
    options: dict[str, Any]
    dtype: torch.dtype
    rule: str
    storage: str = "native"
    extra: float = 0.0
    slack: float = 0.0

    @property
    def floor(self) -> float:
        return roofline.floor(self.rule, self.dtype, self.storage).total + self.extra


_F32, _BF16, _F16, _F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

CASES = (
    Case("AdamW, float32", "AdamW", {}, _F32, "adamw"),
    Case("AdamW, bfloat16", "AdamW", {}, _BF16, "adamw"),
    Case("AdamW, float16", "AdamW", {}, _F16, "adamw"),
    Case("AdamW, float64", "AdamW", {}, _F64, "adamw"),
    Case("AdamW, amsgrad, float32", "AdamW", {"amsgrad": True}, _F32, "adamw", extra=8.0),
    Case("AdamW, clipping, float32", "AdamW", {"max_grad_norm": 1.0}, _F32, "adamw, clipped", slack=0.02),
    Case("AdamW, clipping, bfloat16", "AdamW", {"max_grad_norm": 1.0}, _BF16, "adamw, clipped", slack=0.04),
    Case("AdamW, master, bfloat16", "AdamW", {"storage": "master"}, _BF16, "adamw", "master"),
    Case("AdamW, master, float16", "AdamW", {"storage": "master"}, _F16, "adamw", "master"),
    Case("AdamW, stochastic, bfloat16", "AdamW", {"storage": "stochastic"}, _BF16, "adamw", "stochastic"),
    Case("Adafactor, float32", "Adafactor", {}, _F32, "adafactor", slack=0.1),
    Case("Adafactor, bfloat16", "Adafactor", {}, _BF16, "adafactor", slack=0.2),
)


def missing(case: Case) -> str | None:
    """Why a case cannot be counted, or None."""
    from perf.providers import exists

    needs = [f"fusedopt.{case.optimizer}", *(f"fusedopt.{case.optimizer}({option})" for option in case.options)]
    return next((f"{need} is not there" for need in needs if not exists(need)), None)


def count(case: Case, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Record:
    """The launches and bytes of a step; runs where TRITON_INTERPRET=1 is set."""
    import fusedopt
    from perf import interpreted

    def make(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(fusedopt, case.optimizer)(params, backend="triton", **case.options)
        return optimizer

    books = interpreted.count(make, shapes, case.dtype)
    elements = sum(int(torch.Size(shape).numel()) for shape in shapes)
    kinds = {kind: [n / elements for n in books.total(kind)] for kind in interpreted.KINDS}
    moved = sum(sum(kinds[kind]) for kind in ("parameter", "gradient", "state"))
    return {
        "kind": "traffic",
        "case": case.name,
        "launches": [launch.kernel for launch in books.launches],
        "bytes": kinds,
        "moved": moved,
        "floor": case.floor,
        "ok": moved <= case.floor * (1 + case.slack),
    }


def traffic(smoke: bool = False) -> list[Record]:
    """Counts every case, in a process of its own where Triton's interpreter is not already on."""
    from fusedopt import backends

    if not backends.interpreting():
        command = [sys.executable, "-m", "perf.static_report", "--traffic", *["--smoke"] * smoke]
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"counting failed: {done.stderr[-2000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]
    rows = []
    for case in CASES[:1] if smoke else CASES:
        row: Record = {"kind": "traffic", "case": case.name}
        reason = missing(case)
        if reason:
            row["missing"] = reason
        else:
            try:
                row = count(case)
            except Exception as error:  # The other cases are worth knowing all the same.
                row |= {"ok": False, "missing": f"{type(error).__name__}: {error}"}
        rows.append(row)
    return rows


def moved(rows: Sequence[Record], case: str) -> roofline.Traffic | None:
    """Bytes per parameter that the kernels of a case move, without tables and workspace; None if it was not counted."""
    for row in rows:
        if row.get("case") == case and "bytes" in row:
            sides = [row["bytes"][kind] for kind in ("parameter", "gradient", "state")]
            return roofline.Traffic(sum(side[0] for side in sides), sum(side[1] for side in sides))
    return None


def variants(targets: Sequence[str], cases: Sequence[Case] = CASES) -> list[Record]:
    """Compiles every kernel of a step of every case for every target; not where Triton's interpreter is on."""
    from perf import compiled

    rows: list[Record] = []
    for target in targets:
        seen: set[int] = set()
        kept = []  # a number of `seen` stays taken
        for case in cases:
            if missing(case):
                continue
            with compiled.standing_in(target) as launches:
                _step_on_nothing(case)
            for launch in launches:
                if id(launch.code) not in seen:
                    seen.add(id(launch.code))
                    kept.append(launch.code)
                    rows.append(_variant(case, target, launch, compiled.resources(launch.code)))
    return rows


def _step_on_nothing(case: Case) -> None:
    """One step whose launches do not happen, on parameters that are aligned and on some that are not."""
    import fusedopt

    params = [torch.zeros(shape, dtype=case.dtype, requires_grad=True) for shape in (*SHAPES, (37,), (11, 13))]
    for p in params:
        p.grad = torch.zeros_like(p)
    getattr(fusedopt, case.optimizer)(params, backend="triton", **case.options).step()


def _variant(case: Case, target: str, launch: Any, resources: Any) -> Record:
    return {
        "kind": "variant",
        "case": case.name,
        "target": target,
        "kernel": launch.kernel,
        "even": launch.constants.get("EVEN"),
        **resources._asdict(),
        "ok": resources.spilled == 0,
    }


def variant_table(rows: Sequence[Record], markdown: bool = False) -> str:
    """Registers, spills, shared memory and the widths of the accesses, in bits (x how many)."""
    from perf.report import grid

    def widths(counts: dict[int, int]) -> str:
        return " ".join(f"{width}x{n}" for width, n in sorted(counts.items(), reverse=True))

    head = ("target", "kernel", "of a step of", "aligned", "registers", "spilled", "shared", "reads", "writes")
    body = [
        (
            row["target"],
            row["kernel"],
            row["case"],
            {True: "yes", False: "no", None: ""}[row["even"]],
            str(row["registers"]),
            str(row["spilled"]),
            str(row["shared"]),
            widths(row["reads"]),
            widths(row["writes"]),
        )
        for row in rows
    ]
    return grid(head, body, markdown)


def traffic_table(rows: Sequence[Record], markdown: bool = False) -> str:
    """Bytes per parameter, read and written, by whose memory it is."""
    from perf.report import grid

    head = ("step", "launches", "parameter", "gradient", "state", "moved", "must", "")
    body = []
    for row in rows:
        if "missing" in row:
            body.append((row["case"], *[""] * 6, f"missing: {row['missing']}"))
            continue
        cells = ["{:.1f} + {:.1f}".format(*row["bytes"][kind]) for kind in ("parameter", "gradient", "state")]
        verdict = "" if row["ok"] else "MOVES TOO MUCH"
        body.append(
            (row["case"], str(len(row["launches"])), *cells, f"{row['moved']:.1f}", f"{row['floor']:.0f}", verdict)
        )
    return grid(head, body, markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.static_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the rows to this file, as JSON lines")
    parser.add_argument("--smoke", action="store_true", help="the first case of each part")
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100,gfx942", help="to compile for (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--traffic", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = traffic(options.smoke)
    if options.traffic:
        print("\n".join(map(json.dumps, rows)))
        return 0
    print("bytes per parameter, read + written\n")
    print(traffic_table(rows, options.markdown))
    from fusedopt import backends

    if not backends.interpreting():
        targets = options.targets.split(",")
        compiled = variants(targets[:1], CASES[:1]) if options.smoke else variants(targets)
        print("\nregisters, spills and widths of memory accesses\n")
        print(variant_table(compiled, options.markdown))
        rows += compiled
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
