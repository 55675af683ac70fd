"""Benchmarks: what the optimizers cost, measured side by side.

`providers`, two of them written in `peers`, compute a rule on `workloads`. `gate` lets no wrong result in, `measure`
takes the time, `bench` runs the `plans` and says which of their goals are met. `traffic`, `compiled` and `sass` count
bytes, registers and instructions of the `cases`, for `static_report`. `dtensor` and `long_run` look at what the host
does and keeps, `decay` at what 16-bit weights lose. `report` shows all `results`, and `evidence` runs everything on a
GPU machine. `primers` are the runs behind docs/primers, `versions` is the one behind docs/versions.md.
"""
