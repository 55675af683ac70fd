"""Adafactor on the Triton backend: what is in its launch table at this step, and how its tensors are cut."""

from collections.abc import Sequence
from operator import is_

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.capture import Tables, on_device
from fusedopt.backends.numbers import DeviceNumbers
from fusedopt.backends.rows import Column, Rows
from fusedopt.batch import AdafactorHyper, Batch, Control, Split
from fusedopt.sharding import add_up_in_place
from fusedopt_kernels import adafactor as kernels
from fusedopt_kernels import rules
from fusedopt_kernels.adafactor_cells import VECTOR, Numbers
from fusedopt_kernels.adafactor_plan import Plan, Shapes, plan_of, shape_of
from fusedopt_kernels.adafactor_splits import Splits
from fusedopt_kernels.memory import outside_inference_mode
from fusedopt_kernels.table import addresses, are_even, float_bits

_STATES = ("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "RMS")


class TritonAdafactor:
    """The stepper of Adafactor for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = Rows()
        self._tables = Tables(device)
        self._seen: list[Column] = [[]] * len(_STATES)
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []
        self._cut = _Cut()

    @property
    def captured(self) -> bool:
        """Whether there may be a CUDA graph that goes on reading what this holds."""
        return self._tables.captured

    def workspace_bytes(self) -> int:
        """Memory on the device that steps hand sums on in, and lists of pieces; none before the first step."""
        return self._tables.workspace

    def __call__(self, batches: Sequence[Batch], control: Control) -> None:
        if all(g is None for batch in batches for g in batch.grads):
            return
        params = [p for batch in batches for p in batch.params]
        states = [s for batch in batches for s in batch.states]
        with on_device(self._device):
            rows, keys, plan = self._look(batches, params, states)
            numbers = DeviceNumbers(self._device)
            hyper = _hyper(batches, control, numbers)
            table = self._tables.filled(rows, hyper, keep=lambda: [params, [dict(s) for s in states], numbers.kept])
            kernels.adafactor(table, keys, plan, add_up_in_place)
            self._rows.copy_back()

    def _look(
        self, batches: Sequence[Batch], params: list[Tensor], states: list[dict[str, Tensor]]
    ) -> tuple[np.ndarray, np.ndarray, Plan]:
        """The rows of the table, their dtype classes, and how they are cut."""
        splits = [s for batch in batches for s in batch.splits or [None] * len(batch.params)]
        exp_avg, exp_avg_sq, row, col, rms = self._state_columns(params, states)
        averages = [batch.hyper.beta1 is not None for batch in batches for _ in batch.params]
        self._rows.look(
            params,
            [g for batch in batches for g in batch.grads],
            [m if a else None for m, a in zip(exp_avg, averages)],
            exp_avg_sq,
            like=lambda i: _like(params[i], splits[i]),
        )
        keys = self._rows.dtype_classes(2)
        shapes, plan = self._cut.of(params, keys, splits)
        walked, vector_at = self._rows.addresses[:, :3], self._rows.addresses[:, 3]
        is_vector = shapes.kind == VECTOR.value
        # Every row of a matrix begins at a multiple of 16 bytes if the first does and its length is a multiple of 16.
        even = are_even(np.column_stack([walked, vector_at, np.where(is_vector, shapes.numel, shapes.width)]))
        row_at, col_at, rms_at, steps = map(_addresses, [row, col, rms, [s.get("step") for s in states]])
        rows = [
            walked,
            np.where(is_vector, vector_at, row_at),
            col_at,
            steps,
            np.where(plan.in_float64, 0, rms_at),
            np.where(plan.in_float64, rms_at, 0),
            np.repeat(np.arange(len(batches)), [len(batch.params) for batch in batches]),
            even,
            *shapes,
            plan.columns,
        ]
        return np.column_stack(rows), keys, plan

    def _state_columns(self, params: list[Tensor], states: list[dict[str, Tensor]]) -> list[Column]:
        """The states, by name. Those that were loaded in another dtype than that of the arithmetic are converted."""
        columns = _columns(states)
        kinds = [(p.shape, p.dtype) for p in params]
        if kinds != self._kinds or not all(map(_same, columns, self._seen)):
            for p, state in zip(params, states):
                dtype = torch.promote_types(p.dtype, torch.float32)
                for name in _STATES:
                    if name in state:
                        with outside_inference_mode():
                            like = state[name].to(dtype)
                            # The averages of rows and columns are of no parameter's layout.
                            state[name] = like.contiguous() if name in ("exp_avg_sq_row", "exp_avg_sq_col") else like
            columns = self._seen = _columns(states)
            self._kinds = kinds
        return columns


class _Cut:
    """The plan for the tensors seen last."""

    def __init__(self) -> None:
        self._layouts: list[tuple[torch.Size, tuple[int, ...] | None]] = []
        self._keys = np.empty(0, np.int64)
        self._splits: list[Split | None] = []

    def of(self, params: list[Tensor], keys: np.ndarray, splits: list[Split | None]) -> tuple[Shapes, Plan]:
        """What parameters look like, as the kernels see them, and how they are cut."""
        layouts = [(p.shape, None if p.is_contiguous() else p.stride()) for p in params]
        if layouts != self._layouts or splits != self._splits or not np.array_equal(keys, self._keys):
            shapes = [shape_of(_like(p, split), small=split is None) for p, split in zip(params, splits)]
            self._shapes = Shapes(*np.array(shapes, np.int64).T)
            self._plan = plan_of(self._shapes, keys, _splits(self._shapes, splits))
            self._layouts, self._keys, self._splits = layouts, keys, splits
        return self._shapes, self._plan


def _like(p: Tensor, split: Split | None) -> Tensor:
    """p, if the kernels can walk over it as it lies; else something contiguous of its shape."""
    walkable = shape_of(p) if split is None else p.is_contiguous()
    return p if walkable else torch.empty(p.shape, dtype=p.dtype, device=p.device)


def _splits(shapes: Shapes, splits: list[Split | None]) -> Splits:
    """Of which whole tensors the shards are."""
    whole = zip(shapes.numel, shapes.height, shapes.width)
    sizes = [(0, *size) if s is None else (1, s.shape.numel(), *_sides(s.shape)) for s, size in zip(splits, whole)]
    is_split, numel, height, width = np.array(sizes, np.int64).T
    over_rows, over_columns, over_all = ([None if s is None else s[i] for s in splits] for i in (1, 2, 3))
    return Splits(is_split, numel, height, width, over_rows, over_columns, over_all)


def _sides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[-2:]) if len(shape) >= 2 else (1, 1)


def _columns(states: list[dict[str, Tensor]]) -> list[Column]:
    return [[s.get(name) for s in states] for name in _STATES]


def _same(a: Column, b: Column) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _addresses(column: Column) -> np.ndarray:
    return np.array(addresses(column), np.int64)


def _hyper(batches: Sequence[Batch], control: Control, numbers: DeviceNumbers) -> np.ndarray:
    """The table of hyper-parameters, one row per batch."""
    scale, *scale_at = numbers.number("scale", control.scale)
    skip_at = [numbers.address(control.grad_scale), numbers.address(control.found_inf)]
    rows = []
    for batch in batches:
        hyper: AdafactorHyper = batch.hyper
        lr, *lr_at = (0.0, 0, 0) if hyper.lr is None else numbers.number("lr", hyper.lr)
        ceiling, slope = rules.RELATIVE_STEP_CEILINGS[hyper.warmup_init]
        values = Numbers(
            lr=lr,
            ceiling=ceiling,
            slope=slope,
            decay_rate=hyper.decay_rate,
            square_floor=hyper.square_floor,
            rms_floor=hyper.rms_floor,
            clip_threshold=hyper.clip_threshold,
            update_weight=1.0 if hyper.beta1 is None else 1.0 - hyper.beta1,
            weight_decay=hyper.weight_decay,
            scale=scale,
            sign=-1.0 if hyper.maximize else 1.0,
        )
        flags = [int(hyper.lr is None), int(hyper.scale_parameter)]
        rows.append([*float_bits(values), *flags, *lr_at, *scale_at, *skip_at, 0])
    return np.array(rows, np.int64)
