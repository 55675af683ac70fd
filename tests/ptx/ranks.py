"""Steps of shards on two ranks, in one process: threads that take turns, of which one runs at a time."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from helpers.comparing import Tolerance
from torch import Tensor

from fusedopt import backends
from fusedopt.interface import ParamSet, ReduceDims, ShardInfo, ShardPosition, StepArgs
from fusedopt.precision import Precision
from fusedopt_kernels.measures import PLACES
from ptx.outcomes import Outcome, states_of, with_float32_weights
from ptx.workloads import Case, Shape, normal, unscaled_step

RANKS = 2
OVER: ReduceDims = (("a mesh", 0),)
SHAPES: tuple[Shape, ...] = (
    *((5, 7), (9, 6), (3, 6, 5), (11,), (40, 3), (1, 6), (7, 1), (64, 144), (300, 33), (2, 3, 33, 40)),
    (4, 2049),
)
"""What two ranks share evenly and what they do not; of (1, 6) and (7, 1) one of them may have nothing."""


class Turns:
    """Runs a function once for each rank, and stands in for the sums over ranks that it asks for."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._now = 0
        self._given: list[Tensor] = []
        self._failed: list[BaseException] = []
        self._ranks: dict[int, int] = {}

    def all_reduce(self, t: Tensor, over: ReduceDims, op: Any = None) -> None:
        """`fusedopt.sharding.all_reduce_in_place`: waits until every rank has given its part."""
        if not over:
            return
        rank = self._ranks[threading.get_ident()]
        self._given.append(t)
        if rank == RANKS - 1:
            total = torch.stack([given.clone() for given in self._given]).sum(0)
            for given in self._given:
                given.copy_(total)
            self._given = []
        self._pass_on(rank)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Returns what `work(rank)` returns, for each rank."""
        results: dict[int, Any] = {}

        def of(rank: int) -> None:
            self._ranks[threading.get_ident()] = rank
            try:
                self._wait_for(rank)
                results[rank] = work(rank)
            except BaseException as error:
                self._failed.append(error)
            with self._turn:
                self._now = (rank + 1) % RANKS
                self._turn.notify_all()

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed:
            raise self._failed[0]
        return [results[rank] for rank in range(RANKS)]

    def _pass_on(self, rank: int) -> None:
        with self._turn:
            self._now = (rank + 1) % RANKS
            self._turn.notify_all()
        self._wait_for(rank)

    def _wait_for(self, rank: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._now == rank or self._failed)
        if self._failed:
            raise RuntimeError("another rank failed")


@dataclass(frozen=True)
class Shards:
    """Steps of parameters of which each rank has a half of the rows (`dim` -2) or of the columns (-1).

    Attributes:
        make, options, dtype, shapes, steps, parameters, watched: as in `Case`.
        dim: that is cut; that of a vector always is.
    """

    make: Any
    options: dict[str, Any]
    dtype: torch.dtype
    dim: int
    shapes: tuple[Shape, ...] = SHAPES
    steps: int = 2
    parameters: Tolerance | None = None
    watched: bool = True

    def run(self, backend: str) -> Outcome:
        """Returns what the steps leave of the whole parameters, by name."""
        if backend == "eager":
            case = Case(self.make, self.options, self.dtype, self.shapes, steps=self.steps, step=unscaled_step)
            whole = case.run(backend)
            without = f"p{len(self.shapes)}"  # which never has a gradient
            statistics = {"statistics": whole.pop("statistics")[:-1]} if "statistics" in whole else {}
            kept = {k: v for k, v in whole.items() if k != "skipped steps" and k.split(".")[0] != without}
            return kept | statistics
        turns = Turns()
        with mock.patch("fusedopt.backends.triton.adafactor.all_reduce_in_place", turns.all_reduce), torch.no_grad():
            first, second = turns.run(self._rank)
        found: Outcome = {}
        for name, (mine, dim) in first.items():
            other = second[name][0]
            if name == "statistics":
                found[name] = self._statistics(mine, other)
            elif dim is None:
                assert torch.equal(mine, other), f"ranks differ in {name}"
                found[name] = mine
            else:
                found[name] = torch.cat([mine, other], dim)
        return with_float32_weights(found)

    def _statistics(self, first: Tensor, second: Tensor) -> Tensor:
        """What `optimizer.statistics` makes of sums, of those of two ranks."""
        total = first + second
        total[:, PLACES.largest] = torch.maximum(first[:, PLACES.largest], second[:, PLACES.largest])
        numel = torch.tensor([torch.Size(shape).numel() for shape in self.shapes])
        norms = total[:, : PLACES.update + 1].sqrt()
        ratio = norms[:, PLACES.update] / norms[:, PLACES.weight]
        return torch.column_stack([norms, total[:, PLACES.largest], ratio, total[:, PLACES.lost] / numel])

    def _along(self, shape: Shape) -> int:
        return len(shape) + self.dim if len(shape) >= 2 else 0

    def _cut(self, t: Tensor, rank: int, along: int) -> Tensor:
        half = -(-t.shape[along] // RANKS)
        return t.narrow(along, rank * half, half if rank == 0 else t.shape[along] - half).clone()

    def _info(self, shape: Shape, rank: int) -> ShardInfo:
        along = self._along(shape)
        inner, half = torch.Size(shape[along + 1 :]).numel(), -(-shape[along] // RANKS)
        mine, whole = (half if rank == 0 else shape[along] - half) * inner, shape[along] * inner
        position = ShardPosition(max(mine, 1), whole - mine, rank * half * inner)
        rows, columns = (OVER if len(shape) >= 2 and self.dim == dim else () for dim in (-2, -1))
        return ShardInfo(torch.Size(shape), rows, columns, OVER, position)

    def _rank(self, rank: int) -> dict[str, tuple[Tensor, int | None]]:
        """What a rank has at the end, and along which dimension it is cut."""
        wholes = normal(self.shapes, 1, self.dtype)
        params = [torch.nn.Parameter(self._cut(w, rank, self._along(w.shape))) for w in wholes]
        optimizer = self.make(params, backend="triton", **self.options)
        optimizer.init_state()
        stepper: Any = backends.create(optimizer.rule, params[0].device, "triton")
        group = optimizer.param_groups[0]
        infos: list[ShardInfo | None] = [self._info(w.shape, rank) for w in wholes]
        measurement = places = None
        found: dict[str, tuple[Tensor, int | None]] = {}
        for k in range(self.steps):
            if optimizer.tracker:
                measurement = optimizer.tracker.open(optimizer, params, StepArgs())
                places = optimizer.tracker.places(params)
            grads = [self._cut(g, rank, self._along(g.shape)) for g in normal(self.shapes, 10 + k, self.dtype)]
            states = [optimizer.state[p] for p in params]
            precision = Precision.of(group, optimizer.seed)
            step = ParamSet(
                optimizer.rule, optimizer.hyper(group), list(params), list(grads), states, infos, precision, places
            )
            stepper([step], StepArgs(measurement=measurement))
            for t in stepper._tables._eager._scratch.values():
                t.fill_(torch.nan)
        if measurement is not None:
            found["statistics"] = next(iter(measurement.sums.values())).clone(), None
        for name, value in states_of(optimizer, params).items():
            number, _, state = name.removeprefix("p").partition(".")
            found[name] = value, self._cut_along(state, self.shapes[int(number)], value)
        return found

    def _cut_along(self, state: str, shape: Shape, value: Tensor) -> int | None:
        """The dimension along which a parameter's state is cut; None where both ranks have all of it."""
        factor = {"exp_avg_sq_row": -2, "exp_avg_sq_col": -1}.get(state)
        if factor is not None:
            return -1 if factor == self.dim else None
        return self._along(shape) if value.dim() else None
