"""The cells of Adafactor's tables: which number is where."""

from typing import NamedTuple

import triton.language as tl

COLUMNS = (
    *("param", "grad", "exp_avg", "row", "col", "step", "rms32", "rms64"),
    *("batch", "even", "kind", "numel", "matrices", "height", "width", "inner"),
    *("across", "down", "span", "shares", "pieces", "sums", "means", "squares"),
    *("whole_numel", "whole_height", "whole_width", "row_totals", "column_totals"),
    *("row_means", "row_means_count", "square_totals", "square_totals_count"),
)
"""A row of the table: addresses (0: no such tensor; `row` and `col` are averages of squares, a vector's is `row`); row
of `hyper`, whether rows of the tensor allow 128-bit accesses, its `Shapes`; tiles beside and above each other in a
matrix, rows that a program averages, how many programs do, pieces; where in the workspace sums, sums of averages and
sums of squares begin. Then what differs for a shard: sizes of the whole tensor; where the totals of rows and columns
begin; where the sums begin of which a mean of rows, or a mean square, is made, and how many they are."""

PARAM, GRAD, EXP_AVG, ROW, COL, STEP, RMS32, RMS64 = map(tl.constexpr, range(8))
BATCH, EVEN, KIND, NUMEL, MATRICES, HEIGHT, WIDTH, INNER = map(tl.constexpr, range(8, 16))
ACROSS, DOWN, SPAN, SHARES, PIECES, SUMS, MEANS, SQUARES = map(tl.constexpr, range(16, 24))
WHOLE_NUMEL, WHOLE_HEIGHT, WHOLE_WIDTH, ROW_TOTALS, COLUMN_TOTALS = map(tl.constexpr, range(24, 29))
ROW_MEANS, ROW_MEANS_COUNT, SQUARE_TOTALS, SQUARE_TOTALS_COUNT = map(tl.constexpr, range(29, 33))
ROW_LENGTH = tl.constexpr(len(COLUMNS))

VECTOR, MATRIX, SMALL = map(tl.constexpr, range(3))
"""Kinds of a tensor, see `adafactor_plan`."""


class Numbers(NamedTuple):
    """The float64 of a row of `hyper`.

    A relative step is min(ceiling + slope * step, 1 / sqrt(step)). An update weighs `update_weight` in the average of
    updates, 1 where there is none. `scale` and `sign` are factors of the gradient.
    """

    lr: float
    ceiling: float
    slope: float
    decay_rate: float
    square_floor: float
    rms_floor: float
    clip_threshold: float
    update_weight: float
    weight_decay: float
    scale: float
    sign: float


REFERENCES = (
    *("relative_step", "scale_parameter"),
    *("lr32", "lr64", "scale32", "scale64", "grad_scale", "found_inf", "unused"),
)
"""The int64 behind them: flags, and addresses of numbers on the device (0: there is none); the last keeps rows even."""

LR, CEILING, SLOPE, DECAY_RATE, SQUARE_FLOOR, RMS_FLOOR = map(tl.constexpr, range(6))
CLIP_THRESHOLD, UPDATE_WEIGHT, WEIGHT_DECAY, SCALE, SIGN = map(tl.constexpr, range(6, 11))
RELATIVE_STEP, SCALE_PARAMETER, LR32, LR64 = map(tl.constexpr, range(11, 15))
SCALE32, SCALE64, GRAD_SCALE, FOUND_INF = map(tl.constexpr, range(15, 19))
HYPER_LENGTH = tl.constexpr(len(Numbers._fields) + len(REFERENCES))

# The scalars of a row, from the prologue (ADDED to squares, OWN_WEIGHT of an update) and, the last two, from `finish`.
ACTIVE, FACTOR, RATE, SQUARE_WEIGHT, ADDED, OWN_WEIGHT, SCALED, STEP_SIZE, SHRINK = map(tl.constexpr, range(9))
SCALARS_LENGTH = tl.constexpr(10)
