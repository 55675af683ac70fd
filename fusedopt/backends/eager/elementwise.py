"""Rules that go over parameters and states of one shape element by element, on torch tensors that stay in the cache."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fusedopt.backends.eager.rounding import round_into
from fusedopt.backends.eager.stepper import EagerStepper, Part
from fusedopt.backends.eager.storage import Storage, as_cached, moment_bits, read_weight, weight_bits, write_weight
from fusedopt.backends.scratch import scratch
from fusedopt.precision import FREEZING
from fusedopt_kernels.layout import is_dense, same_layout

_PART = 1 << 18
"""Elements that a rule is given at a time: many small tensors joined, or a piece of a large one."""

Columns = Sequence[list[Tensor]]
"""Parameters, gradients, and a list for each state; a state that is not used has an empty one."""

Rule = Callable[..., Sequence[Tensor]]
"""Takes the size of each parameter, then parameters, gradients and states, joined if there are several, at least in
float32; returns new parameters and states, which may be in the memory of the old ones."""


class ElementwiseStepper(EagerStepper):
    """The stepper of a rule for one device. A subclass brings the rule."""

    states: ClassVar[tuple[str, ...]]
    """Names of the states that the rule takes, in their order."""

    rule: Callable[..., Sequence[Tensor]]
    """Takes hyper-parameters, parameter, gradient and states; returns the new parameter and the new states."""

    def update(self, part: Part) -> None:
        columns = [part.params, part.grads, *([s[name] for s in part.states] for name in self.states)]
        factor = -part.factor if part.hyper.maximize else part.factor
        storage = Storage.of(part)
        stochastic = [name in FREEZING for name in self.states]
        apply(lambda _, *tensors: self.rule(part.hyper, *tensors), columns, factor, storage, stochastic)


def apply(
    rule: Rule,
    columns: Columns,
    factor: float,
    storage: Storage,
    stochastic_states: Sequence[bool],
    *,
    in_order: bool = False,
) -> None:
    """Updates parameters and states by a rule, whatever their layout, in at least float32, rounded once.

    Args:
        rule: the rule.
        columns: of what it takes.
        factor: on the gradients.
        storage: of the parameters.
        stochastic_states: for each state, whether one of 16 bits is rounded stochastically where anything is.
        in_order: whether the rule is to get tensors that are not contiguous alone, as they are.
    """
    alike: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(columns[0]):
        alike.setdefault(p.dtype, []).append(i)
    in_order = in_order or storage.keys is not None
    for dtype, which in alike.items():
        masters = storage.masters if storage.masters[which[0]] is not None else []
        numbered = storage.keys is not None and dtype.itemsize == 2
        everything: Any = [*columns, masters]
        for piece in parts(everything, which, _PART, in_order=in_order):
            params, grads, *states, completing = piece.columns
            p = _weights(params, completing)
            g = as_cached(_joined(grads), "gradient", p.dtype)
            others = [_joined(column).to(p.dtype) for column in states if column]
            new = rule(piece.sizes, p, g if factor == 1.0 else g * factor, *others)
            words = None
            if numbered or (
                storage.keys is not None and any(column[0].dtype.itemsize == 2 for column in states if column)
            ):
                words = storage.words(piece.which, piece.sizes, piece.start, p.device)
            _store_weights(
                params, completing, new[0], weight_bits(words) if storage.stochastic and words is not None else None
            )
            for targets, values, stochastic in zip(filter(None, states), new[1:], stochastic_states):
                _store(
                    targets, values, moment_bits(words, targets[0].dtype) if stochastic and words is not None else None
                )


class Piece(NamedTuple):
    """Tensors that are updated together.

    Attributes:
        which: the rows.
        start: the first element, of a flat piece of a tensor; else 0.
        columns: the tensors.
    """

    which: list[int]
    start: int
    columns: list[list[Tensor]]

    @property
    def sizes(self) -> list[int]:
        """Elements of each row."""
        return [t.numel() for t in self.columns[0]]


def parts(columns: Columns, which: Sequence[int], size: int, *, in_order: bool = False) -> Iterator[Piece]:
    """These rows of the columns, up to `size` elements at a time; those without elements are left out.

    Small tensors come together, as they are; of large ones of one layout come flat pieces, in which a step may not
    know them; of other large ones whole tensors. With `in_order`, tensors that are not contiguous come alone and whole.
    """
    some: list[int] = []
    elements = 0
    for i in which:
        p = columns[0][i]
        numel = p.numel()
        alone = in_order and not all(column[i].is_contiguous() for column in columns if column)
        if 2 * numel >= size or (alone and numel):
            one = [column[i : i + 1] for column in columns]
            yield from [Piece([i], 0, one)] if alone else _pieces(i, one, size)
            continue
        if elements + numel > size:
            yield _together(columns, some)
            some, elements = [], 0
        if numel:
            some.append(i)
        elements += numel
    if some:
        yield _together(columns, some)


def _together(columns: Columns, some: list[int]) -> Piece:
    return Piece(some, 0, [[column[j] for j in some] if column else [] for column in columns])


def _pieces(i: int, one: list[list[Tensor]], size: int) -> Iterator[Piece]:
    (p,), *others = one
    if not is_dense(p) or not all(same_layout(t, p) for column in others for t in column):
        yield Piece([i], 0, one)
        return
    cut = [[t.as_strided((t.numel(),), (1,)).split(size) for t in column] for column in one]
    for k in range(len(cut[0][0])):
        yield Piece([i], k * size, [[pieces[k] for pieces in column] for column in cut])


def _weights(params: list[Tensor], masters: list[Tensor]) -> Tensor:
    p = _joined(params)
    on_cpu = p.device.type == "cpu" and p.is_contiguous() and p.dtype.itemsize == 2
    out = scratch.like(p, "weight", torch.float32) if on_cpu else None
    return read_weight(p, _joined(masters) if masters else None, out)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _store_weights(params: list[Tensor], masters: list[Tensor], weights: Tensor, bits: Tensor | None) -> None:
    if len(params) == 1:
        write_weight(
            params[0], masters[0] if masters else None, weights, None if bits is None else bits.view_as(weights)
        )
        return
    if not masters:
        _store(params, weights, bits)
        return
    p, master = _joined(params), _joined(masters)  # copies
    write_weight(p, master, weights, None)
    _store(params, p, None)
    _store(masters, master, None)


def _store(targets: list[Tensor], values: Tensor, bits: Tensor | None) -> None:
    if len(targets) == 1:
        if values.data_ptr() != targets[0].data_ptr():  # else the rule wrote to it
            round_into(targets[0], values, None if bits is None else bits.view_as(values))
        return
    sizes = [t.numel() for t in targets]
    all_bits = [None] * len(sizes) if bits is None else bits.split(sizes)
    for target, value, own in zip(targets, values.split(sizes), all_bits):
        round_into(target, value.view(target.shape), None if own is None else own.view(target.shape))


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN for NaN, of which torch makes 0: hence a 0 is added that is NaN there."""
    return torch.sign(x).add_(x.clamp(-1.0, 1.0), alpha=0.0)
