"""The step of a rule on one device: skips it or counts it, then hands the rule what takes the same update."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt.backends.eager.step_counts import advance
from fusedopt.batch import Batch, Control, Split


class Part(NamedTuple):
    """Parameters with a gradient that take the same update; lists of the same length.

    Attributes:
        hyper: the hyper-parameters; a rate is a float, or None.
        step: number of the update, from 1.
        factor: what gradients are multiplied by; without the sign of `maximize`.
        splits: None where all parameters are whole.
    """

    hyper: Any
    step: float
    factor: float
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    splits: list[Split | None] | None


class EagerStepper:
    """What the steppers of all rules have in common. A subclass brings `update`."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        # Shared counts go on, although all gradients of this step may belong to parameters of another device.
        shared = any(batch.shares_steps for batch in batches)
        advancing = [
            [i for i, (s, g) in enumerate(zip(batch.states, batch.grads)) if (s if shared else g is not None)]
            for batch in batches
        ]
        if not any(advancing) or control.skips():
            return
        counts = iter(advance([batch.states[i]["step"] for batch, which in zip(batches, advancing) for i in which]))
        factor = control.factor()
        self.update_all(
            [part for batch, which in zip(batches, advancing) for part in _parts(batch, which, counts, factor)]
        )

    def update_all(self, parts: Sequence[Part]) -> None:
        """Updates everything; overridden where what one part needs depends on the others."""
        for part in parts:
            self.update(part)

    def update(self, part: Part) -> None:
        """Updates the parameters of a part and their states, but for the steps, in place."""
        raise NotImplementedError


def _parts(batch: Batch, advanced: Sequence[int], counts: Iterator[float], factor: float) -> Iterator[Part]:
    alike: dict[float, list[int]] = {}
    for i, step in zip(advanced, counts):
        if batch.grads[i] is not None:
            alike.setdefault(step, []).append(i)
    hyper = batch.hyper
    if isinstance(hyper.lr, Tensor):  # a number whatever its dtype, as on the other backend
        hyper = hyper._replace(lr=float(hyper.lr))
    for step, which in alike.items():
        columns: Any = (batch.params, batch.grads, batch.states, batch.splits)
        yield Part(hyper, step, factor, *(column and [column[i] for i in which] for column in columns))
