"""The step of a rule on one device: brings its launch table up to date, then launches the rule's kernels."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.graphs import on_device
from fusedopt.backends.triton.capture import Tables as CapturableTables
from fusedopt.backends.triton.rounding import Rounding
from fusedopt.backends.triton.rows import Column, Rows
from fusedopt.backends.triton.scalars import DeviceScalars
from fusedopt.backends.work import Work
from fusedopt.interface import Measurement, ParamSet, ReduceDims, ShardInfo, StepArgs
from fusedopt.precision import master_state
from fusedopt_kernels import record
from fusedopt_kernels.measures import PLACES
from fusedopt_kernels.record import Record, Tables
from fusedopt_kernels.statistics import finish_measures
from fusedopt_kernels.table import LaunchTable, address_column

States = Sequence[dict[str, Tensor]]


class Reserved(NamedTuple):
    """What the steps of some parameters take.

    Attributes:
        workspace: bytes on the device, as `TritonStepper.workspace_bytes` returns them after a step.
        sums: what a step adds up over processes, and over which.
    """

    workspace: int
    sums: list[tuple[Tensor, ReduceDims]]


class TritonStepper:
    """The part that the steppers of all rules share. A subclass declares its records and fills in its own fields."""

    row: Record
    """A row of the launch table; its tensors are updated element by element."""

    hyper: Record
    """A set of hyper-parameters."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = Rows()
        self._tables = CapturableTables(device)
        self._tensors: object | None = None

    @property
    def captured(self) -> bool:
        """True if there may be a CUDA graph that goes on reading what this holds."""
        return self._tables.captured

    def workspace_bytes(self) -> int:
        """Returns the memory on the device that steps hand sums on in, and lists of pieces; 0 before the first step."""
        return self._tables.workspace

    def __call__(self, param_sets: Sequence[ParamSet], args: StepArgs) -> None:
        self.prepare(param_sets, args)()

    def prepare(self, param_sets: Sequence[ParamSet], args: StepArgs) -> Work:
        """Returns the launches of a step, which take no more memory than they have been given here."""
        if not any(_has_work(param_set) for param_set in param_sets):
            return Work()
        params = [p for param_set in param_sets for p in param_set.params]
        states = [s for param_set in param_sets for s in param_set.states]
        with on_device(self._device):
            rows = self._filled_rows(param_sets, params, states, args.tensors)
            scalars = DeviceScalars(self._device)
            hyper = self._hyper(param_sets, args, scalars)
            partials = 0
            if args.measurement is not None:
                partials = self._fill_in_measures(rows, hyper, param_sets, args.measurement, scalars)
            table = self._tables.for_step(rows, hyper, keep=lambda: [params, [dict(s) for s in states], scalars.kept])
            measures = None
            if args.measurement is not None:
                measures = table.scratch("measures", partials, dtype=torch.float64)
            self.make_room(table, measured=measures is not None)
        return Work(partial(self._launch, table, len(rows), measures, scalars))

    def _launch(self, table: LaunchTable, rows: int, measures: Tensor | None, scalars: DeviceScalars) -> None:
        """Launches everything; `scalars` have to live until then."""
        with on_device(self._device):
            self.launch(table, measures)
            if measures is not None:
                places = Tables(self.row.places, self.hyper.places, measures=PLACES)
                finish_measures(table, rows, measures, places)
            self._rows.copy_back()

    def reserve(self, param_sets: Sequence[ParamSet], measured: bool = False) -> Reserved:
        """Returns what steps of these parameters would keep and add up, without taking one: they may be on "meta".

        Args:
            param_sets: as of a step.
            measured: whether all steps are.
        """
        params = [p for param_set in param_sets for p in param_set.params]
        states = [s for param_set in param_sets for s in param_set.states]
        table = LaunchTable(self._device)
        rows = self._filled_rows(param_sets, params, states)
        table.update(rows, self.hyper.rows(len(param_sets)))
        sums = self.make_room(table, measured)
        if measured:
            table.scratch("measures", len(PLACES) * int(rows["pieces"].sum()), dtype=torch.float64)
        return Reserved(table.workspace, sums)

    def _filled_rows(
        self, param_sets: Sequence[ParamSet], params: list[Tensor], states: States, tensors: object | None = None
    ) -> np.ndarray:
        """Returns the rows of a step; with the `tensors` of the last one, see `StepArgs`, only addresses change."""
        known = tensors is not None and tensors is self._tensors
        self._tensors = None
        if known and self._rows.follow(gradients(param_sets)):
            counts: Sequence[int] | np.ndarray = self._rows.last_counts()
        else:
            self._rounding = Rounding.of(param_sets)
            self.refresh(self._rows, param_sets, params, states, self._rounding)
            counts = self._rows.counts([s.get("step") for s in states])
            self._template = self._new_rows(param_sets, params)
        rows = record.copied(self._template)
        for name, column in zip(self.row.tensors, self._rows.addresses.T):
            rows[name] = column
        rows["step"] = counts
        if self._rounding.is_random:
            rows["number"] = address_column(self._rounding.numbers(states))
        self.fill_addresses(rows, states)
        self._tensors = tensors
        return rows

    def _new_rows(self, param_sets: Sequence[ParamSet], params: list[Tensor]) -> np.ndarray:
        """Returns the rows without addresses."""
        rows = self.row.rows(len(params))
        rows["numel"] = self._rows.numel
        rows["hyper_index"] = np.repeat(np.arange(len(param_sets)), [len(param_set.params) for param_set in param_sets])
        rows["shard_length"], rows["shard_gap"], rows["shard_offset"] = self._rounding.positions.T
        self.fill_rows(rows, param_sets, params)
        return rows

    def _hyper(self, param_sets: Sequence[ParamSet], args: StepArgs, scalars: DeviceScalars) -> np.ndarray:
        hyper = self.hyper.rows(len(param_sets))
        common = {
            "scale": scalars.number("scale", args.scale),
            "grad_scale": scalars.address(args.grad_scale),
            "found_inf": scalars.address(args.found_inf),
        }
        fields = self.hyper.fields
        for i, param_set in enumerate(param_sets):
            values: dict[str, Any] = {
                **common,
                "shared_steps": param_set.shares_steps,
                "sign": -1.0 if param_set.hyper.maximize else 1.0,
                "seed": param_set.precision.seed,
            }
            if param_set.hyper.lr is not None:
                values["lr"] = scalars.number("lr", param_set.hyper.lr)
            for name, value in self.hyper_values(param_set.hyper).items():
                values[name] = scalars.number(name, value) if fields[name] is record.NUMBER else value
            hyper[i] = self.hyper.row(values)
        return hyper

    def _fill_in_measures(
        self,
        rows: np.ndarray,
        hyper: np.ndarray,
        param_sets: Sequence[ParamSet],
        measurement: Measurement,
        scalars: DeviceScalars,
    ) -> int:
        """Fills in where the measures of tensors go; returns how many their pieces have together."""
        sums = measurement.sums[self._device]
        scalars.kept.append(sums)
        hyper["measured_scale"] = scalars.number("scale", measurement.scale)
        hyper["measured_grad_scale"] = scalars.address(measurement.grad_scale)
        places = np.concatenate([param_set.places for param_set in param_sets if param_set.places is not None])
        rows["measures_at"] = np.where(rows["grad"] != 0, sums.data_ptr() + places * sums.stride(0) * sums.itemsize, 0)
        ends = np.cumsum(len(PLACES) * rows["pieces"])
        rows["measures"][1:] = ends[:-1]
        return int(ends[-1])

    # What a subclass fills in.

    def refresh(
        self, rows: Rows, param_sets: Sequence[ParamSet], params: list[Tensor], states: States, rounding: Rounding
    ) -> None:
        """Hands the tensors of this step to `rows`, those of `row.tensors` in their order."""
        raise NotImplementedError

    def fill_rows(self, rows: np.ndarray, param_sets: Sequence[ParamSet], params: list[Tensor]) -> None:
        """Fills in `pieces`, and the fields of the rows that only this rule has, but for addresses."""
        raise NotImplementedError

    def fill_addresses(self, rows: np.ndarray, states: States) -> None:
        """Fills in the addresses that only this rule has, and what depends on addresses."""

    def hyper_values(self, hyper: Any) -> dict[str, float | Tensor]:
        """Returns the fields of a set of hyper-parameters that only this rule has."""
        raise NotImplementedError

    def make_room(self, table: LaunchTable, measured: bool) -> list[tuple[Tensor, ReduceDims]]:
        """Makes the memory that the rule's kernels work in; returns what they add up over processes, and over which."""
        raise NotImplementedError

    def launch(self, table: LaunchTable, partials: Tensor | None = None) -> None:
        """Launches the rule's kernels, which leave the measures of all pieces in `partials` if there is any."""
        raise NotImplementedError


def gradients(param_sets: Sequence[ParamSet]) -> Column:
    """Returns the gradients of all sets, one per row."""
    return [g for param_set in param_sets for g in param_set.grads]


def shard_infos(param_sets: Sequence[ParamSet]) -> list[ShardInfo | None]:
    """Returns what is known of the shards of all sets, one entry per row."""
    return [s for param_set in param_sets for s in param_set.shard_infos or [None] * len(param_set.params)]


def masters(param_sets: Sequence[ParamSet]) -> Column:
    """Returns what completes the parameters of all sets, one per row."""
    column: list[Tensor | None] = []
    for param_set in param_sets:
        if param_set.precision.master_weights:
            pairs = zip(param_set.params, param_set.states)
            column += [state.get(master_state(p.dtype) or "") for p, state in pairs]
        else:
            column += [None] * len(param_set.params)
    return column


def _has_work(param_set: ParamSet) -> bool:
    # Shared counts go on, although all gradients of this step may belong to parameters of another device.
    return param_set.shares_steps or any(g is not None for g in param_set.grads)
