"""Steps that are refused, and what they must not change."""

import copy
from functools import partial

import pytest
import torch

from helpers.comparing import assert_same
from helpers.optimizers import OPTIMIZERS, VARIANTS

GUARD = {"max_grad_norm": 0.1, "skip_nonfinite": True}
MAKE = {
    **OPTIMIZERS,
    "AdamW-guarded": partial(OPTIMIZERS["AdamW"], **GUARD),
    **{name: VARIANTS[name] for name in ("AdamWeightDecay-clipnorm", "Adafactor-lr-beta1")},
}


def weight(*shape, value=1.0):
    return torch.nn.Parameter(torch.full(shape, value))


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def everything(optimizer, *params):
    """All that a step could change."""
    counted = getattr(optimizer, "skipped_steps", None), getattr(optimizer, "grad_norm", None)
    return copy.deepcopy([optimizer.state_dict(), [p.detach() for p in params], counted])


def refuses(optimizer, *params, error=RuntimeError, match):
    before = everything(optimizer, *params)
    with pytest.raises(error, match=match):
        step(optimizer)
    assert_same(everything(optimizer, *params), before)
