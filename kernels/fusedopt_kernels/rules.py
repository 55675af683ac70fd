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
    """The three numbers of one AdamW step, in float64: (decay_step, step_size, eps_hat)."""
    correction1 = 1.0 - exp(step * log_beta1)
    root2 = sqrt(1.0 - exp(step * log_beta2))
    decay_step = lr * weight_decay
    step_size = lr * root2 / correction1 * (1.0 - decays_update * decay_step)
    eps_hat = eps * (1.0 + corrects_eps * (root2 - 1.0))
    return decay_step, step_size, eps_hat


def adam_moments(
    g: typing.Any,
    m: typing.Any,
    v: typing.Any,
    beta1: typing.Any,
    weight1: typing.Any,
    beta2: typing.Any,
    weight2: typing.Any,
) -> Any:
    """The new running averages of g and g², with weight = 1 - beta. The order of factors keeps g² from overflowing."""
    return beta1 * m + weight1 * g, beta2 * v + weight2 * g * g


def adamw_update(
    p: typing.Any,
    m: typing.Any,
    v: typing.Any,
    decay_step: typing.Any,
    step_size: typing.Any,
    eps_hat: typing.Any,
    sqrt: typing.Any,
    div: typing.Any,
) -> Any:
    """The new parameter, rounded once: p is added to last, so that a small decay is not lost in 1 - decay_step."""
    return p - (decay_step * p + div(step_size * m, sqrt(v) + eps_hat))


RELATIVE_STEP_CEILINGS = {False: (1e-2, 0.0), True: (0.0, 1e-6)}
"""By `warmup_init`: the two numbers of the line `constant + slope * step` that a relative step never exceeds."""


def relative_step(
    step: typing.Any, constant: typing.Any, slope: typing.Any, sqrt: typing.Any, minimum: typing.Any
) -> Any:
    """Adafactor's learning rate where none is given, before the parameter's scale. `step` counts from 1."""
    return minimum(constant + slope * step, 1.0 / sqrt(step))


def scaled_rate(rate: typing.Any, rms: typing.Any, floor: typing.Any, fmax: typing.Any) -> Any:
    """The rate times the root mean square of the parameter, which counts as `floor` where it is smaller or NaN."""
    return rate * fmax(floor, rms)


def square_weight(step: typing.Any, decay_rate: typing.Any, exp: typing.Any, log: typing.Any) -> Any:
    """The weight of a new square in Adafactor's average of squares, step^decay_rate: 1 at the first step."""
    return exp(decay_rate * log(step))


def running_average(average: typing.Any, new: typing.Any, weight: typing.Any) -> Any:
    """An average that forgets: `new` weighs `weight`, everything before it the rest."""
    return (1.0 - weight) * average + weight * new


def row_factor(row: typing.Any, row_mean: typing.Any, sqrt: typing.Any, div: typing.Any) -> Any:
    """The factor on rows of an update. Two roots, since the quotient of the squares may leave the range."""
    return div(sqrt(row_mean), sqrt(row))


def column_factor(column: typing.Any, sqrt: typing.Any, div: typing.Any) -> Any:
    """The factor on columns of an update."""
    return div(1.0, sqrt(column))


def factored_update(g: typing.Any, row_factor: typing.Any, column_factor: typing.Any) -> Any:
    """The update of a matrix before clipping. In this order: the product of the factors alone may overflow."""
    return g * column_factor * row_factor


def unfactored_update(g: typing.Any, v: typing.Any, sqrt: typing.Any, div: typing.Any) -> Any:
    """The update of a vector before clipping."""
    return div(g, sqrt(v))


def clip_divisor(rms: typing.Any, threshold: typing.Any, maximum: typing.Any) -> Any:
    """The divisor of an update of root mean square `rms`. `maximum` must return NaN when its first argument is NaN."""
    return maximum(rms / threshold, 1.0)


def adafactor_apply(p: typing.Any, update: typing.Any, decay_step: typing.Any) -> Any:
    """The new parameter, rounded once: p is added to last, so that a small decay is not lost in 1 - decay_step."""
    return p - (decay_step * p + update)


def lion_update(
    p: typing.Any, direction: typing.Any, lr: typing.Any, weight_decay: typing.Any, sign: typing.Any
) -> Any:
    """Lion's new parameter. Of `direction`, the average of m with g, only the sign counts: 0 for 0, NaN for NaN."""
    return p - lr * (sign(direction) + weight_decay * p)


