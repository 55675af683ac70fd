"""The step of a rule on one device: skips it or counts it, then hands the rule what takes the same update."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt.backends.eager.measures import Measure
from fusedopt.backends.eager.step_counts import advanced
from fusedopt.backends.eager.storage import master_of, read_weight
from fusedopt.backends.scratch import scratch
from fusedopt.backends.work import Part, Work
from fusedopt.interface import Measurement, ParamSet, ShardInfo, StepArgs
from fusedopt.precision import Precision


class Bucket(NamedTuple):
    """Parameters with a gradient that take the same update; lists of the same length.

    Attributes:
        hyper: the hyper-parameters; those that are tensors or whole numbers as floats, whatever their dtype.
        step: number of the update, from 1.
        factor: what gradients are multiplied by; without the sign of `maximize`.
        shard_infos: None where all parameters are whole.
        precision: how weights and states are kept.
        measure: adds up their measures; None if there are to be none.
    """

    hyper: Any
    step: float
    factor: float
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    shard_infos: list[ShardInfo | None] | None
    precision: Precision
    measure: Measure | None


class EagerStepper:
    """The part that the steppers of all rules share. A subclass brings `parts`."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"

    def __call__(self, param_sets: Sequence[ParamSet], args: StepArgs) -> None:
        self.prepare(param_sets, args)()

    def prepare(self, param_sets: Sequence[ParamSet], args: StepArgs) -> Work:
        """Returns the step, which an error in the middle of it leaves to be gone on with by another call."""
        return Work(partial(self._parts, param_sets, args), retire=scratch.retire)

    def _parts(self, param_sets: Sequence[ParamSet], args: StepArgs) -> Iterable[Part]:
        # Shared counts go on, although all gradients of this step may belong to parameters of another device.
        shared = any(param_set.shares_steps for param_set in param_sets)
        advancing = [
            [i for i, (s, g) in enumerate(zip(param_set.states, param_set.grads)) if (s if shared else g is not None)]
            for param_set in param_sets
        ]
        if not any(advancing):
            return ()
        measures = [_measure(param_set, args.measurement) for param_set in param_sets]
        if args.skips():
            for param_set, measure in zip(param_sets, measures):
                _measure_skipped(param_set, measure)
            return ()
        new, write = advanced(
            [param_set.states[i]["step"] for param_set, which in zip(param_sets, advancing) for i in which]
        )
        counts, factor = iter(new), args.factor()
        buckets = [
            bucket
            for param_set, which, measure in zip(param_sets, advancing, measures)
            for bucket in _buckets(param_set, which, counts, factor, measure)
        ]

        def count() -> None:
            write()

        return [*self.parts_of_all(buckets), count]

    def parts_of_all(self, buckets: Sequence[Bucket]) -> list[Part]:
        """Returns the update of everything; overridden where what one bucket needs depends on the others."""
        return [partial(self.parts, bucket) for bucket in buckets]

    def parts(self, bucket: Bucket) -> Iterable[Part]:
        """Returns the update of the parameters of a bucket and their states, but for the steps, in place."""
        raise NotImplementedError


def _measure(param_set: ParamSet, measurement: Measurement | None) -> Measure | None:
    if measurement is None or param_set.places is None or not param_set.params:
        return None
    measure = Measure(measurement.sums[param_set.params[0].device], param_set.places, measurement.factor())
    measure.at([i for i, g in enumerate(param_set.grads) if g is not None]).begin()
    return measure


def _measure_skipped(param_set: ParamSet, measure: Measure | None) -> None:
    for i, (p, g, state) in enumerate(zip(param_set.params, param_set.grads, param_set.states)):
        if measure is not None and g is not None:
            master = master_of(p, state) if param_set.precision.master_weights else None
            measure.add([i], [p.numel()], g, read_weight(p, master))


def _buckets(
    param_set: ParamSet, advanced: Sequence[int], counts: Iterator[float], factor: float, measure: Measure | None
) -> Iterator[Bucket]:
    alike: dict[float, list[int]] = {}
    for i, step in zip(advanced, counts):
        if param_set.grads[i] is not None:
            alike.setdefault(step, []).append(i)
    options = param_set.hyper._asdict().items()
    hyper = param_set.hyper._replace(
        **{name: float(v) for name, v in options if type(v) is int or isinstance(v, Tensor)}
    )
    for step, which in alike.items():
        columns: Any = (param_set.params, param_set.grads, param_set.states, param_set.shard_infos)
        some: Any = [column and [column[i] for i in which] for column in columns]
        yield Bucket(*[hyper, step, factor, *some, param_set.precision, measure and measure.at(which)])
