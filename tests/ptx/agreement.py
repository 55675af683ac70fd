"""Whether a launch left the numbers behind that it should have."""

from typing import Any, NamedTuple

import numpy as np

from ptx.arithmetic import Array, from_bf16
from ptx.memory import BASE, CELLS, HALVES, Journal, Registry, Span, Written

SCALARS = {"adamw.prologue": 2.0**12, "step.prologue": 2.0**12}
"""By kernel, how many units in the last place its numbers may be off: of exp and log, enlarged by 1 - beta^t."""


class _Allowed(NamedTuple):
    """How many units in the last place numbers may be off, all but strays of them by the usual number at most."""

    usual: float
    most: float


UNITS = 4.0
"""How many units in the last place sums may be off that are added up in another order."""

ADDS_UP = {
    *("step.sums", "step.squares", "step.finish", "averages.averages", "averages.shard_totals"),
    *("averages.shard_averages", "shards.row_means", "shards.square_totals", "norm.sum_of_squares"),
    "statistics.finish",
}
"""Kernels whose numbers may be that far off: sums of squares, in which nothing cancels, and what is made of them."""

MEASURES = {"adamw.update", "lion.update"}
"""Kernels that add up statistics beside an update, in float64: only these sums may be that far off."""

APPLY = "step.apply"
"""The kernel that takes updates off the weights, which depend on a sum: units are those of the largest weight."""

SIXTEEN_BITS = {"bfloat16": _Allowed(0.0, 1.0), "float16": _Allowed(0.0, 1.0), "int16": _Allowed(UNITS, 2.0**15)}
"""What it may do to numbers of 16 bits. Few of them fall to the other side of a tie; of lower halves of weights, few
belong to weights that an update brings close to 0."""

STRAYS = 0.01
"""The share of those few."""


class Launch(NamedTuple):
    """What is known of a launch.

    Attributes:
        kernel: its name, and that of its module.
        compute: the dtype of its arithmetic, by Triton's name; "" if it has one only.
        expected: memory as it should leave it.
        registry: of what it may touch.
    """

    kernel: str
    compute: str
    expected: Written
    registry: Registry


def disagreement(launch: Launch, journal: Journal) -> str | None:
    """How memory, after a launch that kept this journal, differs from what is expected; None if it does not."""
    actual, expected = journal.written(), launch.expected
    places = np.union1d(actual.places, expected.places)
    now = Written(places, HALVES[places])
    journal.undo()
    wanted = Written(places, HALVES[places])
    wanted.values[np.searchsorted(places, expected.places)] = expected.values
    now.put_back()
    wrong = places[now.values != wanted.values]
    for address, dtype, where in _elements(wrong, launch.registry):
        size = np.dtype(SHAPES[dtype]).itemsize
        cells = ((address - BASE) // size).astype(np.int64)
        found = CELLS[size][cells]
        wanted.put_back()
        right = CELLS[size][cells]
        now.put_back()
        span = launch.registry.span(int(address[0]))
        apart = _units_apart(found, right, dtype, _largest(span) if launch.kernel == APPLY else 0.0)
        allowed = _allowed(launch, dtype)
        if (apart > allowed.most).any() or (apart > allowed.usual).sum() > 1 + STRAYS * span.memory().size / size:
            at = int(np.argmax(apart))
            x, y = (numbers(bits[at : at + 1], dtype)[0] for bits in (found, right))
            return f"{where(at)} is {x!r}, expected {y!r}: {apart[at]:.3g} units apart, {len(apart)} elements differ"
    return None


def _allowed(launch: Launch, dtype: str) -> _Allowed:
    """What is allowed of numbers of this dtype."""
    if launch.kernel == APPLY and dtype in SIXTEEN_BITS:
        return SIXTEEN_BITS[dtype]
    units = SCALARS.get(launch.kernel, 0.0) if dtype == "float64" else 0.0
    if launch.kernel in {*ADDS_UP, APPLY} or (launch.kernel in MEASURES and dtype == "float64"):
        in_float32 = dtype == "float64" and launch.compute == "fp32" and launch.kernel not in MEASURES
        units = UNITS * (2.0**29 if in_float32 else 1.0)
    return _Allowed(units, units)


def _elements(halves: Array, registry: Registry) -> Any:
    """Elements that these cells are part of, by span: addresses, dtype, and a function that says where one is."""
    addresses = halves * 2 + BASE
    while len(addresses):
        span = registry.span(int(addresses[0]))
        inside = addresses < span.end
        size = np.dtype(SHAPES[span.dtype]).itemsize
        own = np.unique((addresses[inside] - span.start) // size)
        yield own * size + span.start, span.dtype, lambda at, own=own, span=span: f"element {own[at]} of {span.name}"
        addresses = addresses[~inside]


SHAPES = {
    **{"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16},
    **{"int64": np.int64, "int32": np.int32, "int16": np.int16},
}


BITS = {dtype: f"u{np.dtype(shape).itemsize}" for dtype, shape in SHAPES.items()}


def numbers(bits: Array, dtype: str) -> Array:
    """What bits stand for."""
    return from_bf16(bits) if dtype == "bfloat16" else bits.view(SHAPES[dtype])


def _largest(span: Span) -> float:
    """The largest magnitude in a span."""
    size = np.abs(numbers(span.memory().view(BITS[span.dtype]), span.dtype).astype(np.float64))
    return float(size[np.isfinite(size)].max(initial=0.0))


def _units_apart(found: Array, right: Array, dtype: str, least: float) -> Array:
    """The distance in units in the last place, of `least` for what is smaller; infinite to NaN, between integers too.

    The integers of `int16` are lower halves of weights, which go round.
    """
    x, y = (numbers(bits, dtype) for bits in (found, right))
    if dtype == "int16":
        return np.abs((x - y).astype(np.float64))
    if x.dtype.kind == "i":
        return np.where(x == y, 0.0, np.inf)
    with np.errstate(all="ignore"):
        unit = np.spacing(np.maximum(np.abs(y), y.dtype.type(least))).astype(np.float64)
        apart = np.abs(x.astype(np.float64) - y.astype(np.float64)) / (unit * 65536 if dtype == "bfloat16" else unit)
    same = (found == right) | (np.isnan(x) & np.isnan(y))
    return np.where(same, 0.0, np.where(np.isnan(apart) | (apart == 0.0), np.inf, apart))
