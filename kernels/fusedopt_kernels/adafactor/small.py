# mypy: allow-untyped-defs
"""Adafactor on some of a tensor's small matrices. `SPEC` is a `plan.Spec`.

A line is a row, or a column, of one matrix. Lines are numbered as they lie in memory; a program has a block of them in
hand and walks along them in strips. So what is read at once lies close together, channels_last or not, a line is summed
by one program, and one kernel serves all sizes. Offsets are int32, from the first matrix on: a matrix is small, and
divisions of int64 are slow.
"""

import triton.language as tl

from fusedopt_kernels.adafactor.tiles import (
    column_factor,
    factored_update,
    gradient_at,
    load_gradient,
    load_step,
    load_weights,
    row_factor,
    running_average,
    scaled_gradient,
    store_squares,
    store_updated,
    weights_at,
)
from fusedopt_kernels.device import device_function, div_rn, load_pointer, loop_range, sqrt_rn
from fusedopt_kernels.statistics import added, no_measures, store_measures


@device_function
def _sides(row, SPEC: tl.constexpr):
    """Height, width and inner size."""
    return (
        tl.load(row + SPEC.row.height).to(tl.int32),
        tl.load(row + SPEC.row.width).to(tl.int32),
        tl.load(row + SPEC.row.inner).to(tl.int32),
    )


@device_function
def _share(row, piece, length, SPEC: tl.constexpr):
    """The first line of a piece of a tensor whose lines have `length` elements, and the line after its last."""
    lines, pieces = tl.load(row + SPEC.row.numel) // length, tl.load(row + SPEC.row.pieces)
    return lines * piece // pieces, lines * (piece + 1) // pieces


@device_function
def _lines(line, last, lines, inner, SPEC: tl.constexpr):
    """Of lines from `line` on, `lines` per matrix: the first outer index; how far each one's is from it, its index in
    the matrix, its inner index, and whether it is < last."""
    outer = line // (lines * inner)
    local = (line - outer * (lines * inner)).to(tl.int32) + tl.arange(0, SPEC.lines)
    above = local // inner
    return outer, above // lines, above % lines, local % inner, line + tl.arange(0, SPEC.lines) < last


@device_function
def _strip(start, length, at, stride, mask, SPEC: tl.constexpr):
    """A strip of lines that begin at the offsets `at`, from `start` on: offsets, with mask."""
    along = start + tl.arange(0, SPEC.strip)
    return at[:, None] + (along * stride)[None, :], mask[:, None] & (along < length)[None, :]


@device_function
def _averaged(scalar, gradient, at, length, stride, average_at, mask, SPEC: tl.constexpr):
    """Brings the averages of squares of some lines up to date."""
    squares = tl.full([SPEC.lines, SPEC.strip], 0.0, SPEC.compute)
    for start in loop_range(0, length, SPEC.strip):
        offsets, inside = _strip(start, length, at, stride, mask, SPEC)
        g = scaled_gradient(gradient, offsets, inside, SPEC)
        squares += g * g
    new = div_rn(tl.sum(squares, axis=1), length.to(SPEC.compute)) + tl.load(scalar + SPEC.scalars.square_eps).to(
        SPEC.compute
    )
    average = tl.load(average_at, mask=mask, other=0.0)
    average = running_average(average, new, tl.load(scalar + SPEC.scalars.square_weight).to(SPEC.compute))
    tl.debug_barrier()  # There are fewer lines than threads: more than one of them has read what one now writes.
    tl.store(average_at, average, mask=mask)


