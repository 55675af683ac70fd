"""The updates, as papers and transformers 4.34 have them, on numbers with bounds: nothing here is the package's.

Each takes the weight, the gradient, the state, the number of this update and the options of its group, and returns the
new weight and the new state. Sources: Loshchilov & Hutter, arXiv:1711.05101; Kingma & Ba, arXiv:1412.6980; Shazeer &
Stern, arXiv:1804.04235; Chen et al., arXiv:2302.06675; `optimization.py` and `optimization_tf.py` of transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fuzz.bounds import FLOAT64, Bound

State = Mapping[str, Bound]
Updated = tuple[Bound, dict[str, Bound]]


def scalar(value: Any) -> Bound:
    """A number of the host, or in a tensor."""
    return Bound.of(float(value), FLOAT64)


def average(old: Bound, new: Bound, weight: Bound) -> Bound:
    """A running average in which `new` has this weight.

    Where arithmetic has only the weight, it works out 1 - weight, which is off by a unit of 1, however small it is.
    """
    kept = 1.0 - weight
    return old * Bound(kept.value, kept.error + old.kind.unit, kept.kind) + new * weight


def decayed(p: Bound, share: Bound) -> Bound:
    """The weight without this share of it. An infinite one times 1 - share is itself; less its product, it is NaN."""
    new = p - p * share
    return Bound(new.value, np.where(np.isinf(p.value), np.inf, new.error), new.kind)


def adamw(p: Bound, g: Bound, state: State, t: int, o: Mapping[str, Any]) -> Updated:
    """AdamW in one of three conventions."""
    lr, decay, eps = scalar(o["lr"]), scalar(o["weight_decay"]), scalar(o["eps"])
    b1, b2 = map(scalar, o["betas"])
    g = -g if o["maximize"] else g
    m = average(state["exp_avg"], g, 1.0 - b1)
    v = state["exp_avg_sq"] * b2 + g * (1.0 - b2) * g
    new = {"exp_avg": m, "exp_avg_sq": v}
    if o["amsgrad"]:
        v = state["max_exp_avg_sq"].maximum(v)
        # torch's kernel has NaN as the larger one, or not; m is NaN then in any case.
        new["max_exp_avg_sq"] = Bound(v.value, np.where(np.isnan(v.value), np.inf, v.error), v.kind)
    c1, c2 = 1.0 - b1.power(t), 1.0 - b2.power(t)
    if o["convention"] == "torch":
        p = decayed(p, lr * decay)
        return p - (m / c1) * lr / ((v / c2).sqrt() + eps), new
    size = lr * c2.sqrt() / c1 if o["correct_bias"] else lr
    if o["convention"] == "keras":
        p = decayed(p, lr * decay)
    p = p - m * size / (v.sqrt() + eps)
    if o["convention"] == "transformers":
        p = decayed(p, lr * decay)
    return p, new


def lion(p: Bound, g: Bound, state: State, t: int, o: Mapping[str, Any]) -> Updated:
    """Lion."""
    lr, decay = scalar(o["lr"]), scalar(o["weight_decay"])
    b1, b2 = map(scalar, o["betas"])
    g = -g if o["maximize"] else g
    m = state["exp_avg"]
    direction = average(m, g, 1.0 - b1).sign()
    return decayed(p, lr * decay) - direction * lr, {"exp_avg": average(m, g, 1.0 - b2)}


def relative_rate(t: int, o: Mapping[str, Any]) -> Bound:
    """Adafactor's rate before the scale of the parameter."""
    if not o["relative_step"]:
        return scalar(o["lr"])
    return scalar(min(1e-6 * t if o["warmup_init"] else 1e-2, 1.0 / np.sqrt(t)))


def adafactor(p: Bound, g: Bound, state: State, t: int, o: Mapping[str, Any]) -> Updated:
    """Adafactor."""
    new: dict[str, Bound] = {}
    rate = relative_rate(t, o)
    if o["scale_parameter"]:
        rms = (p * p).mean().sqrt()
        new["RMS"] = rms.reshape(())
        rate = rms.at_least(scalar(o["eps"][1])) * rate
    weight = scalar(t).power(o["decay_rate"])
    q = g * g + scalar(o["eps"][0])
    if p.value.ndim >= 2:
        row = average(state["exp_avg_sq_row"], q.mean(-1).squeeze(-1), weight)
        column = average(state["exp_avg_sq_col"], q.mean(-2).squeeze(-2), weight)
        new |= {"exp_avg_sq_row": row, "exp_avg_sq_col": column}
        u = g * (1.0 / column.sqrt())[..., None, :] * (row.mean(-1).sqrt() / row.sqrt())[..., :, None]
    else:
        v = new["exp_avg_sq"] = average(state["exp_avg_sq"], q, weight)
        u = g / v.sqrt()
    u = u / ((u * u).mean().sqrt() / scalar(o["clip_threshold"])).maximum(1.0) * rate
    u = -u if o["maximize"] else u
    if o["beta1"] is not None:
        b1 = scalar(o["beta1"])
        u = new["exp_avg"] = average(state["exp_avg"], u, 1.0 - b1)
    return decayed(p, rate * scalar(o["weight_decay"])) - u, new


UPDATES = {"AdamW": adamw, "AdamWeightDecay": adamw, "Adafactor": adafactor, "Lion": lion}


# Clipping and skipping.


