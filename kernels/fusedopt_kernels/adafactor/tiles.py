# mypy: allow-untyped-defs
"""Adafactor on one piece of a vector, or of matrices. `SPEC` is a `plan.Spec`."""

import triton.language as tl

from fusedopt_kernels import rules
from fusedopt_kernels.device import device_function, div_rn, load_pointer, load_size, loop_range, sqrt_rn
from fusedopt_kernels.statistics import added, measured, no_measures, store_measures, where_active
from fusedopt_kernels.storage import load_keys, load_moment, load_weight, random_words, store_moment, store_weight

running_average = device_function(rules.running_average)
row_factor = device_function(rules.row_factor)
column_factor = device_function(rules.column_factor)
factored_update = device_function(rules.factored_update)
unfactored_update = device_function(rules.unfactored_update)
adafactor_apply = device_function(rules.adafactor_apply)


@device_function
def load_gradient(row, scalar, SPEC: tl.constexpr, ALIGNED: tl.constexpr):
    """The first argument of `gradient_at`."""
    return load_pointer(row + SPEC.row.grad, SPEC.grad, ALIGNED), tl.load(scalar + SPEC.scalars.factor).to(SPEC.compute)


@device_function
def gradient_at(gradient, at, mask, SPEC: tl.constexpr):
    """The gradient at these offsets, 0 outside of the mask: as it is, and times its factor."""
    pointer, factor = gradient
    raw = tl.load(pointer + at, mask=mask, other=0.0).to(SPEC.compute)
    return raw, raw * factor


@device_function
def scaled_gradient(gradient, at, mask, SPEC: tl.constexpr):
    """The gradient at these offsets times its factor, 0 outside of the mask."""
    _, g = gradient_at(gradient, at, mask, SPEC)
    return g


