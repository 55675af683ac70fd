"""Adafactor for one parameter on a CPU, in tiles that stay in the cache: no temporary of the parameter's size."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.eager.measures import copy_of
from fusedopt.backends.eager.rounding import rounded
from fusedopt.backends.eager.stepper import Bucket
from fusedopt.backends.eager.storage import Storage, read_weight, weight_bits, weight_writer
from fusedopt.backends.scratch import scratch
from fusedopt.backends.work import Part
from fusedopt.interface import AdafactorHyper
from fusedopt_kernels import rules

TILE = 1 << 20
"""Elements of a tile (4 MiB in float32), of which one row at least.

51.5 M parameters on one thread of an EPYC with 32 MiB of L3: 111 ms with tiles of 2^15, 80 with 2^16, 69 with 2^18, 62
with 2^20, 84 with 2^22. Larger tiles also wait less often for another thread.
"""


PARTS = 16
"""Bands of rows of a tile whose columns are added up apart: every thread then reads the squares that it wrote.

torch's sum over rows gives each thread a share of the columns instead, and what another core has written takes five
times as long to read as what this one has. A fixed number, so that results do not depend on the number of threads.
"""


class _Tiles:
    """A parameter and its gradient in tiles, read in float32 (float64 for float64 parameters).

    A tile is a few matrices of a batch of small ones, or a few rows of one. A vector is a matrix of one column.
    """

    def __init__(self, bucket: Bucket, which: int) -> None:
        p, g = bucket.params[which], bucket.grads[which]
        batch, rows, columns = self.shape = _as_matrices(p)
        self.dtype = torch.promote_types(p.dtype, torch.float32)
        several = min(batch, TILE // (rows * columns))
        self._matrices = several if several > 1 else 0
        self._rows = max(1, TILE // columns)
        self._p, self._g = self.split(p), self.split(g)
        self._storage = Storage.of(bucket, [which])
        (master,) = self._storage.masters
        self._masters = [None] * len(self._p) if master is None else self.split(master)
        self._scale, self._of_vector = bucket.factor, p.dim() < 2
        self._update_buffer = scratch.like(self._g[0], "update", self.dtype)
        self.forward = range(len(self._p))
        self.backward = range(len(self._p) - 1, -1, -1)

    def split(self, t: Tensor) -> list[Tensor]:
        """The tiles of a tensor that has as many elements as the parameter."""
        return self.pieces(t if t.dim() == 2 else t.view(self.shape))

    def pieces(self, t: Tensor) -> list[Tensor]:
        """The part of each tile in a tensor [batch, rows, any], or of [rows, any] where there is one matrix."""
        if self._matrices:
            return list(t.split(self._matrices))
        matrices = [t] if t.dim() == 2 else list(t.unbind())
        if self._rows >= self.shape[1]:
            return matrices
        return [piece for matrix in matrices for piece in matrix.split(self._rows)]

    def gradient(self, i: int) -> Tensor:
        g = self._g[i]
        if g.dtype != self.dtype:
            g = scratch.like(g, "gradient", self.dtype).copy_(g)
        return g if self._scale == 1.0 else torch.mul(g, self._scale, out=scratch.like(g, "gradient", self.dtype))

    def raw_gradient(self, i: int) -> Tensor:
        """Returns the gradient without its factor."""
        return self._g[i]

    def parameter(self, i: int) -> Tensor:
        p = self._p[i]
        return (
            p if p.dtype == self.dtype else read_weight(p, self._masters[i], scratch.like(p, "parameter", self.dtype))
        )

    def update_buffer(self, i: int) -> Tensor:
        """Returns the memory in which the update of a tile is made."""
        g = self._g[i]
        return self._update_buffer if g.shape == self._update_buffer.shape else self._update_buffer[: len(g)]

    def norms(self, t: Tensor) -> np.ndarray:
        """The norm of each row of a tile, of the whole tile for a vector; flat."""
        return _flat(torch.linalg.vector_norm(t, dim=None if self._of_vector else -1))

    def writer(self, i: int, p: Tensor) -> Callable[[], object]:
        """Returns what writes what `parameter` returned back into the parameter, unless it is the parameter itself."""
        return weight_writer(self._p[i], self._masters[i], p, self._bits(i, p))

    def kept(self, i: int, p: Tensor) -> Tensor | None:
        """Returns what can be read again of what `parameter` returned, if that is in 16 bits alone."""
        dtype = self._p[i].dtype
        if dtype.itemsize > 2 or self._masters[i] is not None:
            return None
        return rounded(p, dtype, self._bits(i, p)).to(dtype).to(p.dtype)

    def _bits(self, i: int, p: Tensor) -> Tensor | None:
        bits = None
        if self._storage.stochastic and self._storage.keys is not None:
            start = sum(map(Tensor.numel, self._p[:i]))
            bits = weight_bits(self._storage.words([0], [p.numel()], start, p.device)).view(p.shape)
        return bits


def _as_matrices(p: Tensor) -> tuple[int, int, int]:
    return (math.prod(p.shape[:-2]), p.shape[-2], p.shape[-1]) if p.dim() >= 2 else (1, p.numel(), 1)


class _Update(NamedTuple):
    """An update before clipping: that of tile i is `made(i) * rows[i]`.

    Attributes:
        made: makes it but for the row factors, in the update_buffer of the tile.
        store: writes the averages of squares, which takes no memory.
        factors: the row factors of all tiles, flat, in their order.
        rows: the row factors of each tile, in a shape that broadcasts; takes the flat ones.
    """

    made: Callable[[int], Tensor]
    factors: np.ndarray
    rows: Callable[[np.ndarray], list[Tensor]]
    store: Callable[[], object]


@np.errstate(all="ignore")
def tiled_update(bucket: Bucket, which: int) -> Iterable[Part]:
    """Returns the update of a parameter of a bucket; more than two dimensions must be contiguous, in the state as well.

    Before it returns, two passes have found out how far the update goes, and written nothing; the third one is what is
    returned, two parts for each tile: the averages of updates, then the parameter.

    Three passes, each in the opposite direction of the last, so that it begins with what is still in the cache: the
    averages of g², the norms of update and parameter, the new parameter. The update is made twice and never stored.

    What has the length of a row or a column is numpy's: a call of torch costs ten microseconds between tiles, which
    leave nothing of its code in the cache.
    """
    hyper: AdafactorHyper = bucket.hyper
    p, state, step = bucket.params[which], bucket.states[which], bucket.step
    tiles = _Tiles(bucket, which)
    weight = rules.square_weight(step, hyper.decay_rate, math.exp, math.log)
    average = _factored if "exp_avg_sq_row" in state else _unfactored
    update = average(tiles, state, weight, hyper.square_eps)

    update_norms, parameter_norms = [], []
    for i in tiles.backward:
        u = update.made(i)
        update_norms.append(tiles.norms(u))
        if hyper.scale_parameter:
            parameter_norms.append(tiles.norms(tiles.parameter(i)))
    parameter_rms = state["RMS"].numpy().copy()
    if hyper.scale_parameter:
        parameter_rms[...] = math.sqrt(_sum_of_squares(parameter_norms) / p.numel())
    rate = float(hyper.rate(step, float(parameter_rms)))
    rms = math.sqrt(_mean_square(tiles, update, update_norms, hyper.clip_threshold))
    step_size = (-rate if hyper.maximize else rate) / rules.clip_divisor(rms, hyper.clip_threshold, max)

    rows = update.rows(update.factors * step_size)
    averages = tiles.split(state["exp_avg"]) if hyper.beta1 is not None else None
    first = [u]  # the update of the first tile was made last
    new: list[tuple[Tensor, Tensor]] = []  # of one tile, in memory that all take turns in, and its old weights

    def update_tile(i: int) -> None:
        u = first.pop() if first else update.made(i)
        first.append(u)
        wide_p = tiles.parameter(i)
        old = wide_p if bucket.measure is None else copy_of(wide_p)
        first.clear()
        new[:] = [(wide_p, old)]
        if averages is None and hyper.weight_decay == 0.0:
            wide_p.addcmul_(u, rows[i], value=-1.0)
        else:
            if averages is None or hyper.beta1 is None:
                change = u.mul_(rows[i])
            else:
                change = averages[i].to(tiles.dtype)  # a copy if it has another dtype, whose rounding is the state's
                change.mul_(hyper.beta1).addcmul_(u, rows[i], value=1.0 - hyper.beta1)
                if change is not averages[i]:
                    averages[i].copy_(change)
            wide_p.sub_(torch.add(change, wide_p, alpha=rate * hyper.weight_decay, out=u))

    def write_tile(i: int) -> None:
        wide_p, old = new[0]
        if bucket.measure is not None:
            sizes, kept = [wide_p.numel()], tiles.kept(i, wide_p)
            bucket.measure.add([which], sizes, tiles.raw_gradient(i), old, wide_p, kept)
        tiles.writer(i, wide_p)()

    def write_state() -> None:
        update.store()
        state["RMS"].numpy()[...] = parameter_rms

    return [*(partial(do, i) for i in tiles.forward for do in (update_tile, write_tile)), write_state]


def _flat(t: Tensor) -> np.ndarray:
    array: np.ndarray = t.numpy().reshape(-1)
    return array


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _sum_of_squares(norms: Sequence[np.ndarray], factors: np.ndarray | None = None) -> float:
    """The sum of squares of these norms, each times its factor; in float64, where products do not overflow."""
    everything = _joined(norms).astype(np.float64)
    if factors is not None:
        everything *= factors
    return float(np.add.reduce(np.square(everything, out=everything)))


def _mean_square(tiles: _Tiles, update: _Update, norms: list[np.ndarray], threshold: float) -> float:
    """The mean square of an update, given the norms without row factors: a bilinear form of g² with the factors.

    What is below 1e-19 has no square in float32, and is lost however large its row factor is. Where that could show,
    the rows are multiplied first, tile by tile.
    """
    n, floor = math.prod(tiles.shape), torch.finfo(tiles.dtype).tiny
    mean_square = _sum_of_squares(norms[::-1], update.factors) / n
    lost = floor * float(np.add.reduce(np.square(update.factors))) / len(update.factors)
    if lost > 1e-6 * max(mean_square, threshold * threshold):
        rows = update.rows(update.factors)
        norms = [_flat(torch.linalg.vector_norm(update.made(i) * rows[i])) for i in tiles.backward]
        mean_square = _sum_of_squares(norms) / n
    return mean_square


def _factored(tiles: _Tiles, state: dict[str, Tensor], weight: float, floor: float) -> _Update:
    """Averages the squares over rows and columns; returns the update."""
    batch, n, m = tiles.shape
    row_sums: list[np.ndarray] = []
    column_sums: list[np.ndarray] = []
    for i in tiles.forward:
        g = tiles.gradient(i)
        square = torch.mul(g, g, out=tiles.update_buffer(i))
        column_sums += map(_flat, _column_sums(square))
        row_sums.append(_flat(square.sum(-1)))
    rows, columns = _joined(row_sums).reshape(batch, n), np.add.reduce(_joined(column_sums).reshape(batch, -1, m), 1)
    row, store_rows = _averaged(state["exp_avg_sq_row"], rows / m + floor, weight)
    column, store_columns = _averaged(state["exp_avg_sq_col"], columns / n + floor, weight)
    row_mean = np.add.reduce(row, -1, keepdims=True) / n
    row_factor = rules.row_factor(row, row_mean, np.sqrt, np.divide).reshape(-1)
    column_factor = torch.from_numpy(rules.column_factor(column, np.sqrt, np.divide))
    columns_of = tiles.pieces(column_factor.view(batch, 1, m).expand(batch, n, m))

    def made(i: int) -> Tensor:
        return torch.mul(tiles.gradient(i), columns_of[i], out=tiles.update_buffer(i))

    def store() -> None:
        store_rows()
        store_columns()

    def rows_of(factors: np.ndarray) -> list[Tensor]:
        return tiles.pieces(torch.from_numpy(factors.reshape(batch, n, 1)))

    return _Update(made, row_factor, rows_of, store)


def _averaged(average: Tensor, new: np.ndarray, weight: float) -> tuple[np.ndarray, Callable[[], None]]:
    """The running average [batch, any] with what is new, and what stores it."""
    stored = average.numpy()
    result: np.ndarray = rules.running_average(stored.reshape(new.shape), new, weight)

    def store() -> None:
        stored[...] = result.reshape(stored.shape)

    return result, store


def _column_sums(t: Tensor) -> list[Tensor]:
    """Summands of the sums over the rows of each matrix of a tile."""
    if t.dim() > 2 or len(t) < PARTS:
        return [t.sum(-2)]
    rest = len(t) % PARTS
    bands = (t[:-rest] if rest else t).view(PARTS, -1, t.shape[-1]).sum(1)
    return [bands, t[-rest:].sum(0)] if rest else [bands]


def _unfactored(tiles: _Tiles, state: dict[str, Tensor], weight: float, floor: float) -> _Update:
    """Averages the squares; returns the update, whose only row factor is 1."""
    average = state["exp_avg_sq"].clone()
    v = tiles.split(average)
    for i in tiles.forward:
        g = tiles.gradient(i)
        square = torch.mul(g, g, out=tiles.update_buffer(i)).add_(floor)
        v[i].mul_(1.0 - weight).add_(square, alpha=weight)

    def made(i: int) -> Tensor:
        update_buffer = tiles.update_buffer(i)
        return torch.div(tiles.gradient(i), torch.sqrt(v[i], out=update_buffer), out=update_buffer)

    one = torch.ones(1, dtype=tiles.dtype, device="cpu").numpy()
    return _Update(
        made, one, lambda factors: [torch.from_numpy(factors)] * len(v), partial(state["exp_avg_sq"].copy_, average)
    )
