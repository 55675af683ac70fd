"""AdamW on the eager backend: torch's own fused CPU kernel wherever it can serve, the rules on tensors elsewhere."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt.backends.eager.elementwise import apply, apply_in_place
from fusedopt.backends.eager.measures import Measure, at, copy_of
from fusedopt.backends.eager.pieces import Joined, alike, joined, pieces
from fusedopt.backends.eager.stepper import Bucket, EagerStepper
from fusedopt.backends.eager.storage import Storage
from fusedopt.backends.scratch import scratch
from fusedopt.backends.work import Part
from fusedopt.interface import AdamWHyper
from fusedopt_kernels import rules
from fusedopt_kernels.layout import is_dense, same_layout

_SCALED_PIECE = 1 << 20
"""Elements whose scaled gradients are copied at a time: 4 MiB of float32 stay in a cache. On 50M parameters, pieces of
2^18, 2^19, 2^20 and 2^21 made a clipped step 0.98, 1.02, 1.05 and 0.94 times as fast as clip_grad_norm_ with torch's
fused step. Four views of a tensor cost 40 us, what torch needs for a thousand elements, so small ones are copied
together; from half a piece on, a copy in memory that was used before is worth it: 1.06 instead of 1.00 times the
rival's speed on 24 matrices of 2^20 elements and a few larger ones."""

_MEASURED_PIECE = 1 << 19
"""The same for a step that is measured. On 50M parameters and two threads, pieces of 2^15 to 2^20 took 610, 359, 242,
154, 123 and 159 ms, on 24 matrices and some larger ones 636, 427, 252, 183, 160 and 231: threads wait for each other
after each of nine operations."""

_WIDE = {torch.float32, torch.float64}


class _Columns(NamedTuple):
    """The tensors of some parameters, a list each: thousands of parameters are common, so no object per parameter."""

    p: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    h: list[Tensor]  # the largest v so far; empty without amsgrad

    def only(self, which: Sequence[int]) -> "_Columns":
        if len(which) == len(self.p):
            return self
        return _Columns(*([column[i] for i in which] if column else [] for column in self))


class EagerAdamW(EagerStepper):
    """The stepper of AdamW for one device."""

    def parts(self, bucket: Bucket) -> Iterable[Part]:
        hyper: AdamWHyper = bucket.hyper
        columns = _Columns(
            bucket.params,
            bucket.grads,
            [s["exp_avg"] for s in bucket.states],
            [s["exp_avg_sq"] for s in bucket.states],
            [s["max_exp_avg_sq"] for s in bucket.states] if hyper.amsgrad else [],
        )
        scalars = _scalars(hyper, bucket.step)
        # torch's kernel gets an lr to divide by.
        may_fuse = self._on_cpu and scalars[1] > 0.0
        parts: list[Iterable[Part]] = []
        stored = [] if bucket.precision.is_plain else _short(columns)
        if stored:
            fused_as_float32 = _of_one_layout(columns) if may_fuse and bucket.precision.master_weights else ()
            for step in (bucket.step, None):
                which = [i for i in stored if (i in fused_as_float32) == (step is not None)]
                if which:
                    storage, measure = Storage.of(bucket, which), at(bucket.measure, which)
                    some = columns.only(which)
                    parts.append(_stored_update(hyper, some, bucket.factor, storage, measure, step, *scalars))
        others = sorted(set(range(len(columns.p))).difference(stored))
        columns, measure = columns.only(others), at(bucket.measure, others)
        # Our factor comes through a copy, which would round 16 bits once more.
        served = _fused_serves(columns, bucket.factor) if may_fuse else ()
        if served:
            fused = columns.only(served)
            update = _fused(hyper, bucket.step, *scalars)
            if measure is not None:
                parts.append(_measured_update(update, fused, bucket.factor, measure.at(served)))
            elif bucket.factor == 1.0:
                parts.append([partial(update, *fused)])
            else:
                parts.append(_scaled_pieces(update, fused, bucket.factor))
        if len(served) < len(columns.p):
            rest = sorted(set(range(len(columns.p))).difference(served))
            plain = Storage([None] * len(rest), False, None, None)
            some, measure = columns.only(rest), at(measure, rest)
            parts.append(_stored_update(hyper, some, bucket.factor, plain, measure, None, *scalars))
        return chain.from_iterable(parts)


def _short(columns: _Columns) -> list[int]:
    """Those with a parameter or moments of 16 bits."""
    dtypes = enumerate(zip(map(attrgetter("dtype"), columns.p), map(attrgetter("dtype"), columns.m)))
    return [i for i, (p, m) in dtypes if p.itemsize == 2 or m.itemsize == 2]


def _scalars(hyper: AdamWHyper, step: float) -> tuple[float, float, float]:
    beta1, beta2 = (hyper.beta1, hyper.beta2) if hyper.correct_bias else (0.0, 0.0)
    scalars: tuple[float, float, float] = rules.adamw_scalars(
        step,
        hyper.lr,
        hyper.weight_decay,
        hyper.eps,
        rules.log_beta(beta1),
        rules.log_beta(beta2),
        hyper.convention.decays_update,
        hyper.convention.corrects_eps,
        exp=math.exp,
        sqrt=math.sqrt,
    )
    return scalars


def _fused_serves(columns: _Columns, factor: float) -> Sequence[int]:
    """Returns the places that torch's fused CPU kernel updates rightly: it ignores strides and mixed dtypes."""
    tensors = [t for column in columns for t in column]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1 and all(map(Tensor.is_contiguous, tensors)):
        return range(len(columns.p)) if factor == 1.0 or dtypes <= _WIDE else ()
    rows = zip(*(column for column in columns if column))
    return [
        i
        for i, (p, *others) in enumerate(rows)
        if (factor == 1.0 or p.dtype in _WIDE) and is_dense(p) and all(_is_like(t, p) for t in others)
    ]