@device_function
def small_sums(row, scalar, square_partials, piece, SPEC: tl.constexpr):
    """Brings the averages of some rows and columns up to date; the parameter's sum of squares."""
    height, width, inner = _sides(row, SPEC)
    g_at, factor = load_gradient(row, scalar, SPEC, False)
    p_at, master_at = load_weights(row, SPEC, False)
    row_at = load_pointer(row + SPEC.row.exp_avg_sq_row, SPEC.compute, False)
    col_at = load_pointer(row + SPEC.row.exp_avg_sq_col, SPEC.compute, False)
    scaled = tl.broadcast_to(tl.load(scalar + SPEC.scalars.scale_parameter).to(tl.int32), [SPEC.lines]) != 0
    p_squares = tl.full([SPEC.lines, SPEC.strip], 0.0, SPEC.compute)

    first, last = _share(row, piece, width, SPEC)
    for line in loop_range(first, last, SPEC.lines):
        start, outer, y, i, mask = _lines(line, last, height, inner, SPEC)
        at = (outer * height + y) * width * inner + i
        above = start * (height * width * inner)
        average_at = row_at + start * (inner * height) + (outer * inner + i) * height + y
        _averaged(scalar, (g_at + above, factor), at, width, inner, average_at, mask, SPEC)
        for x in loop_range(0, width, SPEC.strip):
            offsets, inside = _strip(x, width, at, inner, mask & scaled, SPEC)
            p = weights_at((p_at + above, master_at + above), offsets, inside, SPEC)
            p_squares += p * p
    store_squares(row, square_partials, piece, None, tl.sum(p_squares), SPEC)

    first, last = _share(row, piece, height, SPEC)
    for line in loop_range(first, last, SPEC.lines):
        start, outer, x, i, mask = _lines(line, last, width, inner, SPEC)
        at = (outer * height * width + x) * inner + i
        above = start * (height * width * inner)
        average_at = col_at + start * (inner * width) + (outer * inner + i) * width + x
        _averaged(scalar, (g_at + above, factor), at, height, width * inner, average_at, mask, SPEC)


@device_function
def _row_factors(row_at, matrix, y, mask, height, SPEC: tl.constexpr):
    """The factor of row y of each matrix."""
    sums = tl.full([SPEC.lines, SPEC.strip], 0.0, SPEC.compute)
    for start in loop_range(0, height, SPEC.strip):
        offsets, inside = _strip(start, height, matrix * height, 1, mask, SPEC)
        sums += tl.load(row_at + offsets, mask=inside, other=0.0)
    average = tl.load(row_at + matrix * height + y, mask=mask, other=1.0)
    return row_factor(average, div_rn(tl.sum(sums, axis=1), height.to(SPEC.compute)), sqrt_rn, div_rn)


@device_function
def small_update(row, scalar, partials, piece, SPEC: tl.constexpr, APPLY: tl.constexpr):
    """The sum of squares of the update of some rows, or with APPLY, updates them; its sums go to `partials`."""
    height, width, inner = _sides(row, SPEC)
    g_at, factor = load_gradient(row, scalar, SPEC, False)
    row_at = load_pointer(row + SPEC.row.exp_avg_sq_row, SPEC.compute, False)
    col_at = load_pointer(row + SPEC.row.exp_avg_sq_col, SPEC.compute, False)
    weights, m_at, averages, scales = load_step(row, scalar, SPEC, False)
    p_at, master_at = weights
    u_squares = tl.full([SPEC.lines, SPEC.strip], 0.0, SPEC.compute)
    measures = no_measures()
    first, last = _share(row, piece, width, SPEC)
    for line in loop_range(first, last, SPEC.lines):
        start, outer, y, i, mask = _lines(line, last, height, inner, SPEC)
        above = start * (height * width * inner)
        matrix = outer * inner + i
        row_factors = _row_factors(row_at + start * (inner * height), matrix, y, mask, height, SPEC)
        for x in loop_range(0, width, SPEC.strip):
            cols, inside = _strip(x, width, matrix * width, 1, mask, SPEC)
            col = tl.load(col_at + start * (inner * width) + cols, mask=inside, other=1.0)
            at, _ = _strip(x, width, (outer * height + y) * width * inner + i, inner, mask, SPEC)
            raw, g = gradient_at((g_at + above, factor), at, inside, SPEC)
            u = factored_update(g, row_factors[:, None], column_factor(col, sqrt_rn, div_rn))
            if APPLY:
                index = start * (inner * height * width) + (cols + (matrix * height + y - matrix)[:, None] * width)
                step = (p_at + above, master_at + above), m_at + above, averages, scales
                of_strip = store_updated(step, scalar, at, index, inside, raw, u, SPEC)
                if SPEC.measures is not None:
                    measures = added(measures, of_strip, SPEC)
            else:
                u = tl.where(inside, u, 0.0)
                u_squares += u * u
    if not APPLY:
        store_squares(row, partials, piece, tl.sum(u_squares), None, SPEC)
    elif SPEC.measures is not None:
        store_measures(partials, row, piece, measures, SPEC)
