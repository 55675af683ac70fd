"""Rules that go over parameters and states of one shape element by element, on torch tensors that stay in the cache."""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fusedopt.backends.eager.rounding import round_into
from fusedopt.backends.eager.stepper import EagerStepper, Part
from fusedopt_kernels.layout import is_dense, same_layout

_PART = 1 << 16
"""Elements that a rule is given at a time: many small tensors joined, or a piece of a large one."""

Columns = Sequence[list[Tensor]]
"""Parameters, gradients, and a list for each state; a state that is not used has an empty one."""

Rule = Callable[..., Sequence[Tensor]]
"""Takes a parameter, its gradient and its states, at least in float32; returns the new parameter and states."""


class ElementwiseStepper(EagerStepper):
    """The stepper of a rule for one device. A subclass brings the rule."""

    states: ClassVar[tuple[str, ...]]
    """Names of the states that the rule takes, in their order."""

    rule: Callable[..., Sequence[Tensor]]
    """Takes hyper-parameters, parameter, gradient and states; returns the new parameter and the new states."""

    def update(self, part: Part) -> None:
        columns = [part.params, part.grads, *([s[name] for s in part.states] for name in self.states)]
        factor = -part.factor if part.hyper.maximize else part.factor
        apply(lambda *tensors: self.rule(part.hyper, *tensors), columns, factor)


def apply(rule: Rule, columns: Columns, factor: float) -> None:
    """Updates parameters and states by a rule, whatever their layout, in at least float32, rounded once.

    Args:
        rule: the rule.
        columns: of what it takes.
        factor: on the gradients.
    """
    alike: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(columns[0]):
        alike.setdefault(p.dtype, []).append(i)
    for which in alike.values():
        for params, grads, *states in parts(columns, which, _PART):
            dtype = torch.promote_types(params[0].dtype, torch.float32)
            p, g, *others = (_joined(column).to(dtype) for column in (params, grads, *states) if column)
            new = rule(p, g if factor == 1.0 else g * factor, *others)
            for targets, values in zip((params, *filter(None, states)), new):
                _store(targets, values)


def parts(columns: Columns, which: Sequence[int], size: int) -> Iterator[Columns]:
    """These rows of the columns, up to `size` elements at a time; those without elements are left out.

    Small tensors come together, as they are; of large ones of one layout come flat pieces, in which a step may not
    know them; of other large ones whole tensors.
    """
    some: list[int] = []
    elements = 0
    for i in which:
        numel = columns[0][i].numel()
        if 2 * numel >= size:
            yield from _pieces([column[i : i + 1] for column in columns], size)
            continue
        if elements + numel > size:
            yield [[column[j] for j in some] if column else [] for column in columns]
            some, elements = [], 0
        if numel:
            some.append(i)
        elements += numel
    if some:
        yield [[column[j] for j in some] if column else [] for column in columns]


def _pieces(one: Columns, size: int) -> Iterator[Columns]:
    (p,), *others = one
    if not is_dense(p) or not all(same_layout(t, p) for column in others for t in column):
        yield one
        return
    cut = [[t.as_strided((t.numel(),), (1,)).split(size) for t in column] for column in one]
    for k in range(len(cut[0][0])):
        yield [[pieces[k] for pieces in column] for column in cut]


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _store(targets: list[Tensor], values: Tensor) -> None:
    if len(targets) == 1:
        round_into(targets[0], values)
        return
    for target, value in zip(targets, values.split([t.numel() for t in targets])):
        round_into(target, value.view(target.shape))


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN for NaN, of which torch makes 0: hence a 0 is added that is NaN there."""
    return torch.sign(x).add_(x.clamp(-1.0, 1.0), alpha=0.0)
