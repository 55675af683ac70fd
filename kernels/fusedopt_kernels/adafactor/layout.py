"""Adafactor's records, and what lies where in its workspace.

Phases hand sums to each other in workspaces. `partial_sums` is float32, with a second one in float64 for tensors whose
arithmetic is; for each matrix-shaped tensor, with tiles_x by tiles_y tiles per matrix, it holds

    partial_sums ->       row sums     [matrices, tiles_x, height]   `sums` writes, `averages` reads
                          column sums  [matrices, tiles_y, width]
    row_mean_partials ->  sums of exp_avg_sq_row [matrices, row_programs]   from `averages` to `squares` and `apply`

`square_partials` is float64 and holds for every tensor

    square_partials ->    squares of the update     [pieces]   `squares` (of vectors `sums`) writes, `finish` reads
                          squares of the parameter  [pieces]   `sums` writes, `finish` reads

After them come the sums of shards, those that are added up over the same processes next to each other:

    row_totals, column_totals ->   [matrices, height], [matrices, width]
    row_means ->                   [matrices]
    square_totals ->               [2]

For a whole tensor, `row_means` and `square_totals` are `row_mean_partials` and `square_partials`; `row_means_count` and
`square_totals_count` say how many numbers there are to be added up.
"""

import triton.language as tl

from fusedopt_kernels.record import ADDRESS, FLOAT, INTEGER, NUMBER, Tables
from fusedopt_kernels.step import hyper_record, row_record, scalars_record

VECTOR, MATRIX, SMALL = map(tl.constexpr, range(3))
"""Kinds of a tensor, see `plan`."""

ROW = row_record(
    exp_avg=ADDRESS,
    exp_avg_sq_row=ADDRESS,  # of a vector, exp_avg_sq
    exp_avg_sq_col=ADDRESS,
    rms32=ADDRESS,
    rms64=ADDRESS,
    # What the tensor looks like, see `plan.Shapes`; `aligned`: its rows allow 128-bit accesses.
    aligned=INTEGER,
    kind=INTEGER,
    matrices=INTEGER,
    height=INTEGER,
    width=INTEGER,
    inner=INTEGER,
    # How it is cut: tiles of a matrix; entries of its rows that a program averages, and how many programs do.
    tiles_x=INTEGER,
    tiles_y=INTEGER,
    rows_per_program=INTEGER,
    row_programs=INTEGER,
    # Where its sums begin, in elements of the workspaces above.
    partial_sums=INTEGER,
    row_mean_partials=INTEGER,
    square_partials=INTEGER,
    # What differs where it is a shard of a whole tensor.
    whole_numel=INTEGER,
    whole_height=INTEGER,
    whole_width=INTEGER,
    row_totals=INTEGER,
    column_totals=INTEGER,
    row_means=INTEGER,
    row_means_count=INTEGER,
    square_totals=INTEGER,
    square_totals_count=INTEGER,
)

HYPER = hyper_record(
    relative_step=INTEGER,
    scale_parameter=INTEGER,
    ceiling=FLOAT,  # a relative step is min(ceiling + slope * step, 1 / sqrt(step))
    slope=FLOAT,
    decay_rate=FLOAT,
    square_eps=NUMBER,
    rms_eps=NUMBER,
    clip_threshold=FLOAT,
    beta1=NUMBER,  # 0 where there is no average of updates
    weight_decay=NUMBER,
)

SCALARS = scalars_record(
    *("rate", "square_weight", "square_eps", "one_minus_beta1", "scale_parameter"),  # of the prologue
    *("step_size", "decay_step"),  # of `finish`
)

TABLES = Tables(ROW.places, HYPER.places, SCALARS.places)
