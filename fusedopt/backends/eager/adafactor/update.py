"""One update of Adafactor by the rules on torch tensors: of whole parameters, or of a shard of one.

An update is a generator: it yields its local sums, and gets those of the whole tensors; a tensor that is whole has them
already. The updates of all shards go together, so that each of their three rounds of sums is one collective operation,
however many parameters there are.
"""

import math
import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fusedopt.backends.eager.measures import at
from fusedopt.backends.eager.norms import norm
from fusedopt.backends.eager.rounding import rounded
from fusedopt.backends.eager.stepper import Bucket
from fusedopt.backends.eager.storage import Storage, read_weight, weight_bits, weight_writer
from fusedopt.interface import AdafactorHyper, ReduceDims, ShardInfo, fmax
from fusedopt.sharding import all_reduce_sums
from fusedopt_kernels import rules

SMALL = 1 << 15
"""Elements up to which a parameter is updated in a list with others: one call for many then saves more than the
temporaries cost."""

Sums = list[tuple[Tensor, ReduceDims]]
Update = Generator[Sums, list[Tensor], None]


class Stack:
    """Some parameters of a bucket, of one shape and dtype, stacked; read in at least float32, rounded once.

    Of whole ones, whatever is made is kept until they are updated. Of a shard nothing of its size is kept while its
    update waits for others: gradient and update are made anew.
    """

    def __init__(self, bucket: Bucket, which: list[int], shard_info: ShardInfo | None = None) -> None:
        self.params = [bucket.params[i] for i in which]
        self.grads = [bucket.grads[i] for i in which]
        self.states = [bucket.states[i] for i in which]
        self.dtype = torch.promote_types(self.params[0].dtype, torch.float32)
        self.is_whole = shard_info is None
        self.shard_info = shard_info or ShardInfo(self.params[0].shape, (), (), ())
        self._storage = Storage.of(bucket, which)
        self._measure = at(bucket.measure, which)
        self._writing: list[Callable[[], object]] = []
        self.written = False

    def join(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors) if self.is_whole else tensors[0].unsqueeze(0)

    def lasting(self, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return cache(make) if self.is_whole else make

    def gradient(self, factor: float) -> Callable[[], Tensor]:
        def make() -> Tensor:
            g = self.join(self.grads).to(self.dtype)
            return g if factor == 1.0 else g * factor

        return self.lasting(make)

    def weight(self) -> Tensor:
        masters = [m for m in self._storage.masters if m is not None]
        return read_weight(self.join(self.params), self.join(masters) if masters else None)

    def store_weight(self, old: Callable[[], Tensor], new: Tensor) -> None:
        """Measures the new weights beside the old ones, and has them written by `write`."""
        bits = self._bits(new)
        if self._measure is not None:
            sizes = [p.numel() for p in self.params]
            kept = None
            if self.params[0].dtype.itemsize == 2 and self._storage.masters[0] is None:
                dtype = self.params[0].dtype
                kept = self.join([rounded(v, dtype, b).to(dtype).to(self.dtype) for v, b in zip(new.unbind(), bits)])
            self._measure.add(range(len(sizes)), sizes, self.join(self.grads), old(), new, kept)
        if not self._storage.stochastic and self._storage.masters[0] is None:
            self._writing.append(partial(torch._foreach_copy_, self.params, list(new.unbind())))
            return
        for p, master, value, own in zip(self.params, self._storage.masters, new.unbind(), bits):
            self._writing.append(weight_writer(p, master, value, own))

    def _bits(self, new: Tensor) -> Sequence[Tensor | None]:
        bits: Sequence[Tensor | None] = [None] * len(new)
        if self._storage.stochastic and self._storage.keys is not None and new.numel():
            words = self._storage.words(range(len(new)), [new[0].numel()] * len(new), 0, new.device)
            bits = weight_bits(words).view(new.shape).unbind()
        return bits

    def state(self, name: str) -> Tensor:
        return self.join([s[name] for s in self.states]).to(self.dtype)

    def store(self, name: str, values: Tensor) -> None:
        """Has a state written by `write`."""
        targets, each = [s[name] for s in self.states], list(values.unbind())
        if self.dtype == torch.float64 and any(t.dtype.itemsize == 2 for t in targets):
            each = [rounded(value, target.dtype) for target, value in zip(targets, each)]
        # One rounding, in one call for thousands.
        self._writing.append(partial(torch._foreach_copy_, targets, each))

    def write(self) -> None:
        """Writes all that is new, which takes no more memory."""
        self.written = True
        for write in self._writing:
            write()

    def average(self, name: str, new: Tensor, weight: float) -> Tensor:
        """A running average with what is new; has it stored, and returns it before it is rounded."""
        average: Tensor = rules.running_average(self.state(name), new, weight)
        self.store(name, average)
        return average

    def root_mean_squares(self, *makes: Callable[[], Tensor]) -> Generator[Sums, list[Tensor], list[Tensor]]:
        """Those of each whole tensor of what is made, in a shape that broadcasts with it."""
        norms = [self._norms(make()) for make in makes]
        if self.shard_info.all_dims:
            squares = yield [(own.square(), self.shard_info.all_dims) for own in norms]
            norms = list(map(torch.sqrt, squares))
        root = math.sqrt(self.shard_info.shape.numel())
        return [(own / root).view(-1, *[1] * len(self.shard_info.shape)) for own in norms]

    def _norms(self, stacked: Tensor) -> Tensor:
        if self.is_whole and stacked[0].numel() <= SMALL:
            norms: Tensor = torch.linalg.vector_norm(stacked.reshape(len(stacked), -1), dim=1)
            return norms
        return torch.stack([norm(t) for t in stacked])


def run_together(updates: Iterable[Update]) -> None:
    """Runs updates side by side, from one round of sums to the next."""
    going: list[tuple[Update, Any]] = [(update, None) for update in updates]
    while going:
        waiting = []
        for update, answer in going:
            with suppress(StopIteration):
                waiting.append((update, update.send(answer)))
        totals = iter(all_reduce_sums([part for _, sums in waiting for part in sums]))
        going = [(update, [next(totals) for _ in sums]) for update, sums in waiting]


def update(bucket: Bucket, stack: Stack) -> Update:
    """One update of the parameters of a stack, whatever their layout; a shard may be empty."""
    hyper: AdafactorHyper = bucket.hyper
    weight = rules.square_weight(bucket.step, hyper.decay_rate, math.exp, math.log)
    average = _factored if "exp_avg_sq_row" in stack.states[0] else _unfactored
    unclipped = stack.lasting((yield from average(stack, bucket.factor, weight, hyper.square_eps)))
    p = stack.lasting(stack.weight)

    rms, *rms_of_p = yield from stack.root_mean_squares(unclipped, *[p] * hyper.scale_parameter)
    if rms_of_p:
        stack.store("RMS", rms_of_p[0].flatten())
    rate: Any = hyper.rate(bucket.step, rms_of_p[0] if rms_of_p else 0.0, fmax=fmax)
    divisor = rules.clip_divisor(rms, hyper.clip_threshold, torch.clamp)
    change = unclipped() * ((-rate if hyper.maximize else rate) / divisor)
    if hyper.beta1 is not None:
        change = stack.average("exp_avg", change, 1.0 - hyper.beta1)
    new = rules.adafactor_apply(p(), change, rate * hyper.weight_decay)
    stack.store_weight(p, new)
    stack.write()


Unclipped = Callable[[], Tensor]
"""Makes an update before clipping."""


def _factored(stack: Stack, factor: float, weight: float, floor: float) -> Generator[Sums, list[Tensor], Unclipped]:
    gradient, shard_info = stack.gradient(factor), stack.shard_info
    height, width = shard_info.shape[-2:]
    local_rows, local_columns = _sums(gradient(), floor)
    row_sums, column_sums = yield [(local_rows, shard_info.column_dims), (local_columns, shard_info.row_dims)]
    row = stack.average("exp_avg_sq_row", row_sums / width, weight)
    column = stack.average("exp_avg_sq_col", column_sums / height, weight)
    (average_sums,) = yield [(row.sum(-1, keepdim=True), shard_info.row_dims)]
    row_factor = rules.row_factor(row, average_sums / height, torch.sqrt, operator.truediv).unsqueeze(-1)
    column_factor = rules.column_factor(column, torch.sqrt, operator.truediv).unsqueeze(-2)
    return lambda: rules.factored_update(gradient(), row_factor, column_factor)


def _unfactored(stack: Stack, factor: float, weight: float, floor: float) -> Generator[Sums, list[Tensor], Unclipped]:
    gradient = stack.gradient(factor)
    v = stack.average("exp_avg_sq", gradient().square() + floor, weight)
    for _ in range(2):  # the rounds of the others
        yield []
    return lambda: rules.unfactored_update(gradient(), v, torch.sqrt, operator.truediv)


def _sums(g: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Sums of squares along rows and along columns. A function, so that the squares are freed when it returns."""
    square = g * g + floor
    return square.sum(-1), square.sum(-2)
