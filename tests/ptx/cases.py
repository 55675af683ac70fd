"""Everything that runs on compiled kernels and on the eager backend, by name."""

from typing import Any

from ptx import ranks, workloads

CASES: dict[str, Any] = {**workloads.CASES, **{f"shards, {name}": case for name, case in ranks.CASES.items()}}
"""Each has `run(backend)`, which returns an `Outcome`, and `parameters`, a tolerance of its own for them, or None."""
