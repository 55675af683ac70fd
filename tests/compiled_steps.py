"""Steps as they would be launched on GPUs that are not here, as JSON: run by test_compile.py in a process of its own.

Tensors on the CPU stand for tensors on the GPU, so this must run without Triton's interpreter.
"""

import json
import re
import sys

import torch
from helpers.compiled import cases
from helpers.in_place import in_place

from fusedopt import AdamW
from fusedopt_kernels.elementwise import BLOCK, THREADS
from perf.cases import DTYPES, LOW_PRECISION
from perf.compiled import TARGETS, fake_gpu, kernels, resources
from perf.sass import issued

MOMENTS = {"adamw": 2, "lion": 1}


def variants(word):
    target, some = cases(word, *MOMENTS)
    found = []
    # test_lion_takes_two_launches has those of Lion that are not of low precision.
    for case, name, launch in kernels(target, [case for case in some if case.rule == "adamw" or case in LOW_PRECISION]):
        param, grad, moment = (dtype.itemsize for dtype in DTYPES[case.dtypes])
        written = param + MOMENTS[case.rule] * moment + case.extra // 2
        elements = BLOCK // THREADS
        access = launch.constants.get("A")
        needs = issued(launch)
        found.append(
            {
                "name": name + ", Lion" * (case.rule == "lion"),
                "drops_nan": "maxnumf" in launch.code.asm["ttir"],
                "fusion": launch.code.metadata.enable_fp_fusion,
                "threads": launch.code.metadata.num_warps * TARGETS[target].warp_size,
                "bytes": {"reads": elements * (written + grad), "writes": elements * written},
                "multiplications_in_32_bits": len(re.findall(r"arith\.muli.*i32\b", launch.code.asm["ttir"])),
                "in_place": in_place(launch.code),
                "low_precision": case in LOW_PRECISION,
                "random": bool(access and access.rounding),
                "itemsizes": sorted({d.removeprefix("b")[-2:] for d in access[: access._fields.index("compute")] if d})
                if access
                else [],
                "share": needs and needs.share,
                **resources(launch.code)._asdict(),
            }
        )
    return found


def parameters(*sizes):
    return [torch.nn.Parameter(torch.zeros(n)) for n in sizes]


def groups(params, number):
    rates = [{"lr": 0.1 * i, "betas": (0.5, 0.9), "weight_decay": 0.01 * i} for i in range(number)]
    return [{"params": params[i::number], **rates[i]} for i in range(number)]


def launches_of(sizes, number_of_groups=1):
    """Kernel names of two steps, one a line."""
    params = parameters(*sizes)
    optimizer = AdamW(groups(params, number_of_groups), backend="triton")
    with fake_gpu("sm_90") as launches:
        counts = []
        for _ in range(2):
            before = len(launches)
            optimizer.apply_gradients((torch.zeros_like(p), p) for p in params)
            counts.append([launch.kernel for launch in launches[before:]])
    return counts


def launches():
    return {
        "one aligned": launches_of([16]),
        "one odd": launches_of([7]),
        "1,000 aligned": launches_of([16 * i for i in range(1, 1001)]),
        "1,000 aligned in 3 groups": launches_of([16 * i for i in range(1, 1001)], 3),
        "1,000 in 3 groups, odd ones among them": launches_of(range(1, 1001), 3),
    }


def changes():
    """What may change from step to step, each as a function of (optimizer, params) that takes a step."""

    def step(optimizer, params, scale=1.0):
        optimizer.apply_gradients(((torch.zeros_like(p), p) for p in params), scale=scale)

    def set_lr(optimizer, lr):
        for group in optimizer.param_groups:
            group["lr"] = lr

    def grow(optimizer, params, number):
        added = parameters(*[16 * i + i % 2 for i in range(1, number + 1)])
        optimizer.add_param_group({"params": added})
        params += added
        step(optimizer, params)

    return {
        "lr": lambda o, p: (set_lr(o, 0.7), step(o, p)),
        "lr on the device": lambda o, p: (set_lr(o, torch.tensor(0.5)), step(o, p)),
        "lr on the device, float64": lambda o, p: (set_lr(o, torch.tensor(0.5, dtype=torch.float64)), step(o, p)),
        "step count": lambda o, p: [step(o, p) for _ in range(3)],
        "one gradient": lambda o, p: step(o, p[:1]),
        "gradients elsewhere": lambda o, p: o.apply_gradients((torch.zeros(p_.numel() + 1)[1:], p_) for p_ in p),
        "scale": lambda o, p: step(o, p, 0.5),
        "scale on the device": lambda o, p: step(o, p, torch.tensor(0.5)),
        "two more tensors": lambda o, p: grow(o, p, 2),
        "a hundred more tensors": lambda o, p: grow(o, p, 100),
        "a thousand more tensors": lambda o, p: grow(o, p, 1000),
    }


def compilations():
    """How often each change made Triton compile, after one step with an aligned and an unaligned tensor."""
    params = parameters(16, 17)
    optimizer = AdamW(params, weight_decay=0.1, backend="triton")
    found = {}
    with fake_gpu("sm_90") as launches:
        optimizer.apply_gradients((torch.zeros_like(p), p) for p in params)
        for name, change in changes().items():
            before, known = len(launches), {id(launch.code) for launch in launches}
            change(optimizer, params)
            assert len(launches) > before
            found[name] = len({id(launch.code) for launch in launches} - known)
    return found


if __name__ == "__main__":
    functions = {"launches": launches, "changes": compilations}
    json.dump({word: functions[word]() if word in functions else variants(word) for word in sys.argv[1:]}, sys.stdout)
