"""The learning-rate schedules that depend only on the step, one flat frozen dataclass each.

They need no optimizer: `LinearSchedule(10, 100)(step)` is the factor of the initial rate. The functions in
`fusedopt.schedules.functions` pass these objects to torch's `LambdaLR`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusedopt.schedules.base import Functions, Schedule

__all__ = [
    "ConstantSchedule",
    "ConstantWithWarmupSchedule",
    "CosineSchedule",
    "CosineWarmupWithMinLRSchedule",
    "CosineWithMinLRSchedule",
    "CosineWithRestartsSchedule",
    "InverseSqrtSchedule",
    "LinearSchedule",
    "PolynomialSchedule",
    "WarmupStableDecaySchedule",
]


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The initial learning rate throughout.

    Example:
        >>> ConstantSchedule()(1000)
        1.0
    """

    name = "constant"
    num_warmup_steps = 0


@dataclass(frozen=True)
class ConstantWithWarmupSchedule(Schedule):
    """A straight line from 0 up to the initial rate, which then stays.

    Example:
        >>> [ConstantWithWarmupSchedule(4)(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    name = "constant_with_warmup"
    num_warmup_steps: float


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """A straight line up to the initial rate, and one down to 0 at `num_training_steps`.

    Example:
        >>> [LinearSchedule(2, 6)(step) for step in (0, 2, 3, 6, 9)]
        [0.0, 1.0, 0.75, 0.0, 0.0]
    """

    name = "linear"
    num_warmup_steps: float
    num_training_steps: float

    def _after(self, s: Any, f: Functions) -> Any:
        left = (self.num_training_steps - s) / max(1, self.num_training_steps - self.num_warmup_steps)
        return f.at_least(left, 0.0)


def _cosine_wave(progress: Any, num_cycles: float, f: Functions) -> Any:
    return 0.5 * (1.0 + f.cos(math.pi * num_cycles * 2.0 * progress))


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """A cosine wave from the initial rate; half a wave (the default) ends at 0. Past the end it rises again.

    Source: SGDR, Loshchilov and Hutter 2016 (https://arxiv.org/abs/1608.03983), without restarts.

    Attributes:
        num_cycles: Number of full waves between the warm-up and the end.

    Example:
        >>> [round(CosineSchedule(0, 4)(step), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    name = "cosine"
    num_warmup_steps: float
    num_training_steps: float
    num_cycles: float = 0.5

    def _after(self, s: Any, f: Functions) -> Any:
        return f.at_least(_cosine_wave(self._progress(s), self.num_cycles, f), 0.0)


@dataclass(frozen=True)
class CosineWithRestartsSchedule(Schedule):
    """Half a cosine wave down, `num_cycles` times, each from the initial rate; 0 from the end on.

    Source: SGDR, Loshchilov and Hutter 2016 (https://arxiv.org/abs/1608.03983), with cycles of equal length.

    Example:
        >>> [round(CosineWithRestartsSchedule(0, 8, num_cycles=2)(step), 3) for step in (0, 2, 3, 4, 8)]
        [1.0, 0.5, 0.146, 1.0, 0.0]
    """

    name = "cosine_with_restarts"
    num_warmup_steps: float
    num_training_steps: float
    num_cycles: float = 1

    def _after(self, s: Any, f: Functions) -> Any:
        progress = self._progress(s)
        wave = 0.5 * (1.0 + f.cos(math.pi * ((self.num_cycles * progress) % 1.0)))
        return f.where(progress >= 1.0, 0.0, f.at_least(wave, 0.0))


def polynomial(start: float, end: float, power: float, left: Any, f: Functions) -> Any:
    """Returns the rate between `start` and `end` where the share `left` of the way is left; `end` if it is negative."""
    return (start - end) * f.at_least(left, 0.0) ** power + end


@dataclass(frozen=True)
class PolynomialSchedule(Schedule):
    """From the initial rate to `lr_end` as (1 - progress) to the `power`; `lr_end` from the end on.

    Where the warm-up takes all training steps, transformers divides by zero at the end of it; here the rate is `lr_end`
    from that step on.

    Attributes:
        lr_init: The rate that `lr_end` is compared with, in the units of the optimizer's rate.
        lr_end: The rate at the end, below `lr_init`, in the same units. Negative ones are allowed, as in the original.
        power: Exponent >= 0; 1 is a straight line.

    Raises:
        ValueError: Also if `lr_end` is not below `lr_init`, or `lr_init` is not positive, or `power` is negative.

    Example:
        >>> schedule = PolynomialSchedule(0, 4, lr_init=1.0, lr_end=0.2, power=2.0)
        >>> [round(schedule(step), 3) for step in (0, 2, 4, 9)]
        [1.0, 0.4, 0.2, 0.2]
    """

    name = "polynomial"
    num_warmup_steps: float
    num_training_steps: float
    lr_init: float
    lr_end: float = 1e-7
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr_init > self.lr_end:
            raise ValueError(
                f"lr_end must be below the initial learning rate {self.lr_init}, got {self.lr_end}; "
                "pass a smaller lr_end or train with a larger lr"
            )
        if self.lr_init <= 0:
            raise ValueError(f"the initial learning rate must be > 0 to decay from, got {self.lr_init}")
        if self.power < 0:
            raise ValueError(f"power must be >= 0, got {self.power}; a negative power grows without bound to the end")

    def _after(self, s: Any, f: Functions) -> Any:
        w, total = self.num_warmup_steps, self.num_training_steps
        left = 1 - (s - w) / (total - w if total > w else 1)
        rate = polynomial(self.lr_init, self.lr_end, self.power, left, f)
        ended = s > total if total > w else s >= w
        return f.where(ended, self.lr_end / self.lr_init, rate / self.lr_init)


@dataclass(frozen=True)
class InverseSqrtSchedule(Schedule):
    """After the warm-up the rate falls as one over the square root of the step, without end.

    Source: `get_inverse_sqrt_schedule` of transformers, after big_vision.

    Attributes:
        timescale: Steps after the warm-up in which the rate falls by sqrt(2). Default: the length of the warm-up, or
            10,000 without one (as in transformers 5; 4.34 divides by zero).

    Raises:
        ValueError: Also if `timescale` is not positive.

    Example:
        >>> [InverseSqrtSchedule(4)(step) for step in (0, 2, 4, 16)]
        [0.0, 0.5, 1.0, 0.5]
        >>> InverseSqrtSchedule(0)
        InverseSqrtSchedule(num_warmup_steps=0, timescale=10000)
    """

    name = "inverse_sqrt"
    num_warmup_steps: float
    timescale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale is None:
            object.__setattr__(self, "timescale", self.num_warmup_steps or 10_000)
        elif self.timescale <= 0:
            raise ValueError(
                f"timescale must be > 0, got {self.timescale}; leave it out for the warm-up's length, "
                "or 10000 steps without warm-up"
            )

    @property
    def pace(self) -> float:
        return max(self.num_warmup_steps, self.timescale or 0)

    def _after(self, s: Any, f: Functions) -> Any:
        assert self.timescale is not None  # set at construction
        # At least 1 but for rounding, which makes it 0 where the timescale vanishes against the warm-up.
        elapsed = (s + (self.timescale - self.num_warmup_steps)) / self.timescale
        return 1.0 / f.sqrt(f.at_least(elapsed, 1.0))


@dataclass(frozen=True)
class CosineWithMinLRSchedule(Schedule):
    """A cosine wave between the initial rate and `min_lr_rate` times the initial rate. Past the end it rises again.

    Source: `get_cosine_with_min_lr_schedule_with_warmup` of transformers 5.

    Attributes:
        min_lr_rate: The lowest rate, as a factor of the initial rate. Below 0 the wave is cut off at 0.
        num_cycles: Number of full waves between the warm-up and the end.

    Example:
        >>> [round(CosineWithMinLRSchedule(0, 4, min_lr_rate=0.2)(step), 3) for step in (0, 2, 4)]
        [1.0, 0.6, 0.2]
    """

    name = "cosine_with_min_lr"
    num_warmup_steps: float
    num_training_steps: float
    min_lr_rate: float
    num_cycles: float = 0.5

    def _after(self, s: Any, f: Functions) -> Any:
        wave = _cosine_wave(self._progress(s), self.num_cycles, f)
        return f.at_least(wave * (1 - self.min_lr_rate) + self.min_lr_rate, 0.0)


@dataclass(frozen=True)
class CosineWarmupWithMinLRSchedule(CosineWithMinLRSchedule):
    """`CosineWithMinLRSchedule` one step ahead, so that neither the first nor the last step is wasted at rate 0.

    Source: `get_cosine_with_min_lr_schedule_with_warmup_lr_rate` of transformers 5.

    Attributes:
        warmup_lr_rate: Where the warm-up starts, as a factor >= 0 of the initial rate. Default: one step's share, 1 /
            `num_warmup_steps`.

    Raises:
        ValueError: Also if `warmup_lr_rate` is negative.

    Example:
        >>> [round(CosineWarmupWithMinLRSchedule(2, 6, min_lr_rate=0.2)(step), 3) for step in (0, 1, 3, 5)]
        [0.5, 1.0, 0.6, 0.2]
    """

    name = "cosine_warmup_with_min_lr"
    warmup_lr_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_lr_rate is not None and self.warmup_lr_rate < 0:
            raise ValueError(
                f"warmup_lr_rate must be >= 0, got {self.warmup_lr_rate}; leave it out for one step's share"
            )

    def _warm_up(self, s: Any, f: Functions) -> Any:
        w, start = self.num_warmup_steps, self.warmup_lr_rate
        if start is None:
            return (s + 1.0) / max(1.0, w)
        return start + (1.0 - start) * s / max(1, w - 1)

    def _after(self, s: Any, f: Functions) -> Any:
        return super()._after(s + 1.0, f)


_RISE: dict[str, Callable[[Any, Functions], Any]] = {
    "linear": lambda x, f: x,
    "cosine": lambda x, f: 0.5 * (1.0 - f.cos(math.pi * x)),
    "1-sqrt": lambda x, f: 1.0 - f.sqrt(1.0 - x),
}
_FALL: dict[str, Callable[[Any, float, Functions], Any]] = {
    "linear": lambda x, num_cycles, f: 1.0 - x,
    "cosine": _cosine_wave,
    "1-sqrt": lambda x, num_cycles, f: 1.0 - f.sqrt(x),
}


@dataclass(frozen=True)
class WarmupStableDecaySchedule(Schedule):
    """Warm-up, a stable phase at the initial rate, and a decay to `min_lr_ratio` times the initial rate.

    Source: `get_wsd_schedule` of transformers 5; MiniCPM, Hu et al. 2024 (https://arxiv.org/abs/2404.06395).

    Attributes:
        num_decay_steps: Length of the decay.
        num_training_steps: Length of all three phases; the stable phase takes what the other two leave.
        num_stable_steps: Length of the stable phase, instead of `num_training_steps`; used if both are given.
        warmup_type: Shape of the warm-up: "linear", "cosine" or "1-sqrt".
        decay_type: Shape of the decay, from the same three.
        min_lr_ratio: Where warm-up starts and decay ends, as a factor >= 0 of the initial rate.
        num_cycles: Number of full waves of a cosine decay.

    Raises:
        ValueError: Also if neither length is given, a shape is unknown, or `min_lr_ratio` is negative.

    Example:
        >>> schedule = WarmupStableDecaySchedule(2, 4, num_training_steps=10, decay_type="linear")
        >>> [schedule(step) for step in (0, 1, 2, 6, 7, 9, 10)]
        [0.0, 0.5, 1.0, 1.0, 0.75, 0.25, 0.0]
    """

    name = "warmup_stable_decay"
    num_warmup_steps: float
    num_decay_steps: float
    num_training_steps: float | None = None
    num_stable_steps: float | None = None
    warmup_type: str = "linear"
    decay_type: str = "cosine"
    min_lr_ratio: float = 0.0
    num_cycles: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_training_steps is None and self.num_stable_steps is None:
            raise ValueError("num_training_steps and num_stable_steps are both missing; give one of them")
        for option in ("warmup_type", "decay_type"):
            if getattr(self, option) not in _RISE:
                raise ValueError(f"{option} must be one of {', '.join(_RISE)}, got {getattr(self, option)!r}")
        if self.min_lr_ratio < 0:
            raise ValueError(f"min_lr_ratio must be >= 0, got {self.min_lr_ratio}; a negative rate climbs the loss")
        if self.num_training_steps is not None and self.num_stable_steps is not None:
            warnings.warn(
                f"num_stable_steps={self.num_stable_steps} is used and num_training_steps="
                f"{self.num_training_steps} is not; give one of them",
                stacklevel=4,
            )

    @property
    def _stable_steps(self) -> float:
        """Negative if the total is too short for warm-up and decay: the decay then starts in its middle."""
        if self.num_stable_steps is not None:
            return self.num_stable_steps
        assert self.num_training_steps is not None  # checked at construction
        return self.num_training_steps - self.num_warmup_steps - self.num_decay_steps

    @property
    def length(self) -> float:
        return self.num_warmup_steps + self._stable_steps + self.num_decay_steps

    def _scaled(self, shape: Any, f: Functions) -> Any:
        return f.at_least(shape * (1.0 - self.min_lr_ratio) + self.min_lr_ratio, 0.0)

    def _warm_up(self, s: Any, f: Functions) -> Any:
        return self._scaled(_RISE[self.warmup_type](s / max(1, self.num_warmup_steps), f), f)

    def _after(self, s: Any, f: Functions) -> Any:
        # In the order of the original: counts may be fractions, and then rounding decides which phase a step is in.
        w, stable = self.num_warmup_steps, self._stable_steps
        progress = f.at_most(f.at_least((s - w - stable) / max(1, self.num_decay_steps), 0.0), 1.0)
        decay = self._scaled(_FALL[self.decay_type](progress, self.num_cycles, f), f)
        return f.where(s < w + stable, 1.0, f.where(s < self.length, decay, self.min_lr_ratio))
