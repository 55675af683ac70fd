"""What the last measured step did to each parameter."""

from collections.abc import Collection, Sequence
from itertools import chain, count
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusedopt.columns import aligned
from fusedopt.statistics.findings import QUANTITIES, findings, kinds_of, numel_of
from fusedopt_kernels.measures import PLACES

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

_TITLES = ("gradient", "weight", "update", "largest", "update/weight", "lost", "finding")


class Statistics:
    """What the last measured step of an optimizer did to each parameter; `optimizer.statistics`.

    Quantities, of whole tensors where parameters are sharded:

    - `grad_norm`: norm of the gradient, unscaled and before clipping.
    - `weight_norm`: norm of the weight before the update, of the float32 one with master weights.
    - `update_norm`, `largest_update`: norm and largest magnitude of the new weight less the old one, decay included,
      before it is rounded to 16 bits.
    - `update_to_weight`: the quotient of these norms.
    - `lost`: the share of elements whose update was not 0, and which rounding to 16 bits left as they were. 0 for
      wider parameters, and with master weights, where nothing is lost.

    A step that was skipped has its gradients and weights, and updates of 0. Parameters without a gradient have NaN in
    all quantities, as all have before the first measured step. Norms are roots of float64 sums of squares: those of
    float64 tensors are inf above 1e154, and 0 where all elements are below 1e-162.

    Nothing but `to_dict`, `table` and printing waits for a device.

    Example:
        >>> import fusedopt, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = fusedopt.AdamW(model.named_parameters(), lr=0.01, track_statistics=True)
        >>> model(torch.ones(3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.statistics.names
        ['weight', 'bias']
        >>> round(optimizer.statistics.to_dict()["update_norm/weight"], 4)
        0.0173
    """

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self._optimizer = optimizer

    @property
    def names(self) -> list[str]:
        """The parameters' names, as `named_parameters()` gave them to the optimizer; else "group.index".

        The second of two parameters called "weight", as of two models, is "weight (2)".
        """
        return names_of(self._optimizer)

    @property
    def quantities(self) -> tuple[str, ...]:
        """The names of the columns of `tensor`."""
        return QUANTITIES

    @property
    def tensor(self) -> Tensor:
        """All quantities, float64 [parameters, quantities], on the device of the first parameter.

        A new tensor each time it is read; after a replay of a CUDA graph, that of the replayed step.
        """
        sums = self._sums()
        home = sums.device
        norms = sums[:, : PLACES.update + 1].sqrt()  # NaN where there is -1, as nothing was measured
        measured = sums[:, PLACES.gradient] >= 0.0
        measured |= sums[:, PLACES.gradient].isnan()
        largest = torch.where(measured, sums[:, PLACES.largest], torch.nan)
        ratio = norms[:, PLACES.update] / norms[:, PLACES.weight]
        numel = torch.from_numpy(np.maximum(numel_of(self._optimizer), 1)).to(torch.float64)
        numel = numel.pin_memory().to(home, non_blocking=True) if home.type == "cuda" else numel
        lost = torch.where(measured, sums[:, PLACES.lost] / numel, torch.nan)
        return torch.column_stack([norms, largest, ratio, lost])

    def to_dict(self) -> dict[str, float]:
        """All quantities as plain floats, ready for a logger: "grad_norm/<name>" and so on; waits for the device.

        Parameters without a gradient are left out.
        """
        rows = zip(self.names, self.tensor.tolist(), self._measured())
        values = {name: row for name, row, measured in rows if measured}
        return {
            f"{quantity}/{name}": row[column]
            for column, quantity in enumerate(QUANTITIES)
            for name, row in values.items()
        }

    def table(self, rows: int | None = 20) -> str:
        """The statistics as text, a line per parameter, the worst first; waits for the device.

        First those with a norm that is not finite; then those whose gradient is 0 while others have one; then those
        that are farthest from their like, by a factor: in the update-to-weight ratio, or in the root mean square of the
        elements ("element size"), from the nearest quarter of the parameters of their kind; last those whose weights or
        updates were 0. The last column says what was found, if anything. Of one kind are parameters with as
        many dimensions whose names end alike: weights of linear layers, weights of norms, biases.

        Args:
            rows: how many lines; None for all.
        """
        measured = np.flatnonzero(self._measured())
        if not len(measured):
            return "no step was measured yet"
        values, names = self.tensor.numpy(force=True), self.names
        kinds, numel = kinds_of(self._optimizer), numel_of(self._optimizer)
        found = findings(values[measured], [kinds[i] for i in measured], numel[measured])
        ranked = sorted(zip(found, measured.tolist()), key=lambda pair: pair[0][:2])[:rows]
        lines: list[Sequence[str]] = [("parameter", *_TITLES)]
        for finding, i in ranked:
            *numbers, lost = values[i].tolist()
            cells = [f"{number:.2e}" for number in numbers]
            lines.append((names[i], *cells, f"{100 * lost:.1f}%", finding.text))
        text = aligned(lines, "<" + ">" * len(QUANTITIES) + "<")
        if len(ranked) < len(measured):
            text.append(f"... and {len(measured) - len(ranked)} more")
        return "\n".join(text)

    def __repr__(self) -> str:
        return self.table()

    def _measured(self) -> list[bool]:
        return (~(self._sums()[:, PLACES.gradient] < 0.0)).tolist()

    def _sums(self) -> Tensor:
        """The measures of all parameters on one device; -1 for those without a gradient."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        home = next((p.device for p in params if p.device.type != "meta"), torch.device("cpu"))
        sums = list(self._optimizer.tracker.sums.values())
        rows = self._optimizer.tracker.rows(params)
        none = torch.full((1, len(PLACES)), -1.0, dtype=torch.float64, device=home)
        if not sums or not params:
            return none.expand(len(params), -1)
        together = sums[0].to(home, non_blocking=True)
        for others in sums[1:]:
            here = others.to(home, non_blocking=True)
            together = torch.where(here[:, :1] < 0.0, together, here)
        if rows is not None:  # the groups have been edited since; -1 is the last one
            together = torch.cat([together, none])[torch.tensor(rows, dtype=torch.int64, device="cpu").to(home)]
        return together


def names_of(optimizer: "FusedOptimizer") -> list[str]:
    """Returns a name per parameter, all different; see `Statistics.names`."""
    names: dict[str, None] = {}
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or []
        # Parameters that were added to the list by hand have none.
        for name in [*given, *(f"{number}.{index}" for index in range(len(given), len(group["params"])))]:
            names[distinct(name, names)] = None
    return list(names)


def distinct(name: str, taken: Collection[str]) -> str:
    """Returns `name`, with a number behind it if it is taken."""
    return next(one for one in chain([name], (f"{name} ({n})" for n in count(2))) if one not in taken)
