"""What one choice costs one process of a run: asked of the optimizer, on parameters without data."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import backends, sharding
from fusedopt.interface import Reads, ReduceDims, ShardInfo
from fusedopt.optimizer.base import FusedOptimizer
from fusedopt.optimizer.engine import Engine
from fusedopt.optimizer.state import make_states
from fusedopt.plan.choices import Choice
from fusedopt.plan.families import Weight
from fusedopt.plan.mesh import Shard
from fusedopt.precision import WEIGHT_STATES
from fusedopt_kernels.measures import PLACES

_META = torch.device("meta")


class Cost(NamedTuple):
    """What a process holds and does at each step, in bytes unless it says otherwise.

    Attributes:
        optimizer: name of the class.
        dtype: of weights and gradients.
        options: of the constructor.
        moments: dtypes of the averages that are as large as a weight.
        weights: trained or not.
        gradients: of trained weights, in their dtype.
        states: the optimizer's, after its first step.
        workspace: what its kernels keep besides, `optimizer.workspace_bytes()`; None without triton.
        reads: how often its kernels read gradients and weights in a step.
        moved: read and written by its kernels in a step, of weights, gradients and states, as if no cache kept one of
            them from one phase to the next.
        all_reduces: how many a step of the optimizer does; None without triton.
        all_reduced: in the buffers of all of them together.
    """

    optimizer: str
    dtype: str
    options: dict[str, Any]
    moments: list[str]
    weights: int
    gradients: int
    states: int
    workspace: int | None
    reads: Reads
    moved: int
    all_reduces: int | None
    all_reduced: int | None

    @property
    def total(self) -> int:
        """Bytes of everything above that stays in memory."""
        return self.weights + self.gradients + self.states + (self.workspace or 0)


def cost(choice: Choice, shards: Sequence[Shard], frozen: Sequence[tuple[Weight, Shard]]) -> Cost:
    """Returns what a choice costs the process that has these shards.

    Args:
        choice: the optimizer.
        shards: of the weights that are trained.
        frozen: the others, and the shards of them.
    """
    params = [torch.empty(s.shape, dtype=choice.dtype, device=_META).requires_grad_() for s in shards]
    optimizer = choice.optimizer(params, **choice.options)
    reads = optimizer.reads(optimizer.param_groups[0])
    reads = reads._replace(gradient=reads.gradient + bool(optimizer.guard))
    samples = _make_states(optimizer)
    weights = sum(p.nbytes for p in params)
    others = sum(prod(shard.shape) * (weight.dtype or choice.dtype).itemsize for weight, shard in frozen)
    workspace, sums = _reserved(optimizer, [shard.info for shard in shards])
    return Cost(
        choice.optimizer.__name__,
        _name(choice.dtype),
        choice.options,
        _moments(optimizer),
        weights + others,
        weights,
        sum(number * sum(t.nbytes for t in optimizer.state[p].values()) for p, number in samples),
        workspace,
        reads,
        sum(number * _moved(optimizer, p, reads) for p, number in samples),
        None if sums is None else sum(len(over) for _, over in sums),
        None if sums is None else sum(t.nbytes * len(over) for t, over in sums),
    )


def _make_states(optimizer: FusedOptimizer) -> list[tuple[Tensor, int]]:
    """Makes the states of one parameter of each shape, for all of that shape.

    Returns that parameter, and how many there are: a model has hundreds of parameters, and ten shapes.
    """
    alike: dict[torch.Size, list[Tensor]] = {}
    (group,) = optimizer.param_groups
    for p in group["params"]:
        alike.setdefault(p.shape, []).append(p)
    firsts = {id(params[0]) for params in alike.values()}
    make_states(optimizer, [group], [[p if id(p) in firsts else None for p in group["params"]]])
    for first, *others in alike.values():
        for p in others:
            optimizer.state[p] = optimizer.state[first]
    return [(params[0], len(params)) for params in alike.values()]


def _reserved(
    optimizer: FusedOptimizer, infos: list[ShardInfo | None]
) -> tuple[int, list[tuple[Tensor, ReduceDims]]] | tuple[None, None]:
    """Returns the workspace of the kernels, and what a step adds up over which processes; without triton, nothing."""
    if not backends.has_triton():
        return None, None
    from fusedopt.backends.triton import STEPPERS

    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    info_of = dict(zip(params, infos))
    param_sets = Engine().param_sets(optimizer, groups, [[None] * len(group["params"]) for group in groups])
    workspace, sums = 0, []
    for rule in dict.fromkeys(param_set.rule for param_set in param_sets):
        own = [s._replace(shard_infos=[info_of[p] for p in s.params]) for s in param_sets if s.rule == rule]
        reserved = STEPPERS[rule](_META).reserve(own, measured=bool(optimizer.tracker))
        workspace += reserved.workspace
        sums += reserved.sums
    spread: dict[ReduceDims, list[Tensor]] = {}
    for p, info in zip(params, infos):
        spread.setdefault(() if info is None else info.all_dims, []).append(p)
    if optimizer.tracker:
        workspace += _numbers(len(params), len(PLACES)).nbytes
        for over, those in spread.items():  # the sums of these parameters, and the largest of their updates
            sums += [(_numbers(len(those), len(PLACES)), over), (_numbers(len(those)), over)]
    if optimizer.guard:
        # One sum of squares for all gradients that are spread over the same processes.
        workspace += sum(STEPPERS["squares"](_META).reserve(grads) for grads in spread.values())
        sums += [(_numbers(), over) for over in spread]
    return workspace, [(t, sharding.collectives(t, over)) for t, over in sums]


def _numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=_META)


def _moved(optimizer: FusedOptimizer, p: Tensor, reads: Reads) -> int:
    """Returns the bytes that a step reads and writes for one parameter."""
    specs = optimizer.state_specs(p, optimizer.param_groups[0]).items()
    sizes = {name: optimizer.state[p][name].nbytes for name, spec in specs if spec.without != "all"}
    moments = sum(size for name, size in sizes.items() if name not in WEIGHT_STATES)
    weight = p.nbytes + sum(sizes.values()) - moments
    moved: int = p.nbytes * reads.gradient + weight * (reads.weight + 1) + 2 * moments
    return moved


def _moments(optimizer: FusedOptimizer) -> list[str]:
    """Returns the dtypes of what a matrix has of its own size beside the weight; in the order of their names."""
    group = optimizer.param_groups[0]
    matrix = torch.empty((2, 2), dtype=group["params"][0].dtype, device=_META)
    specs = optimizer.state_specs(matrix, group).items()
    return [_name(spec.dtype) for name, spec in specs if spec.without is None and name not in WEIGHT_STATES]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