def clip_factor(norm: Any, max_norm: Any, at_most: Any) -> Any:
    """The factor that reduces gradients of this norm to `max_norm`, as torch.nn.utils.clip_grad_norm_ defines it."""
    return at_most(max_norm / (norm + 1e-6), 1.0)


REASONS = ("nonfinite", "grad_norm_above", "outliers")
"""Why a step is skipped: for norms that are NaN or inf, for those above a bound, and for outliers."""


class Limits(NamedTuple):
    """What `skip_verdict` goes by; infinite where there is no such limit.

    Attributes:
        above: the largest norm that is not skipped.
        deviations: how many standard deviations above the mean a norm is an outlier.
        warm_up: how many norms are measured before one can be an outlier.
        least_weight: of a new norm in the averages, which begin as plain ones. 1 / least_weight is their window.
        least_spread: the least standard deviation, as a share of the mean: norms that hardly vary have no outliers.
    """

    above: float = math.inf
    deviations: float = math.inf
    warm_up: float = 100.0
    least_weight: float = 0.01
    least_spread: float = 0.01


def skip_verdict(
    norm: typing.Any,
    takes_part: typing.Any,
    count: typing.Any,
    mean: typing.Any,
    variance: typing.Any,
    above: typing.Any,
    deviations: typing.Any,
    warm_up: typing.Any,
    least_weight: typing.Any,
    least_spread: typing.Any,
    where: typing.Any,
    sqrt: typing.Any,
    minimum: typing.Any,
    maximum: typing.Any,
) -> Any:
    """Why the step of a gradient norm is skipped, from 1 in the order of `REASONS`, 0.0: it is not. And the new count,
    mean and variance of norms (West, "Updating mean and variance estimates", 1979).

    A skipped norm enters the averages as the largest that would not have been skipped. So one spike hardly moves them,
    and a lasting change of level does: the variance grows by a factor at each such step until it is met. A norm that is
    0 or not finite, and one that does not take part, since something else skips its step, do not enter.
    """
    usual = mean + deviations * maximum(sqrt(variance), least_spread * mean)
    warm = count >= warm_up
    outlier = where(warm & (norm > usual), 3.0, 0.0)
    reason = where(norm - norm == 0.0, where(norm > above, 2.0, outlier), 1.0)
    new = minimum(minimum(norm, above), where(warm, usual, above))
    enters = takes_part & (norm > 0.0) & (norm - norm == 0.0) & (new * new - new * new == 0.0)
    weight = maximum(1.0 / (count + 1.0), least_weight)
    delta = where(enters, new - mean, 0.0 * mean)
    variance = where(enters, (1.0 - weight) * (variance + weight * delta * delta), variance)
    return reason, where(enters, count + 1.0, count), mean + weight * delta, variance


# Random bits for stochastic rounding. Unsigned 32-bit arithmetic that wraps: `shift(x, n)` fills up with zeros from the
# left, `times(x, constant)` multiplies.


def scramble(x: typing.Any, shift: typing.Any, times: typing.Any) -> Any:
    """A bijection of 32 bits that looks random: lowbias32 of C. Wellons, "Prospecting for Hash Functions"."""
    x = x ^ shift(x, 16)
    x = times(x, 0x7FEB352D)
    x = x ^ shift(x, 15)
    x = times(x, 0x846CA68B)
    return x ^ shift(x, 16)


def random_word(
    low: typing.Any, high: typing.Any, key0: typing.Any, key1: typing.Any, scramble: typing.Any, times: typing.Any
) -> Any:
    """The random bits of one element at one step.

    Two rounds: with one, keyed only by xor, all steps would draw the same words in another order.

    Args:
        low, high: halves of the element's index in the whole parameter.
        key0, key1: `rounding_keys` of parameter and step.
        scramble: the function above, for one argument.
        times: as there.
    """
    return scramble(scramble(low ^ key0) + (key1 + times(high, 0x9E3779B9)))


def rounding_keys(
    seed_low: typing.Any,
    seed_high: typing.Any,
    number: typing.Any,
    step: typing.Any,
    scramble: typing.Any,
    times: typing.Any,
) -> Any:
    """Two keys for the random words of a parameter, which has a number, at a step."""
    stream = scramble(scramble(seed_low ^ scramble(seed_high + 0x9E3779B9)) + times(number, 0x9E3779B9))
    key0 = scramble(stream ^ step)
    return key0, scramble(key0 + stream + times(step, 0x85EBCA6B))
