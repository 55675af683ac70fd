"""Adafactor's numbers: the recorded runs, the rules, and gradients and tensors of every kind."""

import copy
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers.adafactor import (
    GOLDEN,
    HARD_GRADIENTS,
    LAYOUTS,
    after,
    by_the_rules,
    normal,
    parameters,
    run,
    uses_rms,
)
from helpers.comparing import Tolerance, assert_near, assert_same
from helpers.golden import assert_close, replay
from hypothesis import given, settings

from fusedopt.adafactor import Adafactor
from fusedopt.backends.eager.adafactor import stepper, tiles, update
from fusedopt.backends.scratch import scratch
from fusedopt.reference import ReferenceAdafactor

BACKENDS = ["eager"]
PATHS = {
    "stacked": {"SMALL": 1 << 40},
    "tiled": {"SMALL": 0},
    "tiles_of_20": {"SMALL": 0, "TILE": 20},
    "tiles_of_1": {"SMALL": 0, "TILE": 1},
}
"""Constants of the eager backend that send small tensors through each of its paths, and across borders of tiles."""


@pytest.fixture
def path(monkeypatch, request):
    for name, value in PATHS[request.param].items():
        for module in (stepper, tiles, update):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


every_path = pytest.mark.parametrize("path", PATHS, indirect=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden(case, backend):
    records = replay(
        case,
        lambda groups, **kwargs: Adafactor(groups, backend=backend, **kwargs),
        observe=lambda optimizer, params: [optimizer.effective_lr(p, before=None) for p in params],
    )
    assert_close(case, records, skip_state=() if uses_rms(case) else ("RMS",))
    assert [group["lr"] for group in records.optimizer.param_groups] == case.raw["group_lr_at_end"]
    if case.finite and case.lr_per_step is None:
        for rates, expected in zip(records.observed, case.raw["lr_effective"]):
            # The RMS of 16-bit parameters is one of rounded numbers.
            assert rates == [None if e is None else pytest.approx(e, rel=1e-5) for e in expected]


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path == "tiles_of_1")) for path in PATHS], indirect=True
)
@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_on_every_path_of_the_eager_backend(case, path):
    assert_close(case, replay(case, Adafactor), skip_state=() if uses_rms(case) else ("RMS",))


# The rules, on numpy: what both backends are built from.


OPTIONS = [
    {},
    {"beta1": 0.9},
    {"weight_decay": 0.1},
    {"maximize": True, "beta1": 0.5, "weight_decay": 0.1},
    {"lr": 0.1},
    {"clip_threshold": 0.1},
    {"clip_threshold": math.inf},
]
SHAPES = [(3, 4), (5,), (), (0,), (2, 0), (2, 3, 4), (5, 1), (1, 6), (2, 3, 2, 2), (30, 15), (1, 70), (70,)]


