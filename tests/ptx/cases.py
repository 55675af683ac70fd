"""Everything that runs on compiled kernels and on the eager backend, by name."""

from typing import Any

from ptx import ranks, workloads

CASES: dict[str, Any] = {**workloads.CASES, **{f"shards, {name}": case for name, case in ranks.CASES.items()}}
"""Each has `run(backend)`, which returns an `Outcome`, and `parameters` and `watched` of a `Case`."""

ONE_OF_EVERY_KERNEL = (
    *("AdamW amsgrad float32", "AdamW bfloat16 stochastic", "AdamW statistics bfloat16 master", "AdamW 200 tensors"),
    *("Lion statistics float16", "AdamW skipping", "AdamW clipped", "accumulation float32"),
    *("Adafactor float32", "Adafactor statistics bfloat16 stochastic", "Adafactor skipping", "Adafactor many tiles"),
    *("shards, Adafactor float32, rows", "shards, Adafactor float32, columns"),
    "shards, AdamW bfloat16, columns, stochastic",
)
"""Some cases that run every kernel, of each dtype in some kernel."""

OF_MUTANTS = (
    *ONE_OF_EVERY_KERNEL,
    *("AdamW later", "AdamW keras scaled", "AdamW three groups", "AdamW rate on the device", "AdamW not finite"),
    *("AdamW clipped, tiny and huge", "AdamW keras missing gradients", "AdamW skipping outliers"),
    *("AdamW not finite, bfloat16 master", "AdamW not finite, bfloat16 stochastic"),
    *("Lion skipping large gradients", "Lion not finite", "Adafactor later", "Adafactor warmup, later"),
    *("Adafactor three groups", "Adafactor scaled", "Adafactor missing gradients", "Adafactor small matrices"),
    *("Adafactor given rate, low threshold", "Adafactor NaN and inf", "Adafactor many rows"),
    "shards, Adafactor float32, many tiles",
)
"""Cases whose instructions are spoilt, and that are to notice it: those above, and other ways through the kernels."""
