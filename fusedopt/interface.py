"""The interface between optimizers and backends: what one step hands down."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.precision import PLAIN, Precision
from fusedopt_kernels import rules
from fusedopt_kernels.rules import Convention

Number = Any
"""A hyper-parameter: a float, or a tensor of one element, which is read on its device. Eager rules get floats."""


class AdamWHyper(NamedTuple):
    """Hyper-parameters of one set of parameters, as the backends get them."""

    lr: Number
    beta1: Number
    beta2: Number
    eps: Number
    weight_decay: Number
    correct_bias: bool
    amsgrad: bool
    maximize: bool
    convention: Convention


class AdafactorHyper(NamedTuple):
    """Hyper-parameters of one set of parameters, as the backends get them.

    Attributes:
        lr: None for relative steps.
        square_eps: added to squared gradients, `eps[0]`.
        rms_floor: smallest root mean square of a parameter in a rate, `eps[1]`.
        beta1: None for no average of updates.
    """

    lr: Number | None
    square_eps: Number
    rms_floor: Number
    clip_threshold: float
    decay_rate: float
    beta1: Number | None
    weight_decay: Number
    scale_parameter: bool
    warmup_init: bool
    maximize: bool

    def rate(self, step: Any, rms: Any, sqrt: Any = math.sqrt, minimum: Any = min, fmax: Any = max) -> Any:
        """The rate of update number `step` of a parameter whose root mean square is `rms`."""
        # Whatever dtype they were given in.
        rate, floor = (x.double() if isinstance(x, Tensor) else x for x in (self.lr, self.rms_floor))
        if rate is None:
            constant, slope = rules.RELATIVE_STEP_CEILINGS[self.warmup_init]
            rate = rules.relative_step(step, constant, slope, sqrt, minimum)
        return rules.scaled_rate(rate, rms, floor, fmax) if self.scale_parameter else rate


def fmax(floor: float | Tensor, rms: Tensor) -> Tensor:
    """The larger number, `floor` where `rms` is NaN; for `AdafactorHyper.rate` of a tensor."""
    return torch.where(rms > floor, rms, floor)


class Reads(NamedTuple):
    """How often a step of the kernels reads from memory what is as large as a parameter, if no cache keeps it.

    Moments are read once. Weights and moments are written once, gradients never.

    Attributes:
        gradient: one more where the step needs the norm of all gradients.
        weight: and what completes it.
    """

    gradient: int = 1
    weight: int = 1


ReduceDims = tuple[tuple[Any, int], ...]
"""Where the shards of a tensor are: pairs of a device mesh and one of its dimensions; () for a whole tensor."""


class ShardPosition(NamedTuple):
    """The place of a shard's elements in the whole parameter: element i of the shard is element
    `i + i // length * gap + offset`, in the order of contiguous tensors."""

    length: int
    gap: int
    offset: int


class ShardInfo(NamedTuple):
    """How a parameter is split over processes, of which a step has one shard.

    Attributes:
        shape: of the whole parameter.
        row_dims, column_dims: over what its last dimension but one, and its last one, are split; () for a vector.
        all_dims: over what all dimensions are split.
        position: None where no rounding depends on it.
    """

    shape: torch.Size
    row_dims: ReduceDims
    column_dims: ReduceDims
    all_dims: ReduceDims
    position: ShardPosition | None = None


class ParamSet(NamedTuple):
    """Parameters that one step updates with the same hyper-parameters.

    Attributes:
        rule: which update the backends run.
        hyper: the hyper-parameters, a NamedTuple that the rule's backends know.
        params: all parameters of the set, those without gradient included, so that their place does not change.
        grads: one gradient per parameter, or None: that parameter and its state are left alone.
        states: one dict per parameter (names to tensors); empty for a parameter that never had a gradient.
        shard_infos: one per parameter, None for a whole one, or None if all are whole.
            Tensors of a sharded one are its local shards.
        precision: how weights and states are kept.
        places: int64, the row of each parameter in `Measurement.sums`; None if nothing is measured.
    """

    rule: str
    hyper: Any
    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[dict[str, Tensor]]
    shard_infos: list[ShardInfo | None] | None = None
    precision: Precision = PLAIN
    places: np.ndarray | None = None

    @property
    def shares_steps(self) -> bool:
        """True if its parameters count the steps of the whole optimizer."""
        convention = getattr(self.hyper, "convention", None)
        return convention is not None and convention.shared_steps

    def on(self, device: torch.device) -> "ParamSet":
        """The part of this set whose parameters live on `device`."""
        return self.only(lambda p: p.device == device)

    def only(self, wanted: Callable[[Tensor], bool]) -> "ParamSet":
        """The part of this set whose parameters are wanted."""
        return self.at([i for i, p in enumerate(self.params) if wanted(p)])

    def at(self, places: list[int]) -> "ParamSet":
        """The part of this set whose parameters are in these places."""

        def of(column: list[Any]) -> list[Any]:
            return [column[i] for i in places]

        return self._replace(
            params=of(self.params),
            grads=of(self.grads),
            states=of(self.states),
            shard_infos=None if self.shard_infos is None else of(self.shard_infos),
            places=None if self.places is None else self.places[places],
        )


def _quotient(scale: float | Tensor, grad_scale: Tensor | None) -> float:
    # Of a float and a tensor: a GradScaler that has fallen to 0 makes this inf, as on a device, and raises nothing.
    return float(scale) if grad_scale is None else float(float(scale) / grad_scale.double())


class Measurement(NamedTuple):
    """What a step is asked to measure.

    Attributes:
        sums: float64 [parameters, measures], see `fusedopt_kernels.measures`; a step overwrites the rows of parameters
            with a gradient by sums over local shards. By device.
        scale: the factor on gradients before clipping, as in `StepArgs`.
        grad_scale: what they are divided by, as there.
    """

    sums: dict[torch.device, Tensor]
    scale: float | Tensor = 1.0
    grad_scale: Tensor | None = None

    def factor(self) -> float:
        """The factor on gradients; waits for the device that knows it."""
        return _quotient(self.scale, self.grad_scale)


class StepArgs(NamedTuple):
    """The arguments of one step that are not hyper-parameters.

    Attributes:
        scale: gradients are multiplied by it on the way into the update; never written back. A tensor of one element
            is read on its device.
        grad_scale: a tensor of one element by which gradients are divided on the way into the update, None for 1.
        found_inf: a tensor of one element; if it is not 0, the step changes nothing and is not counted. None for 0.
        measurement: what is to be measured, skipped steps included; None for nothing.
        tensors: stands for the tensors of the step, see `States.tensors`; None where nothing is known of them. At steps
            with the same object, param sets have the same parameters and states, and what is derived from types, sizes,
            strides and dtypes of tensors holds; their addresses do not.
    """

    scale: float | Tensor = 1.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    measurement: Measurement | None = None
    tensors: object | None = None

    def checked(self) -> "StepArgs":
        """The same with 0-d tensors.

        Raises:
            ValueError: a tensor of more than one element, or a scale that is not a finite real number.
        """
        if not isinstance(self.scale, Tensor) and not math.isfinite(checks.number("scale", self.scale)):
            raise ValueError(f"scale must be finite, got {self.scale!r}: skip the step instead")
        values = {}
        for name, value in self._asdict().items():
            if isinstance(value, Tensor):
                if value.numel() != 1 or value.is_complex():
                    got = f"shape {tuple(value.shape)}, {value.dtype}"
                    raise ValueError(f"{name} as a tensor must hold one real number, got {got}")
                value = value.reshape(())
            values[name] = value
        return StepArgs(**values)

    def skips(self) -> bool:
        """True if the step changes nothing; waits for the device that knows it."""
        return self.found_inf is not None and bool(self.found_inf)

    def factor(self) -> float:
        """The factor on gradients; waits for the device that knows it."""
        return _quotient(self.scale, self.grad_scale)
