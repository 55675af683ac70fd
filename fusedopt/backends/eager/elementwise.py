"""Rules that go over parameters and states of one shape element by element, on torch tensors that stay in the cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.backends.eager.measures import Measure, copy_of
from fusedopt.backends.eager.pieces import Columns, Joined, Piece, alike, pieces
from fusedopt.backends.eager.rounding import is_finite, rounded
from fusedopt.backends.eager.stepper import Bucket, EagerStepper
from fusedopt.backends.eager.storage import (
    Storage,
    as_cached,
    join_weight,
    moment_bits,
    read_weight,
    weight_bits,
    weight_writer,
)
from fusedopt.backends.scratch import Row, scratch
from fusedopt.backends.work import Part
from fusedopt.precision import FREEZING

_PIECE = 1 << 18
"""Elements that a rule is given at a time."""

_LEAN_PIECE = 1 << 19
"""The same for what works in place. With pieces of 2^18, 2^19 and 2^20, the operations that 50M master weights need
took 1.29, 1.19 and 1.28 times as long as float32 weights that are copied, on two threads."""

Rule = Callable[..., Sequence[Tensor]]
"""Takes parameters, gradients and states, several of each joined, at least in float32; returns new parameters and
states, which may be in the memory of the old ones."""

InPlace = Callable[..., object]
"""Takes a list of parameters, one of gradients and one for each state, in one dtype; updates them in place."""


class ElementwiseStepper(EagerStepper):
    """The stepper of a rule for one device. A subclass brings the rule."""

    states: ClassVar[tuple[str, ...]]
    """Names of the states that the rule takes, in their order."""

    rule: Callable[..., Sequence[Tensor]]
    """Takes hyper-parameters, parameter, gradient and states; returns the new parameter and the new states."""

    def parts(self, bucket: Bucket) -> Iterable[Part]:
        columns = [bucket.params, bucket.grads, *([s[name] for s in bucket.states] for name in self.states)]
        factor = -bucket.factor if bucket.hyper.maximize else bucket.factor
        storage = Storage.of(bucket)
        stochastic = [name in FREEZING for name in self.states]
        rule = self.rule
        return apply(lambda *t: rule(bucket.hyper, *t), columns, factor, storage, stochastic, bucket.measure)


def apply(
    rule: Rule,
    columns: Columns,
    factor: float,
    storage: Storage,
    stochastic_states: Sequence[bool],
    measure: Measure | None = None,
) -> Iterator[Part]:
    """Yields the update of parameters and states by a rule, whatever their layout, in at least float32, rounded once.

    Args:
        rule: the rule.
        columns: of what it takes.
        factor: on the gradients.
        storage: of the parameters.
        stochastic_states: for each state, whether one of 16 bits is rounded stochastically where anything is.
        measure: adds up their measures; None if there are to be none.
    """
    for piece in _stored_pieces(columns, storage, _PIECE, in_order=storage.keys is not None):
        yield partial(_apply_to, piece, rule, factor, storage, stochastic_states, measure)


def _apply_to(
    piece: Piece,
    rule: Rule,
    factor: float,
    storage: Storage,
    stochastic_states: Sequence[bool],
    measure: Measure | None,
) -> None:
    params, grads, completing, *states = piece.columns
    narrow, master = Joined.of(params, "p"), Joined.of(completing, "master") if completing else None
    p = _read(narrow, master)
    raw = Joined.of(grads, "g").whole
    g = as_cached(raw, p.dtype, factor)
    kept = [Joined.of(column, f"state {k}") for k, column in enumerate(states)]
    new = rule(p, g, *[state.whole.to(p.dtype) for state in kept])
    measured = None if measure is None else partial(measure.add, g=raw, old=p)
    _write(piece, storage, narrow, master, new[0], list(zip(kept, new[1:], stochastic_states)), measured)


def apply_in_place(
    update: InPlace,
    once_more: Callable[..., Tensor],
    columns: Columns,
    factor: float,
    storage: Storage,
    stochastic_states: Sequence[bool],
    measure: Measure | None = None,
) -> Iterator[Part]:
    """The same, on a CPU, for tensors of one layout, by what works in place and in the order of memory: torch's kernel.

    Two parts for each piece: the second one begins where torch's kernel has written what needs no rounding.

    Its bits depend on where a tensor ends, so it gets those that are joined one by one, and those that are not
    contiguous as they are.

    Args:
        update: the kernel; what it makes of the states does not depend on the parameter.
        once_more: the same on a parameter and its new states; returns the new parameter.
        columns: of what the kernel takes.
        factor: on the gradients.
        storage: of the parameters.
        stochastic_states, measure: as for `apply`.
    """
    for piece in _stored_pieces(columns, storage, _LEAN_PIECE, in_order=True):
        rest: list[Callable[[], None]] = []
        yield partial(_update_in_place, piece, update, once_more, factor, storage, stochastic_states, measure, rest)
        yield partial(_call, rest)


def _call(rest: list[Callable[[], None]]) -> None:
    rest[0]()


def _update_in_place(
    piece: Piece,
    update: InPlace,
    once_more: Callable[..., Tensor],
    factor: float,
    storage: Storage,
    stochastic_states: Sequence[bool],
    measure: Measure | None,
    rest: list[Callable[[], None]],
) -> None:
    """Updates what needs no rounding, and leaves the rest to do in `rest`."""
    params, grads, completing, *states = piece.columns
    narrow, master = Joined.of(params, "p"), Joined.of(completing, "master") if completing else None
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    p = _room(narrow, "weight", dtype)
    raw = Joined.of(grads, "g")
    measured = None
    if measure is not None:
        old_weight = read_weight(narrow.whole, master and master.whole, scratch.like(narrow.whole, "old", dtype))
        if old_weight is narrow.whole:
            old_weight = copy_of(old_weight)
        measured = partial(measure.add, g=raw.whole, old=old_weight)
    join_weight(narrow.whole, master and master.whole, p.whole)
    g = _widened(raw, "wide", dtype, factor)
    # States in that dtype are updated where they are.
    kept = {k: Joined.of(column, f"state {k}") for k, column in enumerate(states) if column[0].dtype != dtype}
    wide = {k: _widened(state, f"wide state {k}", dtype) for k, state in kept.items()}
    moments = [wide[k].each if k in wide else column for k, column in enumerate(states)]
    stored = [(kept[k], row.whole, stochastic_states[k]) for k, row in wide.items()]

    def store() -> None:
        finite = None
        if master is not None and master.whole.dtype == torch.int16:
            # The check of `read_weight` comes after the update, where it is needed anyway: one pass less over a piece.
            finite = is_finite(p.whole)
            for new, old, remainder, *own in zip(p.each, params, completing, *moments) if not finite else ():
                new.copy_(torch.where(new.isnan(), once_more(read_weight(old, remainder), *own), new))
        _write(piece, storage, narrow, master, p.whole, stored, measured, finite)

    rest[:] = [store]
    update(p.each, g.each, *moments)


def _stored_pieces(columns: Columns, storage: Storage, size: int, *, in_order: bool) -> Iterator[Piece]:
    """Pieces of parameters, gradients, what completes the parameters, if anything does, and states that are used."""
    params, grads, *states = columns
    for which in alike(columns):
        masters: Any = storage.masters if storage.masters[which[0]] is not None else []
        yield from pieces([params, grads, masters, *filter(None, states)], which, size, in_order=in_order)


def _read(narrow: Joined, master: Joined | None) -> Tensor:
    p = narrow.whole
    on_cpu = p.device.type == "cpu" and p.is_contiguous() and p.dtype.itemsize == 2
    return read_weight(p, master and master.whole, scratch.like(p, "weight", torch.float32) if on_cpu else None)


def _room(narrow: Joined, use: str, dtype: torch.dtype, *, other: bool = False) -> Row:
    """Memory for tensors in this dtype, laid out like them: their own, if they have it, unless it is to be another."""
    if narrow.whole.dtype == dtype and not other:
        return Row(narrow.whole, narrow.each)
    if narrow.whole.is_contiguous():
        return scratch.row(narrow.tensors, use, dtype)
    wide = torch.empty_like(narrow.whole, dtype=dtype)
    return Row(wide, [wide])


def _widened(narrow: Joined, use: str, dtype: torch.dtype, factor: float = 1.0) -> Row:
    """Tensors in this dtype, times a factor: themselves, if they are that."""
    row = _room(narrow, use, dtype, other=factor != 1.0)
    if row.whole is not narrow.whole:
        row.whole.copy_(narrow.whole)
        if factor != 1.0:
            row.whole.mul_(factor)
    return row


def _write(
    piece: Piece,
    storage: Storage,
    narrow: Joined,
    master: Joined | None,
    p: Tensor,
    states: Sequence[tuple[Joined, Tensor, bool]],
    measured: Callable[..., None] | None,
    finite: bool | None = None,
) -> None:
    """Rounds new parameters and states, of which some may be rounded stochastically; then writes them back."""
    words = None
    kept = [narrow, *(state for state, *_ in states)]
    if storage.keys is not None and any(t.whole.dtype.itemsize == 2 for t in kept):
        words = storage.words(piece.which, piece.sizes, piece.start, p.device)
    bits = weight_bits(words) if words is not None and storage.stochastic else None
    if measured is not None:
        target = narrow.whole.dtype if narrow.whole.dtype.itemsize == 2 and master is None else None
        kept_weight = None if target is None else rounded(p, target, _like(bits, p)).to(target).to(p.dtype)
        measured(piece.which, piece.sizes, new=p, kept=kept_weight)
    new_states = []
    for state, values, stochastic in states:
        dtype = state.whole.dtype
        own_bits = moment_bits(words, dtype) if words is not None and stochastic else None
        new_states.append((state, rounded(values, dtype, _like(own_bits, values))))
    write = weight_writer(narrow.whole, master and master.whole, p, _like(bits, p), finite)

    # From here on nothing takes memory.
    write()
    narrow.write(narrow.whole)
    if master is not None:
        master.write(master.whole)
    for state, values in new_states:
        state.write(values)


def _like(bits: Tensor | None, t: Tensor) -> Tensor | None:
    return None if bits is None else bits.view(t.shape)


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN for NaN, of which torch makes 0: hence a 0 is added that is NaN there."""
    return torch.sign(x).add_(x.clamp(-1.0, 1.0), alpha=0.0)
