"""Everything that runs on compiled kernels and on the eager backend, by name."""

from typing import Any

from ptx import ranks, workloads

CASES: dict[str, Any] = {**workloads.CASES, **{f"shards, {name}": case for name, case in ranks.CASES.items()}}
"""Each has `run(backend)`, which returns an `Outcome`, and `parameters`, `watched` and `compared` of a `Case`."""

ONE_OF_EVERY_KERNEL = (
    *("AdamW amsgrad float32", "AdamW bfloat16 stochastic", "AdamW statistics bfloat16 master", "AdamW 200 tensors"),
    *("Lion statistics float16", "AdamW skipping", "AdamW clipped", "accumulation float32"),
    *("Adafactor float32", "Adafactor statistics bfloat16 stochastic", "Adafactor skipping", "Adafactor many tiles"),
    *("shards, Adafactor float32, rows", "shards, Adafactor float32, columns"),
    "shards, AdamW bfloat16, columns, stochastic",
)
"""Some cases that run every kernel, of each dtype in some kernel."""
