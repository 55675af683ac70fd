"""AdamW's recorded runs, what 16-bit ones are measured against, and tensors of every magnitude."""

import torch

from fusedopt_kernels import rules
from helpers.golden import cases

REFUSED = ("weight_decay_negative",)  # a departure: see test_bad_input.py
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
GOLDEN = cases("adamw", without=REFUSED)
STATES = ("exp_avg", "exp_avg_sq")
RATES = (0.5, 0.0, 0.25)
"""Of the steps of a test of learning rates on the device."""


def rounding_spoils_nothing(case):
    """The original loses a 16-bit decay, and its 16-bit moments where beta2 is near 1."""
    return case.dtype in SIXTEEN_BITS and not case.sensitive and not case.kwargs.get("weight_decay")


class RoundedOnce(torch.optim.Optimizer):
    """transformers' AdamW in float64 arithmetic on 16-bit parameters and moments, each rounded once per step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p] or self.state.setdefault(p, {})
                s.setdefault("step", 0)
                s["step"] += 1
                m, v = (s.get(name, torch.zeros_like(p)).double() for name in STATES)
                b1, b2 = group["betas"]
                m, v = rules.adam_moments(p.grad.double(), m, v, b1, 1 - b1, b2, 1 - b2)
                correction = (1 - b2 ** s["step"]) ** 0.5 / (1 - b1 ** s["step"]) if group["correct_bias"] else 1.0
                decay = 1 - group["lr"] * group["weight_decay"]
                new = (p.double() - group["lr"] * correction * m / (v.sqrt() + group["eps"])) * decay
                p.copy_(new)
                s["exp_avg"], s["exp_avg_sq"] = m.to(p.dtype), v.to(p.dtype)


def parameters(device, sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtype)) for n in sizes
    ]


def gradients(params, seed, dtype=None):
    """Of magnitudes from 1e-24 to 1e6, and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        size = 10.0 ** torch.randint(-6, 2, p.shape, generator=generator).double()
        grads.append((noise * size * (noise.abs() > 0.1)).to(p.device, dtype or p.dtype))
    return grads


def run(optimizer, params, steps):
    """Some steps; `steps[k][i]` is the gradient of parameter i at step k, or None."""
    for grads in steps:
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.clone()
        optimizer.step()
