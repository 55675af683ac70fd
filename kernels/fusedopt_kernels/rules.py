"""The update rules, each written once.

Every function here is plain arithmetic: `+ - * /` and the functions that are passed in. The same code runs on torch
tensors (the eager backend), on numpy arrays (the tests), on Python floats (the scalars of a step) and, through
`triton.jit`, in the kernels. Letters are those of the papers: p parameter, g gradient, m and v its first and second
moment. (Triton looks up the names in a signature and knows modules there, hence `typing.Any`.)
"""

import math
import typing
from typing import Any, NamedTuple


class Convention(NamedTuple):
    """How an implementation of AdamW arranges eps, decay and bias correction: a row of `CONVENTIONS`.

    Attributes:
        decays_update: 1.0 where the decay follows the update and so shrinks it too (transformers), else 0.0.
        corrects_eps: 1.0 where eps is added to sqrt(v / (1 - beta2^t)) (torch), 0.0 where it is added to sqrt(v).
        shared_steps: True where t counts the applied steps of the whole optimizer (keras), False where it counts the
            updates of that parameter.
    """

    decays_update: float
    corrects_eps: float
    shared_steps: bool


CONVENTIONS = {
    "transformers": Convention(decays_update=1.0, corrects_eps=0.0, shared_steps=False),
    "torch": Convention(decays_update=0.0, corrects_eps=1.0, shared_steps=False),
    "keras": Convention(decays_update=0.0, corrects_eps=0.0, shared_steps=True),
}


def log_beta(beta: float) -> float:
    """The natural logarithm of a decay rate, -inf for 0, from which `beta^t = exp(t * log_beta)`.

    -inf also stands for "no bias correction", since exp(-inf) leaves corrections of exactly 1.
    """
    return math.log(beta) if beta > 0.0 else -math.inf


def adamw_scalars(
    step: typing.Any,
    lr: typing.Any,
    weight_decay: typing.Any,
    eps: typing.Any,
    log_beta1: typing.Any,
    log_beta2: typing.Any,
    decays_update: typing.Any,
    corrects_eps: typing.Any,
    exp: typing.Any,
    sqrt: typing.Any,
) -> Any:
    """The three numbers of one AdamW step, in float64: (shrink, step_size, eps_hat)."""
    correction1 = 1.0 - exp(step * log_beta1)
    root2 = sqrt(1.0 - exp(step * log_beta2))
    shrink = lr * weight_decay
    step_size = lr * root2 / correction1 * (1.0 - decays_update * shrink)
    eps_hat = eps * (1.0 + corrects_eps * (root2 - 1.0))
    return shrink, step_size, eps_hat


def adam_moments(g: typing.Any, m: typing.Any, v: typing.Any, beta1: typing.Any, weight1: typing.Any, beta2: typing.Any, weight2: typing.Any) -> Any:
    """The new running averages of g and g², with weight = 1 - beta. The order of factors keeps g² from overflowing."""
    return beta1 * m + weight1 * g, beta2 * v + weight2 * g * g


def adamw_update(p: typing.Any, m: typing.Any, v: typing.Any, shrink: typing.Any, step_size: typing.Any, eps_hat: typing.Any, sqrt: typing.Any, div: typing.Any) -> Any:
    """The new parameter, rounded once: p is added to last, so that a small decay is not lost in 1 - shrink."""
    return p - (shrink * p + div(step_size * m, sqrt(v) + eps_hat))
