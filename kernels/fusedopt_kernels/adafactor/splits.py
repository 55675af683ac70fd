"""Tensors that are shards of whole ones: what the plan has to know of them, and where their sums lie."""

from typing import Any, NamedTuple

import numpy as np


class Shards(NamedTuple):
    """The whole tensors that the local ones are shards of: int64 [tensors] each, and a list each.

    Attributes:
        is_shard: 1 for a shard, 0 for a whole tensor.
        numel, height, width: of the whole tensor, as in `plan.Shapes`.
        reduce_rows, reduce_columns, reduce_all: what stands for the processes over which rows, columns and all elements
            are sharded, to be given to `all_reduce`; anything that can be a key.
    """

    is_shard: np.ndarray
    numel: np.ndarray
    height: np.ndarray
    width: np.ndarray
    reduce_rows: list[Any]
    reduce_columns: list[Any]
    reduce_all: list[Any]


def no_shards(numel: np.ndarray, height: np.ndarray, width: np.ndarray) -> Shards:
    """Returns what there is to know of whole tensors of these sizes."""
    none: list[Any] = [None] * len(numel)
    return Shards(np.zeros_like(numel), numel, height, width, none, none, none)


class Segment(NamedTuple):
    """Sums in the workspace that are added up over the same processes.

    Attributes:
        wide: 1 where they are in the workspace of float64 arithmetic.
        start, stop: where they are.
        processes: what stands for the processes.
    """

    wide: int
    start: int
    stop: int
    processes: Any


class Placed(NamedTuple):
    """Where sums are that processes add up: for each list of lengths, int64 [tensors]; and the segments."""

    starts: list[np.ndarray]
    segments: list[Segment]


class Workspace:
    """Workspaces that end at these elements, and grow."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = ends

    def place(self, tensors: np.ndarray, wide: np.ndarray, lengths_over: list[tuple[np.ndarray, list[Any]]]) -> Placed:
        """Places sums behind what there is, those over the same processes next to each other.

        In the order in which the tensors name their processes, whatever the lengths, so that all processes do the same
        in the same order.

        Args:
            tensors: int64, which tensors have any.
            wide: int64 [tensors], which workspace.
            lengths_over: lengths, int64 [tensors], and over which processes they are added up.
        """
        starts = [np.zeros_like(lengths) for lengths, _ in lengths_over]
        alike: dict[tuple[int, Any], list[tuple[int, int]]] = {}
        for number, (_, over) in enumerate(lengths_over):
            for i in tensors.tolist():
                alike.setdefault((int(wide[i]), over[i]), []).append((number, i))
        segments = []
        for (which, processes), members in alike.items():
            start = self.ends[which]
            for number, i in members:
                starts[number][i] = self.ends[which]
                self.ends[which] += int(lengths_over[number][0][i])
            segments.append(Segment(which, start, self.ends[which], processes))
        return Placed(starts, segments)
