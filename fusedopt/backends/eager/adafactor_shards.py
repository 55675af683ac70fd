"""Adafactor of sharded parameters, by the rules on torch tensors: sums of local shards are added up over the mesh.

Each update is a generator: it yields its local sums, and gets those of the whole tensor. All updates of a step go
together, so that each of their three rounds of sums is one collective operation, however many parameters there are.
"""

import math
import operator
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from fusedopt.backends.eager.adafactor_apply import applied
from fusedopt.backends.eager.norms import norm
from fusedopt.batch import AdafactorHyper, Split, Spread
from fusedopt.sharding import add_up
from fusedopt_kernels import rules

Sums = list[tuple[Tensor, Spread]]
Update = Generator[Sums, list[Tensor], None]


def update_together(updates: Iterable[Update]) -> None:
    """Runs updates side by side, from one round of sums to the next."""
    waiting = [(update, next(update)) for update in updates]
    while waiting:
        wanted = [part for _, sums in waiting for part in sums]
        answers = iter(add_up(wanted))
        still = []
        for update, sums in waiting:
            with suppress(StopIteration):
                still.append((update, update.send([next(answers) for _ in sums])))
        waiting = still


def shard_update(
    hyper: AdafactorHyper, step: float, scale: float, p: Tensor, g: Tensor, state: dict[str, Tensor], split: Split
) -> Update:
    """One update of one shard, whatever its layout, in at least float32, rounded once; it may be empty."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    # Between two rounds nothing of the parameter's size is kept: gradients are widened and scaled anew.
    scaled = (lambda: g.to(dtype)) if scale == 1.0 else (lambda: g.to(dtype) * scale)
    weight = rules.square_weight(step, hyper.decay_rate, math.exp, math.log)
    make = _factored if "exp_avg_sq_row" in state else _unfactored
    unclipped = yield from make(scaled, state, split, weight, hyper.square_floor)

    sums = [(norm(unclipped()).square(), split.over_all)]
    if hyper.scale_parameter:
        sums.append((norm(p.to(dtype)).square(), split.over_all))
    squares = yield sums
    update_rms, *rms = (torch.sqrt(square / split.shape.numel()) for square in squares)
    if hyper.scale_parameter:
        state["RMS"].copy_(rms[0])
    average = None if hyper.beta1 is None else state["exp_avg"]
    new, update = applied(hyper, step, p.to(dtype), unclipped(), update_rms, rms[0] if rms else 0.0, average)
    if average is not None:
        average.copy_(update)
    p.copy_(new)


Unclipped = Callable[[], Tensor]
"""Makes the update of a shard before clipping."""


def _factored(
    scaled: Callable[[], Tensor], state: dict[str, Tensor], split: Split, weight: float, floor: float
) -> Generator[Sums, list[Tensor], Unclipped]:
    row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    height, width = split.shape[-2:]
    sums = _row_and_column_sums(scaled())
    of_rows, of_columns = yield [(sums[0], split.over_columns), (sums[1], split.over_rows)]
    row.copy_(rules.running_average(row, of_rows / width + floor, weight))
    column.copy_(rules.running_average(column, of_columns / height + floor, weight))
    (of_averages,) = yield [(row.sum(-1, keepdim=True), split.over_rows)]
    of_row = rules.row_factor(row, of_averages / height, torch.sqrt, operator.truediv).unsqueeze(-1)
    of_column = rules.column_factor(column, torch.sqrt, operator.truediv).unsqueeze(-2)
    return lambda: rules.factored_update(scaled(), of_row, of_column)


def _unfactored(
    scaled: Callable[[], Tensor], state: dict[str, Tensor], split: Split, weight: float, floor: float
) -> Generator[Sums, list[Tensor], Unclipped]:
    v = state["exp_avg_sq"]
    v.copy_(rules.running_average(v, scaled().square() + floor, weight))
    for _ in range(2):  # the rounds of the others
        yield []
    return lambda: rules.unfactored_update(scaled(), v, torch.sqrt, operator.truediv)


def _row_and_column_sums(g: Tensor) -> tuple[Tensor, Tensor]:
    square = g.square()
    return square.sum(-1), square.sum(-2)