def _of_one_layout(columns: _Columns) -> Collection[int]:
    """Those that torch's kernel would serve in float32."""
    tensors = [t for column in columns for t in column]
    if all(map(Tensor.is_contiguous, tensors)) and torch.float64 not in map(attrgetter("dtype"), columns.g):
        return range(len(columns.p))
    rows = enumerate(zip(*(column for column in columns if column)))
    return {
        i
        for i, (p, g, *states) in rows
        if is_dense(p) and g.dtype != torch.float64 and all(same_layout(t, p) for t in (g, *states))
    }


def _scaled_pieces(update: Callable[..., None], columns: _Columns, factor: float) -> Iterator[Part]:
    """The same update a cache-sized piece at a time, with copies of the gradients times `factor`."""
    for piece in pieces(columns, range(len(columns.p)), _SCALED_PIECE):
        yield partial(_update_scaled, update, _Columns._make(piece.columns), factor)


def _update_scaled(update: Callable[..., None], columns: _Columns, factor: float) -> None:
    update(*columns._replace(g=_scaled(columns.g, factor)))


def _scaled(grads: list[Tensor], factor: float) -> list[Tensor]:
    if factor == 1.0:
        return grads
    if len(grads) == 1 and grads[0].is_contiguous():  # in memory that all take turns in, and that is contiguous
        (g,) = grads
        return [torch.mul(g, factor, out=scratch.like(g, "gradient", g.dtype))]
    return list(torch._foreach_mul(grads, factor))


def _measured_update(update: Callable[..., None], columns: _Columns, factor: float, measure: Measure) -> Iterator[Part]:
    """The same update, a cache-sized piece at a time, with what is measured before and after."""
    for which in alike(columns):
        for piece in pieces(columns, which, _MEASURED_PIECE):
            some = _Columns._make(piece.columns)
            add = partial(measure.add, piece.which, piece.sizes)
            rest: list[Callable[[], None]] = []
            yield partial(_update_measured, update, some, factor, add, rest)
            yield partial(_call, rest)


def _call(rest: list[Callable[[], None]]) -> None:
    rest[0]()


def _update_measured(
    update: Callable[..., None],
    some: _Columns,
    factor: float,
    add: Callable[..., None],
    rest: list[Callable[[], None]],
) -> None:
    """Updates some parameters, and leaves it to `rest` to add their measures."""
    raw = Joined.of(some.g, "measured gradient").whole
    if some.p[0].dtype in _WIDE:
        old = copy_of(some.p[0]) if len(some.p) == 1 else Joined.of(some.p, "old").whole
        rest[:] = [lambda: add(raw, old, Joined.of(some.p, "new").whole)]
        update(*some._replace(g=_scaled(some.g, factor)))
    else:  # torch's kernel keeps to itself what it rounds
        unrounded = _Columns._make([[t.to(torch.float32) for t in column] for column in some])
        old = joined(unrounded.p).clone()
        update(*unrounded)
        rest[:] = [lambda: add(raw, old, joined(unrounded.p), joined(some.p).to(torch.float32))]
        update(*some)


def _is_like(t: Tensor, p: Tensor) -> bool:
    return t.dtype == p.dtype and same_layout(t, p)


def _fused(hyper: AdamWHyper, step: float, decay_step: float, step_size: float, eps_hat: float) -> Callable[..., None]:
    """torch's kernel computes torch's convention, so it gets the lr, decay and eps that turn it into our scalars."""
    correction1 = 1.0 - hyper.beta1**step
    root2 = math.sqrt(1.0 - hyper.beta2**step)
    lr = step_size * correction1 / root2
    count = torch.tensor(step, dtype=torch.float32, device="cpu")

    def update(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], *h: list[Tensor]) -> None:
        torch._fused_adamw_(
            p,
            g,
            m,
            v,
            h[0] if h else [],
            [count] * len(p),
            lr=lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            weight_decay=decay_step / lr,
            eps=eps_hat / root2,
            amsgrad=hyper.amsgrad,
            maximize=hyper.maximize,
        )

    return update


def _stored_update(
    hyper: AdamWHyper,
    columns: _Columns,
    factor: float,
    storage: Storage,
    measure: Measure | None,
    fused_step: float | None,
    decay_step: float,
    step_size: float,
    eps_hat: float,
) -> Iterable[Part]:
    """The update of tensors of any layout and dtype, in at least float32.

    With a `fused_step`, by torch's kernel, which would serve for float32 tensors laid out like these: master weights
    are those of a float32 run.
    """
    signed = -factor if hyper.maximize else factor
    stochastic = (False, True, False)

    if fused_step is not None:
        fused = _fused(hyper._replace(maximize=False), fused_step, decay_step, step_size, eps_hat)

        def once_more(p: Tensor, m: Tensor, *v: Tensor) -> Tensor:
            return p * (1.0 - decay_step) - step_size * m / (v[-1].sqrt() + eps_hat)

        return apply_in_place(fused, once_more, columns, signed, storage, stochastic, measure)
    weight1, weight2 = 1.0 - hyper.beta1, 1.0 - hyper.beta2

    def rule(p: Tensor, g: Tensor, m: Tensor, v: Tensor, h: Tensor | None = None) -> list[Tensor]:
        m, v = rules.adam_moments(g, m, v, hyper.beta1, weight1, hyper.beta2, weight2)
        largest = v if h is None else torch.maximum(h, v)
        p = rules.adamw_update(p, m, largest, decay_step, step_size, eps_hat, sqrt=torch.sqrt, div=torch.div)
        return [p, m, v] if h is None else [p, m, v, largest]

    return apply(rule, columns, signed, storage, stochastic, measure)
