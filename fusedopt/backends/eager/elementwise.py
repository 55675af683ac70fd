"""Rules that go over parameters and states of one shape element by element, on torch tensors that stay in the cache."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fusedopt.backends.eager.measures import Measure, copy_of
from fusedopt.backends.eager.rounding import rounded
from fusedopt.backends.eager.stepper import Bucket, EagerStepper
from fusedopt.backends.eager.storage import Storage, as_cached, moment_bits, read_weight, weight_bits, write_weight
from fusedopt.backends.scratch import scratch
from fusedopt.precision import FREEZING
from fusedopt_kernels.layout import is_dense, same_layout

_PIECE = 1 << 18
"""Elements that a rule is given at a time: many small tensors joined, or a piece of a large one."""

_LEAN_PIECE = 1 << 19
"""The same for a rule without temporaries, such as torch's kernel. With pieces of 2^18, 2^19 and 2^20, the operations
that 50M master weights need took 1.29, 1.19 and 1.28 times as long as float32 weights that are copied, on two
threads."""

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

    def update(self, bucket: Bucket) -> None:
        columns = [bucket.params, bucket.grads, *([s[name] for s in bucket.states] for name in self.states)]
        factor = -bucket.factor if bucket.hyper.maximize else bucket.factor
        storage = Storage.of(bucket)
        stochastic = [name in FREEZING for name in self.states]
        rule = self.rule
        apply(lambda _, *t: rule(bucket.hyper, *t), columns, factor, storage, stochastic, bucket.measure)


def apply(
    rule: Rule,
    columns: Columns,
    factor: float,
    storage: Storage,
    stochastic_states: Sequence[bool],
    measure: Measure | None = None,
    *,
    lean: bool = False,
) -> None:
    """Updates parameters and states by a rule, whatever their layout, in at least float32, rounded once.

    Args:
        rule: the rule.
        columns: of what it takes.
        factor: on the gradients.
        storage: of the parameters.
        stochastic_states: for each state, whether one of 16 bits is rounded stochastically where anything is.
        measure: adds up their measures; None if there are to be none.
        lean: whether the rule works in place, in the order of memory: it gets longer pieces, and alone, as they are,
            tensors that are not contiguous.
    """
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i in range(len(columns[0])):
        alike.setdefault(tuple([column[i].dtype for column in columns if column]), []).append(i)
    in_order = lean or storage.keys is not None
    for which in alike.values():
        masters = storage.masters if storage.masters[which[0]] is not None else []
        everything: Any = [*columns, masters]
        kept = [column[which[0]] for column in (columns[0], *columns[2:]) if column]
        numbered = storage.keys is not None and any(t.dtype.itemsize == 2 for t in kept)
        for piece in pieces(everything, which, _LEAN_PIECE if lean else _PIECE, in_order=in_order):
            params, grads, *states, completing = piece.columns
            narrow, master = joined(params), joined(completing) if completing else None
            p = _read(narrow, master)
            raw = joined(grads)
            old = copy_of(p) if lean and measure is not None else p
            g = as_cached(raw, p.dtype, factor)
            new = rule(piece.sizes, p, g, *[joined(column).to(p.dtype) for column in states if column])
            words = storage.words(piece.which, piece.sizes, piece.start, p.device) if numbered else None
            bits = weight_bits(words) if words is not None and storage.stochastic else None
            write = partial(write_weight, narrow, master, new[0], _like(bits, narrow))
            if measure is None:
                write()
            else:
                target = narrow if narrow.dtype.itemsize == 2 and master is None else None
                measure.around(write, piece.which, piece.sizes, raw, old, new[0], target)
            _spread(narrow, params)
            if master is not None:
                _spread(master, completing)
            for targets, values, stochastic in zip(filter(None, states), new[1:], stochastic_states):
                bits = moment_bits(words, targets[0].dtype) if words is not None and stochastic else None
                _spread(rounded(values, targets[0].dtype, _like(bits, values)), targets)


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


def pieces(columns: Columns, which: Sequence[int], size: int, *, in_order: bool = False) -> Iterator[Piece]:
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
            yield from [Piece([i], 0, one)] if alone else _flat_pieces(i, one, size)
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


def _flat_pieces(i: int, one: list[list[Tensor]], size: int) -> Iterator[Piece]:
    (p,), *others = one
    if not is_dense(p) or not all(same_layout(t, p) for column in others for t in column):
        yield Piece([i], 0, one)
        return
    cut = [[t.as_strided((t.numel(),), (1,)).split(size) for t in column] for column in one]
    for k in range(len(cut[0][0])):
        yield Piece([i], k * size, [[pieces[k] for pieces in column] for column in cut])


def _read(p: Tensor, master: Tensor | None) -> Tensor:
    on_cpu = p.device.type == "cpu" and p.is_contiguous() and p.dtype.itemsize == 2
    return read_weight(p, master, scratch.like(p, "weight", torch.float32) if on_cpu else None)


def joined(tensors: list[Tensor]) -> Tensor:
    """A copy of several tensors; one is returned itself."""
    return tensors[0] if len(tensors) == 1 else _flatten_dense_tensors(tensors)


def _spread(values: Tensor, targets: list[Tensor]) -> None:
    """Writes what `joined` made of tensors, or new values of it, back."""
    if len(targets) > 1:
        torch._foreach_copy_(targets, _unflatten_dense_tensors(values, targets))
    elif values.data_ptr() != targets[0].data_ptr():  # else they are there
        targets[0].copy_(values)


def _like(bits: Tensor | None, t: Tensor) -> Tensor | None:
    return None if bits is None else bits.view(t.shape)


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN for NaN, of which torch makes 0: hence a 0 is added that is NaN there."""
    return torch.sign(x).add_(x.clamp(-1.0, 1.0), alpha=0.0)