def norm_of_all(grads: Sequence[Bound]) -> Bound:
    """The norm of all gradients together, as bound of a float64 number: each was added up in its own arithmetic."""
    norms = [g.norm() for g in grads]
    return Bound(*(np.asarray([getattr(n, name) for n in norms]) for name in ("value", "error")), FLOAT64).norm()


def clip_factor(norm: Bound, largest: float) -> Bound:
    """As `torch.nn.utils.clip_grad_norm_` has it."""
    return (scalar(largest) / (norm + 1e-6)).minimum(1.0)


def keras_clipped(grads: list[Bound], clipping: Mapping[str, float | None]) -> list[Bound]:
    """Keras': by value, then each by its norm, then all by their common norm; NaN where that norm is not finite."""

    def by_norm(gs: list[Bound], bound: float) -> list[Bound]:
        norm = norm_of_all(gs)
        if not np.isfinite(norm.value):
            # The norm of one number needs no square, which would overflow.
            sure = not all(np.isfinite(g.value).all() for g in gs)
            return [g * Bound.of(np.nan, FLOAT64, 0.0 if sure else np.inf) for g in gs]
        return [g * (scalar(bound) / norm.maximum(max(bound, 1e-300))) for g in gs]

    def by_value(g: Bound, value: float) -> Bound:
        bound = Bound.of(value, g.kind) * 1.0  # which has to be a number of the gradient's dtype
        clipped = g.minimum(bound).maximum(-bound)
        within = abs(g.value) + g.error < bound.value - bound.error
        return Bound(clipped.value, np.where(within, g.error, clipped.error), g.kind)

    value, each, together = (clipping[name] for name in ("clipvalue", "clipnorm", "global_clipnorm"))
    if value is not None:
        grads = [by_value(g, value) for g in grads]
    if each is not None:
        grads = [one for g in grads for one in by_norm([g], each)]
    return grads if together is None else by_norm(grads, together)


class Averages:
    """Mean and variance of norms for `skip_outliers`: plain ones of the first hundred, then with a window of a hundred.

    The least deviation that counts is 1 % of the mean. What is skipped enters as the largest that is not.
    """

    def __init__(self, count: float = 0.0, mean: float = 0.0, variance: float = 0.0) -> None:
        self.count, self.mean, self.variance = scalar(count), scalar(mean), scalar(variance)

    def usual(self, deviations: float) -> Bound:
        """The largest norm that is no outlier."""
        if self.count.value < 100:
            return scalar(np.inf)
        return self.mean + self.variance.sqrt().maximum(0.01 * self.mean) * deviations

    def enter(self, norm: Bound) -> None:
        """Counts a norm in."""
        weight = max(1.0 / float(self.count.value + 1.0), 0.01)
        distance = norm - self.mean
        self.count = scalar(self.count.value + 1.0)
        self.mean = self.mean + distance * weight
        self.variance = (self.variance + distance * weight * distance) * (1.0 - weight)


class UnclearError(Exception):
    """Numbers are too close to a limit to tell on which side of it they are."""


def is_finite(number: Bound) -> bool:
    """Whether a number is neither inf nor NaN.

    Raises:
        UnclearError: it may be either.
    """
    if np.isinf(number.error):
        raise UnclearError
    return bool(np.isfinite(number.value))


def is_above(number: Bound, limit: Bound) -> bool:
    """Whether one number is larger than the other.

    Raises:
        UnclearError: it may be either.
    """
    margin = number.error + limit.error
    if np.isinf(margin) or (margin > 0.0 and abs(number.value - limit.value) <= margin):
        raise UnclearError
    return bool(number.value > limit.value)


# Random bits: "lowbias32" of C. Wellons, "Prospecting for Hash Functions", twice, keyed by seed, parameter and step.


def _lowbias32(x: Any) -> Any:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def random_words(seed: int, number: int, step: int, numel: int) -> np.ndarray:
    """The random word of each element, in the order of a contiguous tensor."""
    with np.errstate(over="ignore"):
        low, high, n, t = (np.uint32(x & 0xFFFFFFFF) for x in (seed, seed >> 32, number, step))
        golden = np.uint32(0x9E3779B9)
        stream = _lowbias32(_lowbias32(low ^ _lowbias32(high + golden)) + n * golden)
        key = _lowbias32(stream ^ t)
        other = _lowbias32(key + stream + t * np.uint32(0x85EBCA6B))
        return _lowbias32(_lowbias32(np.arange(numel, dtype=np.uint32) ^ key) + other)


# Schedules: the factor on the first rate after s calls of `scheduler.step()`, of 4.34.


def schedule(name: str, s: int, warmup: int, total: int, *, lr: float = 0.0) -> float:
    """The factor of a schedule by its name."""
    if name != "constant" and s < warmup:
        return s / max(1, warmup)
    share = (s - warmup) / max(1, total - warmup)
    if name == "linear":
        return max(0.0, 1.0 - share)
    if name == "cosine":
        return max(0.0, (1.0 + np.cos(np.pi * share)) / 2.0)
    if name == "cosine_with_restarts":
        return 0.0 if share >= 1.0 else max(0.0, (1.0 + np.cos(np.pi * (share % 1.0))) / 2.0)
    if name == "polynomial":
        return 1e-7 / lr if s > total else ((lr - 1e-7) * (1.0 - (s - warmup) / (total - warmup)) + 1e-7) / lr
    if name == "inverse_sqrt":
        return 1.0 / np.sqrt(s / warmup)
    return 1.0
