"""Adafactor's recorded runs, its rules on numpy, and gradients and tensors of every kind."""

import math
from functools import partial

import numpy as np
import torch

from fusedopt import Adafactor
from fusedopt_kernels import rules
from helpers.golden import cases

REFUSED = ("weight_decay_negative",)  # a departure: see test_adafactor_options.py
GOLDEN = cases("adafactor", without=REFUSED)

TritonAdafactor = partial(Adafactor, backend="triton")

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "column_slice": lambda t: torch.cat([t, t[..., :3]], dim=-1)[..., : t.shape[-1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}

HARD_GRADIENTS = {
    "zero": lambda g: g * 0,
    "tiny": lambda g: g * 1e-25,
    "denormal": lambda g: g * 1e-41,
    "huge": lambda g: g * 1e18,
    "one_row": lambda g: g * (torch.arange(len(g)) == 1).view(-1, *[1] * (g.dim() - 1)),
    "spike": lambda g: torch.where(g == g.max(), 1e6 * g, g * 1e-6),
    "nan": lambda g: torch.where(g == g.max(), math.nan, g),
    "inf": lambda g: torch.where(g == g.max(), math.inf, g),
    "squares_overflow": lambda g: g * 1e30,
}


def normal(*shapes, seed=0, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for s in shapes]


def parameters(tensors):
    return [torch.nn.Parameter(t.clone()) for t in tensors]


def run(optimizer, steps):
    """`steps[k][i]` is the gradient of parameter i at step k, or None."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for grads in steps:
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def after(make, start, steps, device="cpu", **options):
    """Parameters and states, on the CPU, after `steps` of `make(params, **options)` from `start`."""
    params = parameters([p.to(device) for p in start])
    optimizer = make(params, **options)
    run(optimizer, [[None if g is None else g.to(device) for g in grads] for grads in steps])
    states = [{name: torch.as_tensor(value).cpu() for name, value in optimizer.state[p].items()} for p in params]
    return [p.detach().cpu() for p in params], states


def uses_rms(case):
    return all({**case.kwargs, **group}.get("scale_parameter", True) for group in case.groups)


def by_the_rules(p, g, state, k, lr=None, beta1=None, weight_decay=0.0, clip_threshold=1.0, maximize=False):
    """One update in float64; the state is a dict that it changes."""
    rms = math.sqrt(np.mean(p * p))
    rate = rules.relative_step(k, *rules.RELATIVE_STEP_CEILINGS[False], math.sqrt, min) if lr is None else lr
    rate = rules.scaled_rate(rate, rms, 1e-3, max)
    weight = rules.square_weight(k, -0.8, math.exp, math.log)
    q = g * g + 1e-30
    if p.ndim >= 2:
        r = state["r"] = rules.running_average(state.get("r", 0.0), q.mean(-1), weight)
        c = state["c"] = rules.running_average(state.get("c", 0.0), q.mean(-2), weight)
        of_row = rules.row_factor(r, r.mean(-1, keepdims=True), np.sqrt, np.divide)[..., None]
        u = rules.factored_update(g, of_row, rules.column_factor(c, np.sqrt, np.divide)[..., None, :])
    else:
        v = state["v"] = rules.running_average(state.get("v", 0.0), q, weight)
        u = rules.unfactored_update(g, v, np.sqrt, np.divide)
    u = u / rules.clip_divisor(math.sqrt(np.mean(u * u)), clip_threshold, max) * (-rate if maximize else rate)
    if beta1 is not None:
        u = state["m"] = rules.running_average(state.get("m", 0.0), u, 1 - beta1)
    return rules.adafactor_apply(p, u, rate * weight_decay)