@pytest.mark.parametrize("backend", BACKENDS)
@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_optimizer_does_what_the_rules_say(options, dtype, path, backend):
    start = normal(*SHAPES, dtype=dtype)
    steps = [normal(*SHAPES, seed=k, dtype=dtype) for k in (1, 2, 3)]
    exact = [p.double().numpy() for p in start]
    states = [{} for _ in start]
    for k, grads in enumerate(steps, start=1):
        for i, g in enumerate(grads):
            if g.numel():
                exact[i] = np.asarray(by_the_rules(exact[i], g.double().numpy(), states[i], k, **options))
                if dtype.itemsize == 2:
                    exact[i] = torch.from_numpy(exact[i]).to(dtype).double().numpy()
    ours, _ = after(Adafactor, start, steps, relative_step="lr" not in options, backend=backend, **options)
    tolerance = {
        torch.float64: Tolerance("the same formula", rtol=1e-12, atol=1e-14),
        torch.float32: Tolerance("a few roundings per step, three steps", rtol=1e-6, atol=1e-6),
    }.get(dtype, Tolerance("rounded once per step, but a tie may fall to the other side", ulps=1))
    for actual, expected in zip(ours, exact):
        assert_near(actual, torch.from_numpy(expected).to(dtype), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@every_path
def test_a_decay_of_less_than_half_a_unit_counts(path, backend):
    """1.5 - (3e-8 + 4e-8) is the next number below 1.5; 1 - 2e-8 would be 1, and 1.5 - 4e-8 would be 1.5."""
    start, grads = [torch.full((4, 6), 1.5), torch.full((9,), 1.5)], [torch.ones(4, 6), torch.ones(9)]
    options = {"lr": 4e-8, "weight_decay": 0.5, "relative_step": False, "scale_parameter": False}
    ours, _ = after(Adafactor, start, [grads], backend=backend, **options)
    assert all((p == np.nextafter(np.float32(1.5), np.float32(0.0))).all() for p in ours)


# Transposition and layout.


@every_path
@pytest.mark.parametrize("shape", [(12, 5), (1, 9), (40, 33)], ids=str)
def test_a_matrix_and_its_transpose_agree(shape, path):
    (w,), steps = normal(shape), [normal(shape, seed=k) for k in (1, 2, 3)]
    options = {"weight_decay": 0.1, "beta1": 0.9}
    (ours,), _ = after(Adafactor, [w], steps, **options)
    (turned,), _ = after(Adafactor, [w.t().contiguous()], [[g.t().contiguous()] for (g,) in steps], **options)
    # The factors of rows and of columns change places, and with them the order of roundings.
    assert_near(ours, turned.t(), rtol=2e-6, atol=2e-6)


@every_path
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_layouts_give_the_same_numbers(of_parameter, of_gradient, path):
    shape = (4, 3, 5, 2)
    (w,), steps = normal(shape), [normal(shape, seed=k) for k in (1, 2)]
    (expected,), _ = after(Adafactor, [w], steps, beta1=0.9)
    p = torch.nn.Parameter(LAYOUTS[of_parameter](w.clone()))
    strides = p.stride()
    optimizer = Adafactor([p], beta1=0.9)
    run(optimizer, [[LAYOUTS[of_gradient](g)] for (g,) in steps])
    assert_near(p.detach(), expected, rtol=1e-6, atol=1e-6)
    assert p.stride() == strides
    assert optimizer.state[p]["exp_avg"].shape == p.shape


def test_a_matrix_that_is_a_slice_leaves_its_neighbours_alone():
    storage = torch.full((40, 50), 5.0)
    p = torch.nn.Parameter(storage[5:35, 10:40])
    run(Adafactor([p]), [normal(p.shape)])
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[5:35, 10:40] = True
    assert ((storage != 5.0) == inside).all()


# Gradients of every size. Where the original stays finite, so do we, at the same numbers.


@pytest.mark.parametrize("backend", BACKENDS)
@every_path
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("kind", HARD_GRADIENTS)
def test_hard_gradients_do_what_they_do_in_the_original(kind, options, path, backend):
    shapes = [(6,), (9, 4), (2, 5, 3)]
    start = normal(*shapes)
    steps = [normal(*shapes, seed=k) for k in range(1, 5)]
    steps[1] = [HARD_GRADIENTS[kind](g) for g in steps[1]]
    ours, states = after(Adafactor, start, steps, backend=backend, **options)
    theirs, original = after(ReferenceAdafactor, start, steps, **options)
    for p, q, s, t in zip(ours, theirs, states, original):
        assert_near(p, q, rtol=2e-5, atol=2e-6, equal_nan=True)
        for name in t.keys() - {"step"}:
            expected = torch.as_tensor(t[name])
            # Sums of products that may nearly cancel: relative to the largest.
            atol = 5e-5 * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
            assert_near(s[name], expected, rtol=5e-5, atol=atol, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@every_path
def test_a_parameter_with_nan_moves_at_the_smallest_rate(path, backend):
    """Its root mean square is NaN, and counts as eps[1], as in the original."""
    start, grads = normal((6, 5), (7,)), normal((6, 5), (7,), seed=1)
    for p in start:
        p.view(-1)[3] = math.nan
    ours, _ = after(Adafactor, start, [grads], backend=backend)
    theirs, _ = after(ReferenceAdafactor, start, [grads])
    for p, q in zip(ours, theirs):
        assert p.isnan().sum() == 1
        assert_near(p, q, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@every_path
@pytest.mark.parametrize(("large", "small"), [(1.0, 1e-23), (1e9, 3e-38)], ids=str)
def test_the_mean_square_of_an_update_whose_squares_underflow(large, small, path, backend):
    """Two blocks on the diagonal; the small one's updates are the largest, and their squares on the way there are 0.

    In float32, those of a gradient of 1e-23 are, and those of 3e-38 even where its column factor, 1e15, comes first.
    """
    g = torch.zeros(32, 32)
    g[:16, :16], g[16:, 16:] = large * normal((16, 16))[0], small * normal((16, 16), seed=1)[0]
    (w,) = normal((32, 32), seed=2)
    (ours,), _ = after(Adafactor, [w], [[g]], backend=backend)
    expected = by_the_rules(w.double().numpy(), g.double().numpy(), {}, 1)
    assert_near(ours.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)
    changed = (ours - w)[16:, 16:].double()
    # Clipping has brought the whole update to RMS 1, and nearly all of it is in this block.
    rate = 0.01 * w.double().square().mean().sqrt()
    assert float((changed.square().sum() / g.numel()).sqrt() / rate) == pytest.approx(1.0, rel=0.05)


def test_optimizers_share_the_memory_that_tiles_are_worked_on_in():
    """A step in backward has a stepper for every parameter: with memory of their own they would hold megabytes each."""

    def held(number):
        for _ in range(number):
            p = torch.nn.Parameter(torch.ones(300, 400, dtype=torch.bfloat16))
            Adafactor([p], backend="eager").apply_gradients([(torch.ones_like(p), p)])
        return sum(flat.nbytes for flat in scratch._flat.values())

    assert held(1) == held(3) > 0


def test_the_root_mean_square_of_a_large_parameter_in_any_layout():
    """Added up in float32 one after the other, it would be off by 1e-4."""
    w = normal((512, 256, 3, 3))[0].contiguous(memory_format=torch.channels_last)
    p = torch.nn.Parameter(w.clone())
    optimizer = Adafactor([p], backend="eager")
    optimizer.apply_gradients([(torch.ones_like(p), p)])
    assert optimizer.state[p]["RMS"].item() == pytest.approx(w.double().square().mean().sqrt().item(), rel=1e-6)


@every_path
def test_factors_whose_product_overflows_leave_a_zero_gradient_at_zero(path):
    """A departure: the original multiplies the factors first, and inf * 0 makes the parameter NaN."""
    g = torch.zeros(4, 4)
    g[:2, :2] = 1e10 * torch.ones(2, 2)
    start = normal((4, 4))
    (ours,), _ = after(Adafactor, start, [[g]])
    (theirs,), _ = after(ReferenceAdafactor, start, [[g]])
    assert ours.isfinite().all()
    assert_same(ours[2:], start[0][2:])
    assert theirs.isnan().any()


# Independence and determinism.

FLOATS = [torch.float32, torch.bfloat16, torch.float64]
small_shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.tuples(small_shapes, st.sampled_from(FLOATS)), min_size=2, max_size=6),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_a_tensor_neither_sees_its_neighbours_nor_their_order_or_dtype(entries, repeats, random):
    entries = entries * repeats
    random.shuffle(entries)
    start = [normal(shape, seed=i, dtype=dtype)[0] for i, (shape, dtype) in enumerate(entries)]
    steps = [[normal(shape, seed=i + k, dtype=d)[0] for i, (shape, d) in enumerate(entries)] for k in (100, 200)]
    together, states = after(Adafactor, start, steps, beta1=0.9)
    for i in {0, len(entries) // 2, len(entries) - 1}:
        (alone,), (state,) = after(Adafactor, start[i : i + 1], [grads[i : i + 1] for grads in steps], beta1=0.9)
        assert_same(alone, together[i])
        assert_same(state, states[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend):
    shapes = [(700, 600), (40_000,), (30, 30), (17,)]
    start, steps = normal(*shapes), [normal(*shapes, seed=k) for k in (1, 2)]
    one, other = (after(Adafactor, start, steps, beta1=0.9, backend=backend) for _ in range(2))
    assert_same(one[0], other[0])
    assert_same(one[1], other[1])


def test_a_large_matrix_is_as_exact_as_its_rules():
    """Several tiles, and sums over many elements."""
    shape = (800, 400)
    (w,), steps = normal(shape, size=0.02), [normal(shape, seed=k, size=1e-3) for k in (1, 2)]
    (ours,), _ = after(Adafactor, [w], steps, weight_decay=0.1)
    exact, state = w.double().numpy(), {}
    for k, (g,) in enumerate(steps, start=1):
        exact = by_the_rules(exact, g.double().numpy(), state, k, weight_decay=0.1)
    moved = np.abs(exact - w.double().numpy()).max()
    assert np.abs(ours.double().numpy() - exact).max() < 1e-5 * moved


# Scaled, skipped and given gradients.


@every_path
def test_gradients_that_are_given_with_a_scale(path):
    start, steps = normal((6, 5), (7,)), [normal((6, 5), (7,), seed=k) for k in (1, 2)]
    expected, _ = after(Adafactor, start, steps, eps=(1e-3, 1e-3))
    params = parameters(start)
    optimizer = Adafactor(params, eps=(1e-3, 1e-3))
    for grads in steps:
        optimizer.apply_gradients([(4.0 * g, p) for p, g in zip(params, grads)], scale=0.25)
    assert_same(params, expected)


@every_path
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_the_numbers_of_a_grad_scaler(found, path):
    """`grad_scale` divides the gradients on their way in; with `found_inf` nothing changes, the counts included."""
    start, (grads,) = normal((6, 5), (7,)), [normal((6, 5), (7,), seed=1)]
    (params, theirs) = parameters(start), parameters(start)
    optimizer, plain = Adafactor(params, eps=(1e-3, 1e-3)), Adafactor(theirs, eps=(1e-3, 1e-3))
    run(optimizer, [grads])
    run(plain, [grads])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([8.0]), torch.tensor([found])
    run(optimizer, [[8.0 * g for g in grads]])
    if found:
        assert_same(optimizer.state_dict()["state"], before)
    else:
        run(plain, [grads])
    assert_same(params, theirs)


@every_path
def test_gradients_of_another_dtype(path):
    start, steps = normal((30, 20), (7,)), [normal((30, 20), (7,), seed=k, dtype=torch.bfloat16) for k in (1, 2)]
    expected, _ = after(Adafactor, start, [[g.float() for g in grads] for grads in steps])
    for dtype in (torch.bfloat16, torch.float64):
        params = parameters(start)
        optimizer = Adafactor(params)
        for grads in steps:
            optimizer.apply_gradients([(g.to(dtype), p) for p, g in zip(params, grads)])
        assert_same(params, expected)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)])
def test_a_rate_may_be_a_tensor(lr):
    start, steps = normal((6, 5), (7,)), [normal((6, 5), (7,), seed=k) for k in (1, 2)]
    options = {"relative_step": False, "weight_decay": 0.1}
    expected, _ = after(Adafactor, start, steps, lr=0.1, **options)
    ours, _ = after(Adafactor, start, steps, lr=lr, **options)
    assert_near(ours, expected, rtol=1e-6, atol=1e-7)


def test_averages_that_somebody_keeps_in_16_bits_are_averaged_too():
    """Tiles work in numpy, which has no bfloat16: such a parameter goes another way."""
    p = torch.nn.Parameter(normal((300, 200))[0])
    optimizer = Adafactor([p], backend="eager")
    for k in (1, 2):
        before = p.detach().clone()
        (p.grad,) = normal((300, 200), seed=k)
        optimizer.step()
        optimizer.state[p]["exp_avg_sq_row"] = optimizer.state[p]["exp_avg_sq_row"].bfloat16()
        assert p.isfinite().all() and not torch.equal(p, before)