@device_function
def load_weights(row, SPEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the parameter is, and what completes it; twice the parameter if nothing does."""
    p_at = load_pointer(row + SPEC.row.param, SPEC.param, ALIGNED)
    master_at = p_at
    if SPEC.master is not None:
        master_at = load_pointer(row + SPEC.row.master, SPEC.master, ALIGNED)
    return p_at, master_at


@device_function
def weights_at(weights, at, mask, SPEC: tl.constexpr):
    """The weights at these offsets, 0 outside of the mask."""
    p_at, master_at = weights
    return load_weight(p_at + at, master_at + at, mask, SPEC.master, SPEC.compute, 0.0)


@device_function
def store_squares(row, square_partials, piece, update_squares, param_squares, SPEC: tl.constexpr):
    """Keeps a piece's sums of squares; None for those that another phase keeps."""
    at = square_partials + tl.load(row + SPEC.row.square_partials) + piece
    if update_squares is not None:
        tl.store(at, update_squares.to(tl.float64))
    if param_squares is not None:
        tl.store(at + tl.load(row + SPEC.row.pieces), param_squares.to(tl.float64))


@device_function
def load_step(row, scalar, SPEC: tl.constexpr, ALIGNED: tl.constexpr):
    """The arguments of `store_updated`."""
    return (
        load_weights(row, SPEC, ALIGNED),
        load_pointer(row + SPEC.row.exp_avg, SPEC.exp_avg, ALIGNED),
        tl.load(row + SPEC.row.exp_avg) != 0,
        (
            tl.load(scalar + SPEC.scalars.step_size).to(SPEC.compute),
            tl.load(scalar + SPEC.scalars.one_minus_beta1).to(SPEC.compute),
            tl.load(scalar + SPEC.scalars.decay_step).to(SPEC.compute),
        ),
    )


@device_function
def store_updated(step, scalar, at, index, mask, raw, u, SPEC: tl.constexpr):
    """Averages the update u and takes it off the parameter, at these offsets; returns the measures, if there are any.

    `index`: of the elements in the whole parameter, int64, in the order of contiguous tensors. `raw`: their gradients.
    """
    weights, m_at, averages, scales = step
    step_size, one_minus_beta1, decay_step = scales
    written = mask
    if SPEC.measures is not None:
        written = where_active(mask, tl.load(scalar + SPEC.scalars.active))
    p = weights_at(weights, at, mask, SPEC)
    u *= step_size
    if averages:
        u = running_average(load_moment(m_at + at, mask, SPEC.compute, 0.0), u, one_minus_beta1)
        store_moment(u, m_at + at, written, SPEC.exp_avg)
    words = None
    if SPEC.rounding > 0:
        key0, key1 = load_keys(scalar + SPEC.scalars.keys)
        words = random_words(index.to(tl.uint32), (index >> 32).to(tl.uint32), key0, key1)
    p_at, master_at = weights
    new = adafactor_apply(p, u, decay_step)
    kept = store_weight(new, p_at + at, master_at + at, words, written, SPEC.param, SPEC.master, SPEC.rounding)
    measures = None
    if SPEC.measures is not None:
        measures = measured(raw, p, new, kept, mask, written, SPEC)
    return measures


@device_function
def shard_index(row, index, start, SPEC: tl.constexpr):
    """The index in the whole parameter of elements of a shard; those of a line have the same `start` of their line."""
    if SPEC.sharded:
        length = tl.load(row + SPEC.row.shard_length)
        index = index + start // length * tl.load(row + SPEC.row.shard_gap) + tl.load(row + SPEC.row.shard_offset)
    return index


@device_function
def vector_sums(row, scalar, square_partials, piece, SPEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Brings the average of squares of one block up to date; its sums of squares, update and parameter."""
    at = piece * SPEC.half_block + tl.arange(0, SPEC.half_block)
    mask = at < load_size(row + SPEC.row.numel, ALIGNED)
    # Compared after it is broadcast: the interpreter of triton 3.9 makes a number of a truth value that it broadcasts.
    scaled = tl.broadcast_to(tl.load(scalar + SPEC.scalars.scale_parameter).to(tl.int32), [SPEC.half_block]) != 0
    v_at = load_pointer(row + SPEC.row.exp_avg_sq_row, SPEC.compute, ALIGNED) + at
    g = scaled_gradient(load_gradient(row, scalar, SPEC, ALIGNED), at, mask, SPEC)
    v = tl.load(v_at, mask=mask, other=0.0)
    p = weights_at(load_weights(row, SPEC, ALIGNED), at, mask & scaled, SPEC)
    new = g * g + tl.load(scalar + SPEC.scalars.square_eps).to(SPEC.compute)
    v = running_average(v, new, tl.load(scalar + SPEC.scalars.square_weight).to(SPEC.compute))
    tl.store(v_at, v, mask=mask)
    u = tl.where(mask, unfactored_update(g, v, sqrt_rn, div_rn), 0.0)
    store_squares(row, square_partials, piece, tl.sum(u * u), tl.sum(p * p), SPEC)


@device_function
def vector_apply(row, scalar, partials, piece, SPEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Updates one block."""
    at = piece * SPEC.half_block + tl.arange(0, SPEC.half_block)
    mask = at < load_size(row + SPEC.row.numel, ALIGNED)
    raw, g = gradient_at(load_gradient(row, scalar, SPEC, ALIGNED), at, mask, SPEC)
    v = tl.load(load_pointer(row + SPEC.row.exp_avg_sq_row, SPEC.compute, ALIGNED) + at, mask=mask, other=1.0)
    u = unfactored_update(g, v, sqrt_rn, div_rn)
    index = shard_index(row, at, piece * 0, SPEC)  # a vector is one line
    measures = store_updated(load_step(row, scalar, SPEC, ALIGNED), scalar, at, index, mask, raw, u, SPEC)
    if SPEC.measures is not None:
        store_measures(partials, row, piece, measures, SPEC)


@device_function
def _tile(row, piece, SPEC: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of a matrix: which matrix; first row, row after the last; columns, and which of them exist."""
    tiles_x, tiles_y = tl.load(row + SPEC.row.tiles_x), tl.load(row + SPEC.row.tiles_y)
    first = piece // tiles_x % tiles_y * SPEC.tile_height
    columns = piece % tiles_x * SPEC.tile_width + tl.arange(0, SPEC.tile_width)
    last = tl.minimum(first + SPEC.tile_height, tl.load(row + SPEC.row.height))
    return piece // tiles_x // tiles_y, first, last, columns, columns < load_size(row + SPEC.row.width, ALIGNED)


@device_function
def _some_rows(row, matrix, y, last, columns, inside, SPEC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a tile from y on: their indices, which of them exist, and offsets of their elements, with mask."""
    ys = y + tl.arange(0, ROWS)
    lines = (matrix * tl.load(row + SPEC.row.height) + ys)[:, None]
    at = lines * load_size(row + SPEC.row.width, ALIGNED) + columns[None, :]
    return ys, ys < last, at, (ys < last)[:, None] & inside[None, :]


@device_function
def matrix_sums(row, scalar, partial_sums, square_partials, piece, SPEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Sums of g² over each row and each column of one tile; the parameter's sum of squares."""
    ROWS: tl.constexpr = (SPEC.block if ALIGNED else SPEC.half_block) // SPEC.tile_width
    height, width = tl.load(row + SPEC.row.height), load_size(row + SPEC.row.width, ALIGNED)
    tiles_x, tiles_y = tl.load(row + SPEC.row.tiles_x), tl.load(row + SPEC.row.tiles_y)
    row_sums_at = partial_sums + tl.load(row + SPEC.row.partial_sums)
    column_sums_at = row_sums_at + tl.load(row + SPEC.row.matrices) * tiles_x * height
    row_sums_at += (piece // tiles_x // tiles_y * tiles_x + piece % tiles_x) * height
    column_sums_at += piece // tiles_x * width

    matrix, first, last, columns, inside = _tile(row, piece, SPEC, ALIGNED)
    gradient = load_gradient(row, scalar, SPEC, ALIGNED)
    weights = load_weights(row, SPEC, ALIGNED)
    scaled = tl.load(scalar + SPEC.scalars.scale_parameter).to(tl.int32)
    scaled = tl.broadcast_to(scaled, [ROWS, SPEC.tile_width]) != 0
    column_sums = tl.full([ROWS, SPEC.tile_width], 0.0, SPEC.compute)
    p_squares = tl.full([ROWS, SPEC.tile_width], 0.0, SPEC.compute)
    for y in loop_range(first, last, ROWS):
        ys, exists, at, mask = _some_rows(row, matrix, y, last, columns, inside, SPEC, ALIGNED, ROWS)
        g = scaled_gradient(gradient, at, mask, SPEC)
        p = weights_at(weights, at, mask & scaled, SPEC)
        tl.store(row_sums_at + ys, tl.sum(g * g, axis=1), mask=exists)
        column_sums += g * g
        p_squares += p * p
    tl.store(column_sums_at + columns, tl.sum(column_sums, axis=0), mask=inside)
    store_squares(row, square_partials, piece, None, tl.sum(p_squares), SPEC)


@device_function
def _factors(row, partial_sums, matrix, columns, inside, SPEC: tl.constexpr):
    """For one matrix, what the rows' factors are made of, and the factors of some columns."""
    height = tl.load(row + SPEC.row.height)
    count = tl.load(row + SPEC.row.row_means_count)
    parts = tl.arange(0, SPEC.means)
    sums_at = partial_sums + tl.load(row + SPEC.row.row_means) + matrix * count
    sums = tl.load(sums_at + parts, mask=parts < count, other=0.0)
    row_at = load_pointer(row + SPEC.row.exp_avg_sq_row, SPEC.compute, False) + matrix * height
    col_at = load_pointer(row + SPEC.row.exp_avg_sq_col, SPEC.compute, False) + matrix * tl.load(row + SPEC.row.width)
    col = tl.load(col_at + columns, mask=inside, other=1.0)
    return (
        row_at,
        div_rn(tl.sum(sums), tl.load(row + SPEC.row.whole_height).to(SPEC.compute)),
        column_factor(col, sqrt_rn, div_rn),
    )


@device_function
def matrix_update(
    row, scalar, partial_sums, partials, piece, SPEC: tl.constexpr, ALIGNED: tl.constexpr, APPLY: tl.constexpr
):
    """The sum of squares of the update of one tile, or with APPLY, updates it. Its sums, or measures, go to `partials`.

    The squares are those of the update, not made of g²: that may underflow where the update does not.
    """
    ROWS: tl.constexpr = (SPEC.block if ALIGNED else SPEC.half_block) // SPEC.tile_width
    matrix, first, last, columns, inside = _tile(row, piece, SPEC, ALIGNED)
    gradient = load_gradient(row, scalar, SPEC, ALIGNED)
    step = load_step(row, scalar, SPEC, ALIGNED)
    row_at, row_mean, column_factors = _factors(row, partial_sums, matrix, columns, inside, SPEC)
    u_squares = tl.full([ROWS, SPEC.tile_width], 0.0, SPEC.compute)
    measures = no_measures()
    for y in loop_range(first, last, ROWS):
        ys, exists, at, mask = _some_rows(row, matrix, y, last, columns, inside, SPEC, ALIGNED, ROWS)
        raw, g = gradient_at(gradient, at, mask, SPEC)
        row_factors = row_factor(tl.load(row_at + ys, mask=exists, other=1.0), row_mean, sqrt_rn, div_rn)
        u = factored_update(g, row_factors[:, None], column_factors[None, :])
        if APPLY:
            lines = matrix * tl.load(row + SPEC.row.height) + ys
            index = shard_index(row, at, (lines * tl.load(row + SPEC.row.width))[:, None], SPEC)
            of_rows = store_updated(step, scalar, at, index, mask, raw, u, SPEC)
            if SPEC.measures is not None:
                measures = added(measures, of_rows, SPEC)
        else:
            u = tl.where(mask, u, 0.0)
            u_squares += u * u
    if not APPLY:
        store_squares(row, partials, piece, tl.sum(u_squares), None, SPEC)
    elif SPEC.measures is not None:
        store_measures(partials, row, piece, measures, SPEC)
