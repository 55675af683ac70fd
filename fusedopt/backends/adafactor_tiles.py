"""Adafactor for one parameter on a CPU, in tiles that stay in the cache: no temporary of the parameter's size."""

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from fusedopt.batch import AdafactorHyper
from fusedopt_kernels import rules

TILE = 1 << 18
"""Elements of a tile (1 MiB in float32), of which one row at least."""


class Scratch:
    """Memory for a few tiles, the same at every step."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.Size], Tensor] = {}

    def like(self, t: Tensor, use: str, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the shape of `t`; another one for another `use`."""
        view = self._views.get((use, dtype, t.shape))
        if view is None:
            flat = self._flat.get((use, dtype))
            if flat is None or flat.numel() < t.numel():
                flat = self._flat[use, dtype] = torch.empty(max(TILE, t.numel()), dtype=dtype)
            view = self._views[use, dtype, t.shape] = flat[: t.numel()].view(t.shape)
        return view


class _Tiles:
    """A parameter and its gradient in tiles, read in float32 (float64 for float64 parameters).

    A tile is a few matrices of a batch of small ones, or a few rows of one. A vector is a matrix of one column.
    """

    def __init__(self, p: Tensor, g: Tensor, scale: float, scratch: Scratch) -> None:
        self.shape = (p.shape[:-2].numel(), *p.shape[-2:]) if p.dim() >= 2 else (1, p.numel(), 1)
        _, rows, columns = self.shape
        self._matrices, self._rows = TILE // (rows * columns), max(1, TILE // columns)
        self._p, self._g = self.split(p), self.split(g)
        self._scale, self._scratch = scale, scratch
        self.dtype = torch.promote_types(p.dtype, torch.float32)
        self.forward = range(len(self._p))
        self.backward = range(len(self._p) - 1, -1, -1)

    def split(self, t: Tensor) -> list[Tensor]:
        """The tiles of a tensor that has as many elements as the parameter."""
        return self.pieces(t.view(self.shape))

    def pieces(self, t: Tensor) -> list[Tensor]:
        """What belongs to each tile of a tensor [batch, rows, any]."""
        if self._matrices:
            return list(t.split(self._matrices))
        return [piece for matrix in t.unbind() for piece in matrix.split(self._rows)]

    def gradient(self, i: int) -> Tensor:
        g = self._g[i]
        if g.dtype != self.dtype:
            g = self._scratch.like(g, "gradient", self.dtype).copy_(g)
        return g if self._scale == 1.0 else torch.mul(g, self._scale, out=self._scratch.like(g, "gradient", self.dtype))

    def parameter(self, i: int) -> Tensor:
        p = self._p[i]
        return p if p.dtype == self.dtype else self._scratch.like(p, "parameter", self.dtype).copy_(p)

    def room(self, i: int) -> Tensor:
        """Where the update of a tile is made."""
        return self._scratch.like(self._g[i], "update", self.dtype)

    def store(self, i: int, p: Tensor) -> None:
        """Rounds what `parameter` returned back into the parameter, unless it is the parameter itself."""
        if p.dtype != self._p[i].dtype:
            self._p[i].copy_(p)


def tiled_update(
    hyper: AdafactorHyper, step: float, scale: float, p: Tensor, g: Tensor, state: dict[str, Tensor], scratch: Scratch
) -> None:
    """One update of one parameter; more than two dimensions must be contiguous, in the state as well.

    Three passes, each in the opposite direction of the last, so that it begins with what is still in the cache: the
    averages of g², the sums of squares of update and parameter, the new parameter. The update is made twice and never
    stored. Its square is summed as (g·√c·√r)², where the bilinear form of g² with the factors would lose what g² alone
    underflows; keeping the row factors out of the sum saved less than the noise of the measurement.
    """
    tiles = _Tiles(p, g, scale, scratch)
    weight = rules.square_weight(step, hyper.decay_rate, math.exp, math.log)
    average = _factored if "exp_avg_sq_row" in state else _unfactored
    update = average(tiles, state, weight, hyper.square_floor)

    of_update = of_parameter = 0.0
    for i in tiles.backward:
        of_update += _sum_of_squares(update(i))
        if hyper.scale_parameter:
            of_parameter += _sum_of_squares(tiles.parameter(i))
    if hyper.scale_parameter:
        state["RMS"].fill_(math.sqrt(of_parameter / p.numel()))
    rate = float(hyper.rate(step, state["RMS"].item()))
    divisor = rules.clip_divisor(math.sqrt(of_update / p.numel()), hyper.clip_threshold, max)
    step_size = (-rate if hyper.maximize else rate) / divisor

    averages = tiles.split(state["exp_avg"]) if hyper.beta1 is not None else None
    for i in tiles.forward:
        change, size, wide_p = update(i), step_size, tiles.parameter(i)
        room = change
        if averages is not None and hyper.beta1 is not None:
            change, size = averages[i].mul_(hyper.beta1).add_(change, alpha=(1.0 - hyper.beta1) * size), 1.0
        if hyper.weight_decay != 0.0:
            change, size = torch.mul(change, size, out=room).add_(wide_p, alpha=rate * hyper.weight_decay), 1.0
        tiles.store(i, wide_p.sub_(change, alpha=size))


def _sum_of_squares(t: Tensor) -> float:
    norm = torch.linalg.vector_norm(t).item()
    return norm * norm


def _factored(tiles: _Tiles, state: dict[str, Tensor], weight: float, floor: float) -> Callable[[int], Tensor]:
    """Averages the squares over rows and columns; returns what makes the unclipped update of a tile."""
    row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    of_rows, of_columns = [], []
    for i in tiles.forward:
        g = tiles.gradient(i)
        square = torch.mul(g, g, out=tiles.room(i))
        of_rows.append(square.sum(-1).flatten())
        of_columns.append(square.sum(-2).flatten())
    batch, n, m = tiles.shape
    row_mean = torch.cat(of_rows).view(row.shape) / m
    column_mean = torch.cat(of_columns).view(batch, -1, m).sum(1).view(column.shape) / n
    row.copy_(rules.running_average(row, row_mean + floor, weight))
    column.copy_(rules.running_average(column, column_mean + floor, weight))
    of_row = rules.row_factor(row, row.mean(-1, keepdim=True), torch.sqrt, operator.truediv).view(batch, n, 1)
    of_column = rules.column_factor(column, torch.sqrt, operator.truediv).view(batch, 1, m).expand(batch, n, m)
    row_factors, column_factors = tiles.pieces(of_row), tiles.pieces(of_column)

    def update(i: int) -> Tensor:
        return torch.mul(tiles.gradient(i), column_factors[i], out=tiles.room(i)).mul_(row_factors[i])

    return update


def _unfactored(tiles: _Tiles, state: dict[str, Tensor], weight: float, floor: float) -> Callable[[int], Tensor]:
    """Averages the squares; returns what makes the unclipped update of a tile."""
    v = tiles.split(state["exp_avg_sq"])
    for i in tiles.forward:
        g = tiles.gradient(i)
        square = torch.mul(g, g, out=tiles.room(i)).add_(floor)
        v[i].mul_(1.0 - weight).add_(square, alpha=weight)

    def update(i: int) -> Tensor:
        room = tiles.room(i)
        return torch.div(tiles.gradient(i), torch.sqrt(v[i], out=room), out=room)

    return update
