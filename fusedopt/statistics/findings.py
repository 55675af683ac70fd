"""Which parameters to look at first, and why."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusedopt.without_data import is_lazy

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

QUANTITIES = ("grad_norm", "weight_norm", "update_norm", "largest_update", "update_to_weight", "lost")
"""The columns of `Statistics.tensor`."""

_COLUMN = {name: column for column, name in enumerate(QUANTITIES)}
_NORMS = {"grad_norm": "gradient", "weight_norm": "weight", "update_norm": "update"}

_FAR = 4.0


class Finding(NamedTuple):
    """What is unusual about a parameter; they sort as a reader wants them, the worst first.

    Attributes:
        kind: 0 for what is not finite, 1 for a gradient of 0, 2 for numbers to compare with those of its kind, 3 where
            there are none.
        distance: from its kind, minus the magnitude of a decimal logarithm.
        text: for a table; empty within a factor of 4.
    """

    kind: int
    distance: float
    text: str

    @property
    def stands_out(self) -> bool:
        """True for what is not finite or has no gradient, and beyond a factor of 4."""
        return self.kind < 3 and self.text != ""


def findings(values: np.ndarray, kinds: Sequence[Hashable], numel: np.ndarray) -> list[Finding]:
    """Returns a finding per parameter: first by what is not finite or has no gradient, then beside its kind.

    A parameter is compared with the nearest quarter of its kind, in two numbers: its update-to-weight ratio, and the
    root mean square of its elements. A bad start shows in the one where updates do not depend on the weight's size
    (Adam, Lion), in the other where they do (Adafactor). Not with the median: some kinds have two halves that differ,
    such as biases that start at 0 and others.

    Args:
        values: float [parameters, quantities], of parameters that were measured.
        kinds: of each parameter, see `kinds_of`.
        numel: how many elements each has, int [parameters].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = values[:, _COLUMN["weight_norm"]] / np.sqrt(np.maximum(numel, 1))
        compared = {
            "update/weight": np.log10(values[:, _COLUMN["update_to_weight"]]),
            "element size": np.log10(sizes),
        }
    distances = {name: _beside_their_kind(logarithms, kinds) for name, logarithms in compared.items()}
    some_have_gradients = (values[:, _COLUMN["grad_norm"]] > 0.0).any()
    found = []
    for i, row in enumerate(values):
        broken = [word for name, word in _NORMS.items() if not np.isfinite(row[_COLUMN[name]])]
        if broken:
            found.append(Finding(0, 0.0, f"not finite: {', '.join(broken)}"))
        elif row[_COLUMN["grad_norm"]] == 0.0 and some_have_gradients and numel[i]:
            found.append(Finding(1, 0.0, "gradient is 0"))
        elif row[_COLUMN["weight_norm"]] == 0.0 or row[_COLUMN["update_norm"]] == 0.0:
            what = "weight" if row[_COLUMN["weight_norm"]] == 0.0 else "update"
            found.append(Finding(3, 0.0, f"{what} was 0"))
        else:
            name = max(distances, key=lambda name: abs(distances[name][i]))
            distance = distances[name][i]
            worth = abs(distance) >= np.log10(_FAR)
            found.append(Finding(2, -abs(distance), f"{name} × {10**distance:.2g}" if worth else ""))
    return found


def kinds_of(optimizer: FusedOptimizer) -> list[tuple[int, str]]:
    """Returns what parameters must have in common to be compared: dimensions, and the end of the name if it has one.

    So weights of linear layers are compared with each other, biases with biases, weights of norms with their like.
    """
    kinds = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or []
        named = [*names, *[""] * (len(group["params"]) - len(names))]
        kinds += [(-1 if is_lazy(p) else p.dim(), name.rpartition(".")[2]) for p, name in zip(group["params"], named)]
    return kinds


def numel_of(optimizer: FusedOptimizer) -> np.ndarray:
    """Returns how many elements each parameter has, int64 [parameters]."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return np.array([0 if is_lazy(p) else p.numel() for p in params], np.int64)


def _beside_their_kind(logarithms: np.ndarray, kinds: Sequence[Hashable]) -> np.ndarray:
    """Returns how far each is from the nearest quarter of its kind; 0 where there is no number, or no other one."""
    members: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        if np.isfinite(logarithms[i]):
            members.setdefault(kind, []).append(i)
    distances = np.zeros(len(logarithms))
    for own in members.values():
        others = len(own) - 1
        if others:
            quarter = max(1, others // 4)
            for i in own:
                away = logarithms[i] - logarithms[own]
                distances[i] = away[np.argsort(np.abs(away), kind="stable")[quarter]]  # the nearest of all is itself
    return distances
