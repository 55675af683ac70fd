"""Adafactor on the eager backend: large parameters of a CPU in tiles, everything else by the rules, stacked."""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt.backends.eager.adafactor_apply import applied
from fusedopt.backends.eager.adafactor_shards import shard_update, update_together
from fusedopt.backends.eager.adafactor_tiles import TILE, tiled_update
from fusedopt.backends.eager.norms import norm
from fusedopt.backends.eager.step_counts import advance
from fusedopt.batch import AdafactorHyper, Batch, Control
from fusedopt_kernels import rules

SMALL = 1 << 15
"""Elements up to which a parameter is updated in a list with others: one call for many then saves more than the
temporaries cost."""


class _Work(NamedTuple):
    """One parameter to update."""

    p: Tensor
    g: Tensor
    state: dict[str, Tensor]


class EagerAdafactor:
    """The stepper of Adafactor for one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        active = [[i for i, g in enumerate(batch.grads) if g is not None] for batch in batches]
        if not any(active) or control.skips():
            return
        scale = control.factor()
        steps = iter(advance([batch.states[i]["step"] for batch, which in zip(batches, active) for i in which]))
        shards = []
        for batch, which in zip(batches, active):
            alike: dict[tuple[float, torch.Size, torch.dtype], list[_Work]] = {}
            splits = batch.splits or [None] * len(batch.params)
            hyper: AdafactorHyper = batch.hyper
            if isinstance(hyper.lr, Tensor):  # a number whatever its dtype, as on the other backend
                hyper = hyper._replace(lr=float(hyper.lr))
            for i, step in zip(which, steps):
                p, g, state = batch.params[i], batch.grads[i], batch.states[i]
                split = splits[i]
                if g is None or (p.numel() == 0 and split is None):
                    continue
                if split is not None:
                    shards.append(shard_update(hyper, step, scale, p, g, state, split))
                elif self._on_cpu and p.numel() > SMALL and _tiles_serve(p, g, state):
                    tiled_update(hyper, step, scale, p, g, state)
                else:
                    alike.setdefault((step, p.shape, p.dtype), []).append(_Work(p, g, state))
            for (step, _, _), works in alike.items():
                for together in _together(works):
                    _update_by_rules(hyper, step, scale, together)
        update_together(shards)


def _tiles_serve(p: Tensor, g: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether matrices follow each other in memory, and numpy knows the dtypes of all averages."""
    if p.dim() > 2 and not all(t.is_contiguous() for t in (p, g, state.get("exp_avg", p))):
        return False
    return all(t.dtype.itemsize > 2 for t in state.values())


def _together(works: Iterable[_Work]) -> Iterator[list[_Work]]:
    """Lists whose temporaries stay in the cache."""
    some: list[_Work] = []
    elements = 0
    for work in works:
        elements += work.p.numel()
        if some and elements > TILE:
            yield some
            some, elements = [], work.p.numel()
        some.append(work)
    yield some


def _update_by_rules(hyper: AdafactorHyper, step: float, scale: float, works: list[_Work]) -> None:
    """Parameters of one shape and dtype, stacked, whatever their layout; in at least float32, rounded once."""
    params, grads, states = zip(*works)
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    p, g = torch.stack(params).to(dtype), torch.stack(grads).to(dtype)
    if scale != 1.0:
        g = g * scale
    update = _unclipped(hyper, step, g, states)
    rms: Any = 0.0
    if hyper.scale_parameter:
        rms = _root_mean_square(p)
        _unstack(states, "RMS", rms.flatten())
    average = None if hyper.beta1 is None else _stack(states, "exp_avg")
    new, update = applied(hyper, step, p, update, _root_mean_square(update), rms, average)
    if average is not None:
        _unstack(states, "exp_avg", update)
    torch._foreach_copy_(params, new.unbind())


def _unclipped(hyper: AdafactorHyper, step: float, g: Tensor, states: Sequence[dict[str, Tensor]]) -> Tensor:
    weight = rules.square_weight(step, hyper.decay_rate, math.exp, math.log)

    def average(name: str, new: Tensor) -> Tensor:
        updated: Tensor = rules.running_average(_stack(states, name), new, weight)
        _unstack(states, name, updated)
        return updated

    square = g * g + hyper.square_floor
    if "exp_avg_sq" in states[0]:
        return rules.unfactored_update(g, average("exp_avg_sq", square), torch.sqrt, operator.truediv)
    row, column = average("exp_avg_sq_row", square.mean(-1)), average("exp_avg_sq_col", square.mean(-2))
    of_row = rules.row_factor(row, row.mean(-1, keepdim=True), torch.sqrt, operator.truediv)
    of_column = rules.column_factor(column, torch.sqrt, operator.truediv)
    return rules.factored_update(g, of_row.unsqueeze(-1), of_column.unsqueeze(-2))


def _stack(states: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([s[name] for s in states])


def _unstack(states: Sequence[dict[str, Tensor]], name: str, values: Tensor) -> None:
    torch._foreach_copy_([s[name] for s in states], values.unbind())


def _root_mean_square(stacked: Tensor) -> Tensor:
    """Of each tensor of a stack, in a shape that broadcasts with it."""
    flat = stacked.flatten(1) if stacked.dim() > 1 else stacked.unsqueeze(1)
    large = flat.shape[1] > SMALL
    norms = torch.stack([norm(t) for t in stacked]) if large else torch.linalg.vector_norm(flat, dim=1)
    return (norms / math.sqrt(flat.shape[1])).view(-1, *[1] * (stacked.dim() - 1))
