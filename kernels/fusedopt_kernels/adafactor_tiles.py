# mypy: allow-untyped-defs
"""Adafactor on one piece of a vector, or of matrices. `SPEC` is an `adafactor_plan.Spec`."""

import triton.language as tl

from fusedopt_kernels import adafactor_cells as cell
from fusedopt_kernels import rules
from fusedopt_kernels.device import device_function, div_rn, load_pointer, load_size, narrow, sqrt_rn, walk

running_average = device_function(rules.running_average)
row_factor = device_function(rules.row_factor)
column_factor = device_function(rules.column_factor)
factored_update = device_function(rules.factored_update)
unfactored_update = device_function(rules.unfactored_update)
adafactor_apply = device_function(rules.adafactor_apply)


@device_function
def load_gradient(row, scalar, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """What `scaled_gradient` reads from."""
    return load_pointer(row + cell.GRAD, SPEC.grad, EVEN), tl.load(scalar + cell.FACTOR).to(SPEC.compute)


@device_function
def scaled_gradient(gradient, at, mask, SPEC: tl.constexpr):
    """The gradient at these offsets, 0 outside of the mask."""
    pointer, factor = gradient
    return tl.load(pointer + at, mask=mask, other=0.0).to(SPEC.compute) * factor


@device_function
def store_squares(row, kept, piece, of_update, of_parameter):
    """Keeps a piece's sums of squares; None for those that another phase keeps."""
    at = kept + tl.load(row + cell.SQUARES) + piece
    if of_update is not None:
        tl.store(at, of_update.to(tl.float64))
    if of_parameter is not None:
        tl.store(at + tl.load(row + cell.PIECES), of_parameter.to(tl.float64))


@device_function
def load_step(row, scalar, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """What `store_updated` works with."""
    return (
        load_pointer(row + cell.PARAM, SPEC.param, EVEN),
        load_pointer(row + cell.EXP_AVG, SPEC.compute, EVEN),
        tl.load(row + cell.EXP_AVG) != 0,
        (
            tl.load(scalar + cell.STEP_SIZE).to(SPEC.compute),
            tl.load(scalar + cell.OWN_WEIGHT).to(SPEC.compute),
            tl.load(scalar + cell.SHRINK).to(SPEC.compute),
        ),
    )


@device_function
def store_updated(step, at, mask, u, SPEC: tl.constexpr):
    """Averages the update u and takes it off the parameter, at these offsets."""
    p_at, m_at, averages, scales = step
    step_size, own_weight, shrink = scales
    p = tl.load(p_at + at, mask=mask, other=0.0).to(SPEC.compute)
    u *= step_size
    if averages:
        u = running_average(tl.load(m_at + at, mask=mask, other=0.0), u, own_weight)
        tl.store(m_at + at, u, mask=mask)
    tl.store(p_at + at, narrow(adafactor_apply(p, u, shrink), SPEC.param), mask=mask)


@device_function
def vector_sums(row, scalar, kept, piece, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """Brings the average of squares of one block up to date; its sums of squares, update and parameter."""
    at = piece * SPEC.half_block + tl.arange(0, SPEC.half_block)
    mask = at < load_size(row + cell.NUMEL, EVEN)
    # Compared after it is broadcast: the interpreter of triton 3.9 makes a number of a truth value that it broadcasts.
    scaled = tl.broadcast_to(tl.load(scalar + cell.SCALED).to(tl.int32), [SPEC.half_block]) != 0
    v_at = load_pointer(row + cell.ROW, SPEC.compute, EVEN) + at
    g = scaled_gradient(load_gradient(row, scalar, SPEC, EVEN), at, mask, SPEC)
    v = tl.load(v_at, mask=mask, other=0.0)
    p_at = load_pointer(row + cell.PARAM, SPEC.param, EVEN) + at
    p = tl.load(p_at, mask=mask & scaled, other=0.0).to(SPEC.compute)
    new = g * g + tl.load(scalar + cell.ADDED).to(SPEC.compute)
    v = running_average(v, new, tl.load(scalar + cell.SQUARE_WEIGHT).to(SPEC.compute))
    tl.store(v_at, v, mask=mask)
    u = tl.where(mask, unfactored_update(g, v, sqrt_rn, div_rn), 0.0)
    store_squares(row, kept, piece, tl.sum(u * u), tl.sum(p * p))


@device_function
def vector_apply(row, scalar, piece, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """Updates one block."""
    at = piece * SPEC.half_block + tl.arange(0, SPEC.half_block)
    mask = at < load_size(row + cell.NUMEL, EVEN)
    g = scaled_gradient(load_gradient(row, scalar, SPEC, EVEN), at, mask, SPEC)
    v = tl.load(load_pointer(row + cell.ROW, SPEC.compute, EVEN) + at, mask=mask, other=1.0)
    u = unfactored_update(g, v, sqrt_rn, div_rn)
    store_updated(load_step(row, scalar, SPEC, EVEN), at, mask, u, SPEC)


@device_function
def _tile(row, piece, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a matrix: which matrix; first row, row behind the last; columns, and which of them exist."""
    across, down = tl.load(row + cell.ACROSS), tl.load(row + cell.DOWN)
    first = piece // across % down * SPEC.tile_height
    columns = piece % across * SPEC.tile_width + tl.arange(0, SPEC.tile_width)
    last = tl.minimum(first + SPEC.tile_height, tl.load(row + cell.HEIGHT))
    return piece // across // down, first, last, columns, columns < load_size(row + cell.WIDTH, EVEN)


@device_function
def _some_rows(row, matrix, y, last, columns, inside, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """Of the rows of a tile from y on: which, which of them exist, and the offsets of their elements, with mask."""
    ys = y + tl.arange(0, ROWS)
    lines = (matrix * tl.load(row + cell.HEIGHT) + ys)[:, None]
    at = lines * load_size(row + cell.WIDTH, EVEN) + columns[None, :]
    return ys, ys < last, at, (ys < last)[:, None] & inside[None, :]


@device_function
def matrix_sums(row, scalar, work, kept, piece, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """Sums of g² over each row and each column of one tile; the parameter's sum of squares."""
    ROWS: tl.constexpr = (SPEC.block if EVEN else SPEC.half_block) // SPEC.tile_width
    height, width = tl.load(row + cell.HEIGHT), load_size(row + cell.WIDTH, EVEN)
    across, down = tl.load(row + cell.ACROSS), tl.load(row + cell.DOWN)
    of_rows = work + tl.load(row + cell.SUMS) + (piece // across // down * across + piece % across) * height
    of_columns = work + tl.load(row + cell.SUMS) + tl.load(row + cell.MATRICES) * across * height
    of_columns += piece // across * width

    matrix, first, last, columns, inside = _tile(row, piece, SPEC, EVEN)
    gradient = load_gradient(row, scalar, SPEC, EVEN)
    p_at = load_pointer(row + cell.PARAM, SPEC.param, EVEN)
    scaled = tl.broadcast_to(tl.load(scalar + cell.SCALED).to(tl.int32), [ROWS, SPEC.tile_width]) != 0
    column_sums = tl.full([ROWS, SPEC.tile_width], 0.0, SPEC.compute)
    p_squares = tl.full([ROWS, SPEC.tile_width], 0.0, SPEC.compute)
    for y in walk(first, last, ROWS):
        ys, exists, at, mask = _some_rows(row, matrix, y, last, columns, inside, EVEN, ROWS)
        g = scaled_gradient(gradient, at, mask, SPEC)
        p = tl.load(p_at + at, mask=mask & scaled, other=0.0).to(SPEC.compute)
        tl.store(of_rows + ys, tl.sum(g * g, axis=1), mask=exists)
        column_sums += g * g
        p_squares += p * p
    tl.store(of_columns + columns, tl.sum(column_sums, axis=0), mask=inside)
    store_squares(row, kept, piece, None, tl.sum(p_squares))


@device_function
def _factors(row, work, matrix, columns, inside, SPEC: tl.constexpr):
    """For one matrix, what the rows' factors are made of, and the factors of some columns."""
    height = tl.load(row + cell.HEIGHT)
    count = tl.load(row + cell.ROW_MEANS_COUNT)
    parts = tl.arange(0, SPEC.means)
    sums = tl.load(work + tl.load(row + cell.ROW_MEANS) + matrix * count + parts, mask=parts < count, other=0.0)
    row_at = load_pointer(row + cell.ROW, SPEC.compute, False) + matrix * height
    col_at = load_pointer(row + cell.COL, SPEC.compute, False) + matrix * tl.load(row + cell.WIDTH)
    col = tl.load(col_at + columns, mask=inside, other=1.0)
    return (
        row_at,
        div_rn(tl.sum(sums), tl.load(row + cell.WHOLE_HEIGHT).to(SPEC.compute)),
        column_factor(col, sqrt_rn, div_rn),
    )


@device_function
def matrix_update(row, scalar, work, kept, piece, SPEC: tl.constexpr, EVEN: tl.constexpr, APPLY: tl.constexpr):
    """The sum of squares of the update of one tile, or with APPLY, updates it.

    The squares are those of the update, not made of g²: that may underflow where the update does not.
    """
    ROWS: tl.constexpr = (SPEC.block if EVEN else SPEC.half_block) // SPEC.tile_width
    matrix, first, last, columns, inside = _tile(row, piece, SPEC, EVEN)
    gradient = load_gradient(row, scalar, SPEC, EVEN)
    step = load_step(row, scalar, SPEC, EVEN)
    row_at, row_mean, of_column = _factors(row, work, matrix, columns, inside, SPEC)
    u_squares = tl.full([ROWS, SPEC.tile_width], 0.0, SPEC.compute)
    for y in walk(first, last, ROWS):
        ys, exists, at, mask = _some_rows(row, matrix, y, last, columns, inside, EVEN, ROWS)
        g = scaled_gradient(gradient, at, mask, SPEC)
        of_row = row_factor(tl.load(row_at + ys, mask=exists, other=1.0), row_mean, sqrt_rn, div_rn)
        u = factored_update(g, of_row[:, None], of_column[None, :])
        if APPLY:
            store_updated(step, at, mask, u, SPEC)
        else:
            u = tl.where(mask, u, 0.0)
            u_squares += u * u
    if not APPLY:
        store_squares(row, kept, piece, tl.sum(u_squares), None)
