"""What a launch needs to know of rounding: which tensors are rounded at random, and what random bits depend on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fusedopt.interface import ParamSet
from fusedopt.precision import NUMBER, Precision
from fusedopt_kernels.storage import EVERYTHING, MOMENTS, NEAREST


class Rounding(NamedTuple):
    """The rounding of some rows.

    Attributes:
        kinds: int64 [rows], what is rounded stochastically, as `storage` numbers it.
        positions: int64 [rows, 3], the fields of `ShardPosition`; 0 for a whole parameter.
    """

    kinds: np.ndarray
    positions: np.ndarray

    @classmethod
    def to_nearest(cls, rows: int) -> "Rounding":
        """Nothing is random."""
        return cls(np.full(rows, NEAREST, np.int64), np.zeros((rows, 3), np.int64))

    @classmethod
    def of(cls, param_sets: Sequence[ParamSet]) -> "Rounding":
        """The rounding of all sets, a row per parameter."""
        rounding = cls.to_nearest(sum(len(param_set.params) for param_set in param_sets))
        start = 0
        for param_set in param_sets:
            rows = slice(start, start := start + len(param_set.params))
            if param_set.precision.is_plain:
                continue
            pairs = zip(param_set.params, param_set.states)
            rounding.kinds[rows] = [_kind(p, state, param_set.precision) for p, state in pairs]
            if param_set.shard_infos is not None:
                places = [info and info.position for info in param_set.shard_infos]
                rounding.positions[rows] = [place or (0, 0, 0) for place in places]
        return rounding

    @property
    def is_random(self) -> bool:
        """True if anything is rounded at random."""
        return bool((self.kinds != NEAREST).any())

    def numbers(self, states: Sequence[dict[str, Tensor]]) -> list[Tensor | None]:
        """Returns the numbers of the parameters with these states, which random bits depend on; None for the others."""
        return [None if kind == NEAREST else state[NUMBER] for kind, state in zip(self.kinds.tolist(), states)]

    def position_bits(self) -> np.ndarray:
        """Returns int64 [rows]: the numbers of a position joined by "or", 0 where the position does not matter."""
        return np.where(self.kinds != NEAREST, np.bitwise_or.reduce(self.positions, axis=1), 0)


def _kind(p: Tensor, state: dict[str, Tensor], precision: Precision) -> int:
    if NUMBER not in state:
        return NEAREST
    return EVERYTHING if precision.rounds_stochastically(p.dtype) else MOMENTS
