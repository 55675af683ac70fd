"""Which parameters to look at first, and why."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

QUANTITIES = ("grad_norm", "weight_norm", "update_norm", "largest_update", "update_to_weight", "lost")
"""The columns of `Statistics.tensor`."""

_COLUMN = {name: column for column, name in enumerate(QUANTITIES)}
_NORMS = {"grad_norm": "gradient", "weight_norm": "weight", "update_norm": "update"}

_WORTH_A_WORD, _STANDS_OUT = 3.0, 10.0


class Finding(NamedTuple):
    """What is unusual about a parameter; they sort as a reader wants them, the most conspicuous first.

    Attributes:
        kind: 0 for what is not finite, 1 for a gradient of 0, 2 for a number far from what is usual, 3 for the rest.
        distance: from what is usual, minus the magnitude of its decimal logarithm.
        text: for a table; empty if the parameter is within a factor of 3 of what is usual.
    """

    kind: int
    distance: float
    text: str

    @property
    def stands_out(self) -> bool:
        """True for what is not finite or has no gradient, and beyond a factor of 10."""
        return self.kind < 2 or (self.kind == 2 and -self.distance >= np.log10(_STANDS_OUT))


def findings(values: np.ndarray, kinds: Sequence[Hashable], numel: np.ndarray) -> list[Finding]:
    """Returns a finding per parameter: first by what is not finite or has no gradient, then beside its kind.

    A parameter is compared with the median of its kind, in two numbers: its update-to-weight ratio, and the root mean
    square of its elements. A bad start shows in the one where updates do not depend on the weight's size (Adam, Lion),
    in the other where they do (Adafactor).

    Args:
        values: float [parameters, quantities], of parameters that were measured.
        kinds: of each parameter, see `kinds_of`.
        numel: how many elements each has, int [parameters].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = values[:, _COLUMN["weight_norm"]] / np.sqrt(numel)
        compared = {
            "update/weight": np.log10(values[:, _COLUMN["update_to_weight"]]),
            "element size": np.log10(sizes),
        }
    distances = {name: _beside_their_kind(logarithms, kinds) for name, logarithms in compared.items()}
    one_has_a_gradient = (values[:, _COLUMN["grad_norm"]] > 0.0).any()
    found = []
    for i, row in enumerate(values):
        broken = [word for name, word in _NORMS.items() if not np.isfinite(row[_COLUMN[name]])]
        if broken:
            found.append(Finding(0, 0.0, f"not finite: {', '.join(broken)}"))
        elif row[_COLUMN["grad_norm"]] == 0.0 and one_has_a_gradient:
            found.append(Finding(1, 0.0, "gradient is 0"))
        elif row[_COLUMN["weight_norm"]] == 0.0 or row[_COLUMN["update_norm"]] == 0.0:
            what = "weight" if row[_COLUMN["weight_norm"]] == 0.0 else "update"
            found.append(Finding(3, 0.0, f"{what} was 0"))
        else:
            name = max(distances, key=lambda name: abs(distances[name][i]))
            distance = distances[name][i]
            worth = abs(distance) >= np.log10(_WORTH_A_WORD)
            found.append(Finding(2, -abs(distance), f"{name} × {10**distance:.2g}" if worth else ""))
    return found


def kinds_of(optimizer: FusedOptimizer) -> list[tuple[int, str]]:
    """Returns what parameters must have in common to be compared: dimensions, and the end of the name if it has one.

    So weights of linear layers are compared with each other, biases with biases, weights of norms with their like.
    """
    kinds = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or [""] * len(group["params"])
        kinds += [(p.dim(), name.rpartition(".")[2]) for p, name in zip(group["params"], names)]
    return kinds


def numel_of(optimizer: FusedOptimizer) -> np.ndarray:
    """Returns how many elements each parameter has, at least 1, int64 [parameters]."""
    return np.array([max(p.numel(), 1) for group in optimizer.param_groups for p in group["params"]], np.int64)


def _beside_their_kind(logarithms: np.ndarray, kinds: Sequence[Hashable]) -> np.ndarray:
    """Returns the differences to the median of each kind; 0 where there is no number."""
    members: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        if np.isfinite(logarithms[i]):
            members.setdefault(kind, []).append(i)
    distances = np.zeros(len(logarithms))
    for own in members.values():
        distances[own] = logarithms[own] - np.median(logarithms[own])
    return distances
