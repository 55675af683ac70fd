"""Adafactor's steps as they would be launched on GPUs that are not here, as JSON; see compiled_steps.py."""

import json
import sys

import torch
from helpers.compiled import cases
from helpers.in_place import in_place

from fusedopt import Adafactor
from perf.cases import DTYPES, LOW_PRECISION
from perf.compiled import ADAFACTOR_SHAPES, TARGETS, fake_gpu, kernels, resources, shard_step
from perf.sass import issued


def per_element(case, phase):
    """Bytes read and written, with an average of updates, by the phases that see gradients."""
    size = DTYPES[case.dtypes][0].itemsize
    average = 2 if "state_dtype" in case.options else max(size, 4)
    weight = size + ({"bfloat16": 2, "float16": 4}[case.dtypes] if "master_weights" in case.options else 0)
    sizes = {"sums": (weight + size, 0), "squares": (size, 0), "apply": (weight + size + average, weight + average)}
    return dict(zip(("reads", "writes"), sizes.get(phase, (0, 0))))


def share(launch):
    needs = issued(launch)
    return needs and needs.share


def variants(word):
    target, some = cases(word, "adafactor")
    return [
        {
            "name": name,
            "drops_nan": "maxnumf" in launch.code.asm["ttir"],
            "fusion": launch.code.metadata.enable_fp_fusion,
            "threads": launch.code.metadata.num_warps * TARGETS[target].warp_size,
            "per_element": per_element(case, launch.kernel),
            "in_place": in_place(launch.code),
            "low_precision": case in LOW_PRECISION,
            "share": share(launch),
            **resources(launch.code)._asdict(),
        }
        for case, name, launch in kernels(target, some)
    ]


def parameters(shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def launches_of(params, groups=1):
    """Kernel names of two steps."""
    options = [{"lr": 0.1, "beta1": 0.5}, {"lr": 0.2}, {"lr": 0.3, "weight_decay": 0.1, "scale_parameter": False}]
    rates = [{"params": params[i::groups], **options[i]} for i in range(groups)]
    optimizer = Adafactor(rates, relative_step=False, backend="triton")
    with fake_gpu("sm_90") as launches:
        counts = []
        for _ in range(2):
            before = len(launches)
            optimizer.apply_gradients((torch.zeros_like(p), p) for p in params)
            counts.append([launch.kernel for launch in launches[before:]])
    return counts


def launches_of_shards(params):
    """Kernel names of two steps."""
    optimizer = Adafactor(params, backend="triton")
    optimizer.init_state()
    counts = []
    with fake_gpu("sm_90") as launches:
        for _ in range(2):
            before = len(launches)
            shard_step(optimizer, params, [torch.zeros_like(p) for p in params])
            counts.append([launch.kernel for launch in launches[before:]])
    return counts


def launches():
    shapes = [ADAFACTOR_SHAPES[i % 5] for i in range(1000)]
    return {
        "one of each kind, as shards": launches_of_shards(parameters(ADAFACTOR_SHAPES)),
        "one matrix": launches_of(parameters([(64, 64)])),
        "one of each kind": launches_of(parameters(ADAFACTOR_SHAPES)),
        "1,000 of all kinds in 3 groups": launches_of(parameters(shapes), 3),
        "two dtypes": launches_of(parameters(ADAFACTOR_SHAPES) + parameters(ADAFACTOR_SHAPES, torch.bfloat16)),
    }


def changes():
    """What may change from step to step, each as a function of (optimizer, params) that takes a step."""

    def step(optimizer, params, scale=1.0):
        optimizer.apply_gradients(((torch.zeros_like(p), p) for p in params), scale=scale)

    def set_option(optimizer, **options):
        for group in optimizer.param_groups:
            group.update(options)

    def grow(optimizer, params, number):
        added = parameters([(i, 3 * i) if i % 2 else (16 * i,) for i in range(1, number + 1)])
        optimizer.add_param_group({"params": added, "beta1": 0.9})
        params += added
        step(optimizer, params)

    def moved(p):
        return torch.zeros(p.numel() + 1)[1:].view(p.shape)

    return {
        "lr": lambda o, p: (set_option(o, lr=0.7), step(o, p)),
        "lr on the device": lambda o, p: (set_option(o, lr=torch.tensor(0.5)), step(o, p)),
        "relative steps": lambda o, p: (set_option(o, relative_step=True), step(o, p)),
        "parameter scale": lambda o, p: (set_option(o, scale_parameter=True), step(o, p)),
        "other options": lambda o, p: (set_option(o, clip_threshold=2.0, weight_decay=0.3, eps=(0.1, 0.1)), step(o, p)),
        "step count": lambda o, p: [step(o, p) for _ in range(3)],
        "one gradient": lambda o, p: step(o, p[:1]),
        "gradients elsewhere": lambda o, p: o.apply_gradients((moved(p_), p_) for p_ in p),
        "scale on the device": lambda o, p: step(o, p, torch.tensor(0.5)),
        "three more tensors": lambda o, p: grow(o, p, 3),
        "a hundred more tensors": lambda o, p: grow(o, p, 100),
    }


def compilations():
    """How often each change made Triton compile, after one step with two tensors."""
    params = parameters([(64, 64), (7,)])
    optimizer = Adafactor(params, lr=0.1, relative_step=False, scale_parameter=False, backend="triton")
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
