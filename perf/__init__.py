"""Benchmarks: what the optimizers cost, measured side by side.

`providers` compute a rule on `workloads`, `gate` lets no wrong result in, `measure` takes the time, `bench` runs the
`plans`, `goals` are judged by the `results`. `traffic` and `compiled` count bytes and registers of the `cases`, for
`static_report`. `dtensor` and `long_run` look at what the host does and keeps. `report` shows all of it, and `evidence`
runs all of it on a GPU machine.
"""
