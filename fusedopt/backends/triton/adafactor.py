"""Adafactor on the Triton backend: what is in its launch table at this step, and how its tensors are cut."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.triton.rounding import Rounding
from fusedopt.backends.triton.rows import Rows
from fusedopt.backends.triton.stepper import States, TritonStepper, gradients, masters, shard_infos
from fusedopt.interface import AdafactorHyper, ParamSet, ReduceDims, ShardInfo
from fusedopt.sharding import all_reduce_in_place
from fusedopt_kernels import rules
from fusedopt_kernels.adafactor.layout import HYPER, ROW, VECTOR
from fusedopt_kernels.adafactor.plan import Plan, Shapes, plan_of, shape_of
from fusedopt_kernels.adafactor.splits import Shards
from fusedopt_kernels.adafactor.step import adafactor, make_room
from fusedopt_kernels.table import LaunchTable, address_column, are_aligned


class TritonAdafactor(TritonStepper):
    """The stepper of Adafactor for one device."""

    row = ROW
    hyper = HYPER

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._plans = _PlanCache()

    def refresh(
        self, rows: Rows, param_sets: Sequence[ParamSet], params: list[Tensor], states: States, rounding: Rounding
    ) -> None:
        infos = shard_infos(param_sets)
        exp_avg, exp_avg_sq = ([s.get(name) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        averages = [param_set.hyper.beta1 is not None for param_set in param_sets for _ in param_set.params]
        rows.refresh(
            params,
            gradients(param_sets),
            masters(param_sets),
            [m if a else None for m, a in zip(exp_avg, averages)],
            exp_avg_sq,
            like=lambda i: _like(params[i], infos[i]),
        )
        self._keys = rows.update_classes(rounding)

    def fill_rows(self, rows: np.ndarray, param_sets: Sequence[ParamSet], params: list[Tensor]) -> None:
        self._shapes, self._plan = self._plans.of(params, self._keys, shard_infos(param_sets))
        for fields in (self._shapes._asdict(), self._plan.fields):
            for name, column in fields.items():
                rows[name] = column

    def fill_addresses(self, rows: np.ndarray, states: States) -> None:
        shapes = self._shapes
        row, col, rms = (
            address_column([s.get(name) for s in states]) for name in ("exp_avg_sq_row", "exp_avg_sq_col", "RMS")
        )
        elementwise, is_vector = self._rows.addresses, shapes.kind == VECTOR.value
        # Every row of a matrix begins at a multiple of 16 bytes if the first does and its length is a multiple of 16.
        length = np.where(is_vector, shapes.numel, shapes.width)
        rows["aligned"] = are_aligned(np.column_stack([elementwise, length]))
        rows["exp_avg"] = elementwise[:, 3]
        rows["exp_avg_sq_row"] = np.where(is_vector, elementwise[:, 4], row)
        rows["exp_avg_sq_col"] = col
        rows["rms32"] = np.where(self._plan.in_float64, 0, rms)
        rows["rms64"] = np.where(self._plan.in_float64, rms, 0)

    def hyper_values(self, hyper: AdafactorHyper) -> dict[str, float | Tensor]:
        ceiling, slope = rules.RELATIVE_STEP_CEILINGS[hyper.warmup_init]
        return {
            "relative_step": hyper.lr is None,
            "scale_parameter": hyper.scale_parameter,
            "ceiling": ceiling,
            "slope": slope,
            "decay_rate": hyper.decay_rate,
            "square_eps": hyper.square_eps,
            "rms_eps": hyper.rms_floor,
            "clip_threshold": hyper.clip_threshold,
            "beta1": 0.0 if hyper.beta1 is None else hyper.beta1,
            "weight_decay": hyper.weight_decay,
        }

    def make_room(self, table: LaunchTable, measured: bool) -> list[tuple[Tensor, ReduceDims]]:
        return make_room(table, self._keys, self._plan, measured=measured).shards.all_sums()

    def launch(self, table: LaunchTable, partials: Tensor | None = None) -> None:
        adafactor(table, self._keys, self._plan, all_reduce_in_place, partials)


class _PlanCache:
    """The plan for the tensors seen last."""

    def __init__(self) -> None:
        self._layouts: list[tuple[torch.Size, tuple[int, ...] | None]] = []
        self._keys = np.empty(0, np.int64)
        self._shard_infos: list[ShardInfo | None] = []

    def of(self, params: list[Tensor], keys: np.ndarray, shard_infos: list[ShardInfo | None]) -> tuple[Shapes, Plan]:
        """The shapes of the parameters as the kernels see them, and the plan of their launches."""
        layouts = [(p.shape, None if p.is_contiguous() else p.stride()) for p in params]
        if layouts != self._layouts or shard_infos != self._shard_infos or not np.array_equal(keys, self._keys):
            shapes = [
                shape_of(_like(p, shard_info), small=shard_info is None) for p, shard_info in zip(params, shard_infos)
            ]
            self._shapes = Shapes(*np.array(shapes, np.int64).T)
            self._plan = plan_of(self._shapes, keys, _shards_of(self._shapes, shard_infos))
            self._layouts, self._keys, self._shard_infos = layouts, keys, shard_infos
        return self._shapes, self._plan


def _like(p: Tensor, shard_info: ShardInfo | None) -> Tensor:
    """p, if the kernels can walk over it as it lies; else something contiguous of its shape."""
    walkable = shape_of(p) if shard_info is None else p.is_contiguous()
    return p if walkable else torch.empty(p.shape, dtype=p.dtype, device=p.device)


def _shards_of(shapes: Shapes, shard_infos: list[ShardInfo | None]) -> Shards:
    """The whole tensors that the shards are parts of."""
    whole = zip(shapes.numel, shapes.height, shapes.width)
    sizes = [(0, *size) if s is None else (1, s.shape.numel(), *_sides(s.shape)) for s, size in zip(shard_infos, whole)]
    is_shard, numel, height, width = np.array(sizes, np.int64).T
    row_dims, column_dims, all_dims = ([None if s is None else s[i] for s in shard_infos] for i in (1, 2, 3))
    return Shards(is_shard, numel, height, width, row_dims, column_dims, all_dims)


def _sides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[-2:]) if len(shape) >= 2 else (1, 1)
