"""Benchmarks: what the optimizers cost, measured side by side.

`workloads` and `providers` are what is compared, `gate` lets no wrong result in, `measure` takes the time, `bench` runs
the plans, `goals` judges and `report` shows the `results`. `traffic` and `compiled` count bytes and registers, for
`static_report`. `evidence` runs all of it on a GPU machine.
"""
