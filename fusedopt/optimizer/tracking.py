"""Statistics of steps: which steps are measured, and what was."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusedopt import sharding
from fusedopt.backends.eager.norms import norms
from fusedopt.backends.graphs import capturing
from fusedopt.interface import Measurement, ReduceDims, StepArgs
from fusedopt_kernels.measures import PLACES
from fusedopt_kernels.memory import lasting

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

NOT_MEASURED = -1.0
"""In the place of every measure of a parameter that had no gradient."""


class Tracker:
    """Has every N-th step of an optimizer measured; nothing waits for a device.

    A step is measured by the calls of `open` that belong to it, more than one for a step in backward, and by `close`.

    Attributes:
        every: N; 0 for no step.
        measured_steps: how many steps were measured.
        sums: of the last one, float64 [parameters, measures], by device; parameters in the order of the groups.
    """

    def __init__(self, track_statistics: bool | int = False) -> None:
        given: Any = track_statistics  # numpy's whole numbers too
        if not isinstance(given, Integral) or int(given) < 0:
            raise ValueError(
                f"track_statistics must be True, False, or a whole number N > 0 for every N-th step, got "
                f"{track_statistics!r}"
            )
        self.every = int(given)
        self.measured_steps = 0
        self.sums: dict[torch.device, Tensor] = {}
        self._steps = 0
        self._opened = False
        self._places: dict[Tensor, int] = {}
        self._measured: list[weakref.ref[Tensor]] = []
        self._indices: dict[tuple[torch.device, ReduceDims], tuple[list[int], Tensor]] = {}

    def __bool__(self) -> bool:
        return self.every > 0

    def due(self, optimizer: "FusedOptimizer") -> bool:
        """True if this step is to be measured. A captured one is: its graph does the same at each replay."""
        return self.every > 0 and (
            self._steps % self.every == 0 or any(map(capturing, {p.device for p in _params(optimizer)}))
        )

    def open(self, optimizer: "FusedOptimizer", updated: Sequence[Tensor], args: StepArgs) -> Measurement:
        """Returns what a step, or a part of one, is asked to measure.

        Args:
            optimizer: whose step it is.
            updated: the parameters that it updates.
            args: of the step, before clipping.
        """
        if not self._opened or not all(p in self._places for p in updated):
            params, gradients = _params(optimizer), len(updated)
            self._places = {p: place for place, p in enumerate(params)}
            self._measured = list(map(weakref.ref, params))
            devices = {p.device for p in params if p.device.type != "meta"}
            if self.sums.keys() != devices or any(len(sums) != len(params) for sums in self.sums.values()):
                self.sums = {device: lasting((len(params), len(PLACES)), torch.float64, device) for device in devices}
                gradients = 0
            if gradients < len(params):  # the others keep what is here now
                for sums in self.sums.values():
                    sums.fill_(NOT_MEASURED)
            self._opened = True
        return Measurement(self.sums, args.scale, args.grad_scale)

    def places(self, params: Sequence[Tensor]) -> np.ndarray:
        """Returns the rows of these parameters in `sums`, int64; 0 for one that this step does not know."""
        return np.array([self._places.get(p, 0) for p in params], np.int64)

    def rows(self, params: Sequence[Tensor]) -> list[int] | None:
        """Returns the rows of these parameters in `sums`, -1 for none; None where they are all there, in this order."""
        places = {id(p): place for place, ref in enumerate(self._measured) if (p := ref()) is not None}
        rows = [places.get(id(p), -1) for p in params]
        return None if rows == list(range(len(self._measured))) else rows

    def with_gradients(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], measurement: Measurement
    ) -> Callable[[], None]:
        """Returns what puts these gradients' squares in the place of those that the update saw, of clipped copies."""
        writing = []
        factor: Any = measurement.scale
        if measurement.grad_scale is not None:
            factor = factor / measurement.grad_scale.double()
        by_device: dict[torch.device, list[int]] = {}
        for i, g in enumerate(grads):
            by_device.setdefault(g.device, []).append(i)
        for device, which in by_device.items():
            squares = torch.stack(norms([sharding.shard(grads[i]) for i in which])).square_()
            on_device = factor.to(device, non_blocking=True) if isinstance(factor, Tensor) else factor
            # Into views: an index would have to be copied to the device.
            column = self.sums[device][:, PLACES.gradient].unbind()
            own = [column[self._places[params[i]]] for i in which]
            writing.append(partial(torch._foreach_copy_, own, list((squares * on_device * on_device).unbind())))

        def write() -> None:
            for copy in writing:
                copy()

        return write

    def close(self, optimizer: "FusedOptimizer") -> None:
        """Ends a step: sums of shards become those of whole tensors, in two collective operations per kind of split."""
        if self._opened:
            params = _params(optimizer)
            if sharding.any_sharded(params):
                self._all_reduce(params)
        self.measured_steps += self._opened
        self._steps += 1
        self._opened, self._places = False, {}  # parameters that are dropped are not kept alive

    def abandon(self) -> None:
        """Ends a step that raised."""
        self._opened = False

    def _all_reduce(self, params: list[Tensor]) -> None:
        alike: dict[tuple[torch.device, ReduceDims], list[int]] = {}
        for place, p in enumerate(params):
            over = sharding.spread(p)
            if over:
                alike.setdefault((p.device, over), []).append(place)
        for (device, over), places in alike.items():
            rows = self._index(device, over, places)
            whole = self.sums[device].index_select(0, rows)
            largest = whole[:, PLACES.largest].clone()
            sharding.all_reduce_in_place(whole, over)
            sharding.all_reduce_in_place(largest, over, torch.distributed.ReduceOp.MAX)
            update = whole[:, PLACES.update]
            whole[:, PLACES.largest] = torch.where(update.isnan(), update, largest)
            self.sums[device].index_copy_(0, rows, whole)

    def _index(self, device: torch.device, over: ReduceDims, places: list[int]) -> Tensor:
        """These numbers on a device, copied there when the groups have changed."""
        known = self._indices.get((device, over))
        if known is None or known[0] != places:
            known = self._indices[device, over] = places, torch.tensor(places, dtype=torch.int64, device=device)
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew: what was measured belongs to the parameters of the original."""
        return {"track_statistics": self.every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Tracker.__init__(self, **state)


def _params(optimizer: "FusedOptimizer") -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
