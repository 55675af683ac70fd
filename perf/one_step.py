"""`python -m perf.one_step WORKLOAD RULE`: one step of ours after some that warm up, for a profiler or a sanitizer.

A profiler that starts switched off (`ncu --profile-from-start off`) sees that one step alone.
"""

import sys

import torch

from fusedopt import backends
from perf import providers, workloads
from perf.measure import Problem

WARM_UP = 3


def main(arguments: list[str]) -> int:
    workload, rule = workloads.get(arguments[0]), arguments[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and backends.interpreting():
        providers.BACKEND = "triton"
    (provider,) = providers.of(rule, ["fusedopt"])
    missing = provider.missing(device)
    if missing:
        print(f"fusedopt, {rule}: {missing}")
        return 1
    problem = Problem(workload, device, 2)
    problem.hand_out()
    step, _ = provider.start(problem.params)
    for _ in range(WARM_UP):
        problem.hand_out()
        step()
    problem.hand_out()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    finite = all(bool(torch.isfinite(p).all()) for p in problem.params)
    print(f"fusedopt, {rule}, {workload.name} on {device.type}: {'finite' if finite else 'NOT FINITE'}")
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
