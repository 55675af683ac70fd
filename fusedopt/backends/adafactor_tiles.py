"""Adafactor for one parameter on a CPU, in tiles that stay in the cache: no temporary of the parameter's size."""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt.backends.scratch import scratch
from fusedopt.batch import AdafactorHyper
from fusedopt_kernels import rules

TILE = 1 << 20
"""Elements of a tile (4 MiB in float32), of which one row at least.

51.5 M parameters on one thread of an EPYC with 32 MiB of L3: 111 ms with tiles of 2^15, 80 with 2^16, 69 with 2^18, 62
with 2^20, 84 with 2^22. Larger tiles also wait less often for another thread.
"""


class _Tiles:
    """A parameter and its gradient in tiles, read in float32 (float64 for float64 parameters).

    A tile is a few matrices of a batch of small ones, or a few rows of one. A vector is a matrix of one column.
    """

    def __init__(self, p: Tensor, g: Tensor, scale: float) -> None:
        self.shape = (p.shape[:-2].numel(), *p.shape[-2:]) if p.dim() >= 2 else (1, p.numel(), 1)
        _, rows, columns = self.shape
        self._matrices, self._rows = TILE // (rows * columns), max(1, TILE // columns)
        self._p, self._g = self.split(p), self.split(g)
        self._scale, self._of_vector = scale, p.dim() < 2
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
            g = scratch.like(g, "gradient", self.dtype).copy_(g)
        return g if self._scale == 1.0 else torch.mul(g, self._scale, out=scratch.like(g, "gradient", self.dtype))

    def parameter(self, i: int) -> Tensor:
        p = self._p[i]
        return p if p.dtype == self.dtype else scratch.like(p, "parameter", self.dtype).copy_(p)

    def room(self, i: int) -> Tensor:
        """Where the update of a tile is made."""
        return scratch.like(self._g[i], "update", self.dtype)

    def norms(self, t: Tensor) -> Tensor:
        """The norm of each row of a tile, of the whole tile for a vector."""
        return torch.linalg.vector_norm(t, dim=None if self._of_vector else -1)

    def store(self, i: int, p: Tensor) -> None:
        """Rounds what `parameter` returned back into the parameter, unless it is the parameter itself."""
        if p.dtype != self._p[i].dtype:
            self._p[i].copy_(p)


class _Update(NamedTuple):
    """An update before clipping: that of tile i is `made(i) * rows[i]`.

    Attributes:
        made: makes it but for the row factors, in the room of the tile.
        factors: the row factors of all tiles, flat, in their order.
        rows: the row factors of each tile, in a shape that broadcasts; takes the flat ones.
    """

    made: Callable[[int], Tensor]
    factors: Tensor
    rows: Callable[[Tensor], list[Tensor]]


def tiled_update(
    hyper: AdafactorHyper, step: float, scale: float, p: Tensor, g: Tensor, state: dict[str, Tensor]
) -> None:
    """One update of one parameter; more than two dimensions must be contiguous, in the state as well.

    Three passes, each in the opposite direction of the last, so that it begins with what is still in the cache: the
    averages of g², the norms of update and parameter, the new parameter. The update is made twice and never stored.
    """
    tiles = _Tiles(p, g, scale)
    weight = rules.square_weight(step, hyper.decay_rate, math.exp, math.log)
    average = _factored if "exp_avg_sq_row" in state else _unfactored
    update = average(tiles, state, weight, hyper.square_floor)

    of_update, of_parameter = [], []
    for i in tiles.backward:
        u = update.made(i)
        of_update.append(tiles.norms(u))
        if hyper.scale_parameter:
            of_parameter.append(tiles.norms(tiles.parameter(i)))
    if hyper.scale_parameter:
        state["RMS"].fill_(math.sqrt(_sum_of_squares(of_parameter) / p.numel()))
    rate = float(hyper.rate(step, state["RMS"].item()))
    rms = math.sqrt(_mean_square(tiles, update, of_update, hyper.clip_threshold))
    step_size = (-rate if hyper.maximize else rate) / rules.clip_divisor(rms, hyper.clip_threshold, max)

    rows = update.rows(update.factors * step_size)
    averages = tiles.split(state["exp_avg"]) if hyper.beta1 is not None else None
    for i in tiles.forward:
        if i > 0:  # that of the first tile was made last
            u = update.made(i)
        wide_p = tiles.parameter(i)
        if averages is None and hyper.weight_decay == 0.0:
            wide_p.addcmul_(u, rows[i], value=-1.0)
        else:
            if averages is None or hyper.beta1 is None:
                change = u.mul_(rows[i])
            else:
                change = averages[i].mul_(hyper.beta1).addcmul_(u, rows[i], value=1.0 - hyper.beta1)
            wide_p.sub_(torch.add(change, wide_p, alpha=rate * hyper.weight_decay, out=u))
        tiles.store(i, wide_p)


def _sum_of_squares(norms: list[Tensor], factors: Tensor | float = 1.0) -> float:
    """Of everything whose norms these are, times its factor; in float64, where products do not overflow."""
    everything = torch.cat([t.flatten() for t in norms]).double()
    return float(everything.mul_(factors).square_().sum())


def _mean_square(tiles: _Tiles, update: _Update, norms: list[Tensor], threshold: float) -> float:
    """The mean square of an update, given the norms without row factors: a bilinear form of g² with the factors.

    What is below 1e-19 has no square in float32, and is lost however large its row factor is. Where that could show,
    the rows are multiplied first, tile by tile.
    """
    n, floor = math.prod(tiles.shape), torch.finfo(tiles.dtype).tiny
    mean_square = _sum_of_squares(norms[::-1], update.factors) / n
    lost = floor * float(update.factors.double().square().mean())
    if lost > 1e-6 * max(mean_square, threshold * threshold):
        rows = update.rows(update.factors)
        norms = [torch.linalg.vector_norm(update.made(i) * rows[i]) for i in tiles.backward]
        mean_square = _sum_of_squares(norms) / n
    return mean_square


def _factored(tiles: _Tiles, state: dict[str, Tensor], weight: float, floor: float) -> _Update:
    """Averages the squares over rows and columns; returns the update."""
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
    of_row = rules.row_factor(row, row.mean(-1, keepdim=True), torch.sqrt, operator.truediv).flatten()
    of_column = rules.column_factor(column, torch.sqrt, operator.truediv)
    columns = tiles.pieces(of_column.view(batch, 1, m).expand(batch, n, m))

    def made(i: int) -> Tensor:
        return torch.mul(tiles.gradient(i), columns[i], out=tiles.room(i))

    return _Update(made, of_row, lambda factors: tiles.pieces(factors.view(batch, n, 1)))


def _unfactored(tiles: _Tiles, state: dict[str, Tensor], weight: float, floor: float) -> _Update:
    """Averages the squares; returns the update, whose only row factor is 1."""
    v = tiles.split(state["exp_avg_sq"])
    for i in tiles.forward:
        g = tiles.gradient(i)
        square = torch.mul(g, g, out=tiles.room(i)).add_(floor)
        v[i].mul_(1.0 - weight).add_(square, alpha=weight)

    def made(i: int) -> Tensor:
        room = tiles.room(i)
        return torch.div(tiles.gradient(i), torch.sqrt(v[i], out=room), out=room)

    return _Update(made, torch.ones(1, dtype=tiles.dtype, device="cpu"), lambda factors: [factors] * len(v))
