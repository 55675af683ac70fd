"""The Triton Adafactor's numbers: the recorded runs and the rules, across all borders between its programs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.adafactor import (
    GOLDEN,
    HARD_GRADIENTS,
    LAYOUTS,
    TritonAdafactor,
    after,
    by_the_rules,
    normal,
    parameters,
    run,
    uses_rms,
)
from helpers.comparing import Tolerance, assert_near, assert_same
from helpers.golden import assert_close, replay
from helpers.kernels import TINY, set_constants

from fusedopt.reference import ReferenceAdafactor
from fusedopt_kernels import rules
from fusedopt_kernels.adafactor.layout import SCALARS

PLACES = SCALARS.places

# The interpreter computes with numpy, which warns about what it is given here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ONE_PROGRAM = {"LINES": 16, "STRIP": 16, "SHARE": 256}
CUTS = {"as on a GPU": {}, "small matrices in pieces": TINY, "tiles of 4 columns": {**TINY, "SMALL_SIDE": 2}}
"""Constants that send tensors of a few elements through every kind of piece, and across borders of pieces."""


@pytest.fixture
def cut(monkeypatch, request):
    set_constants(monkeypatch, CUTS[request.param])


every_cut = pytest.mark.parametrize("cut", CUTS, indirect=True)


IN_FULL = ("grad_none", "lr_schedule", "bfloat16_manual")


def shortened(case, device):
    """The first two steps alone, where the interpreter runs them: it takes a quarter of a second per step."""
    if device.type == "cuda" or case.name in IN_FULL:
        return case
    return dataclasses.replace(case, steps=2, record_steps=(1, 2))


# A case of each dtype, of each state, and of each kind of number; rates and weights are scalars of the same kernels.
IN_EVERY_RUN = {
    *("defaults", "kitchen_sink", "overflow", "eps0_zero_zero_grads"),
    *("float64_defaults", "bfloat16_defaults", "float16_manual"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (case.name not in IN_EVERY_RUN)) for case in GOLDEN],
)
def test_golden(case, device, monkeypatch):
    if device.type == "cpu":
        set_constants(monkeypatch, ONE_PROGRAM)
    short = shortened(case, device)
    records = replay(short, TritonAdafactor, device=device)
    if short.steps == case.steps:
        assert_close(short, records, skip_state=() if uses_rms(case) else ("RMS",))
    else:
        # The recorded states are those of the end.
        recorded = {name for p in case.parameters for name in p.state or ()}
        assert [int(state["step"]) for state in records.states] == [2] * len(case.parameters)
        assert_close(short, records, skip_state=recorded)


# The rules.

SHAPES = [(), (0,), (2, 0), (19,), (2, 3, 4), (5, 1), (1, 6), (2, 2, 3, 3), (9, 11), (17, 8), (2, 33)]
MOMENTUM = "momentum, decay, maximize"
OPTIONS = {
    "defaults": {},
    MOMENTUM: {"maximize": True, "beta1": 0.5, "weight_decay": 0.1},
    "given rate, low threshold": {"lr": 0.1, "clip_threshold": 0.1},
}
TOLERANCES = {
    torch.float64: Tolerance("the same formula", rtol=1e-12, atol=1e-14),
    torch.float32: Tolerance("a few roundings per step, two steps", rtol=1e-6, atol=1e-6),
    torch.bfloat16: Tolerance("rounded once per step, but a tie may fall to the other side", ulps=1),
    torch.float16: Tolerance("rounded once per step, but a tie may fall to the other side", ulps=1),
}


STATE_TOLERANCE = Tolerance("sums of a few terms: relative to the largest", of_largest=2e-6)

AS_ON_A_GPU, *IN_PIECES = CUTS
RUNS = [
    *((AS_ON_A_GPU, options, torch.float32) for options in OPTIONS),
    *(pytest.param(AS_ON_A_GPU, MOMENTUM, dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.float16)),
    *(pytest.param(cut, MOMENTUM, dtype, marks=pytest.mark.slow) for cut in IN_PIECES for dtype in TOLERANCES),
]


@pytest.mark.parametrize(("cut", "options", "dtype"), RUNS, indirect=["cut"], ids=str)
@pytest.mark.usefixtures("checks_for_overflow")
def test_the_kernels_do_what_the_rules_say(options, dtype, cut, device):
    start = normal(*SHAPES, dtype=dtype)
    steps = [normal(*SHAPES, seed=k, dtype=dtype) for k in (1, 2)]
    exact = [p.double().numpy() for p in start]
    states = [{} for _ in start]
    options = OPTIONS[options]
    for k, grads in enumerate(steps, start=1):
        for i, g in enumerate(grads):
            if g.numel():
                exact[i] = np.asarray(by_the_rules(exact[i], g.double().numpy(), states[i], k, **options))
                exact[i] = torch.from_numpy(exact[i]).to(dtype).double().numpy() if dtype.itemsize == 2 else exact[i]
    ours, kept = after(TritonAdafactor, start, steps, device, relative_step="lr" not in options, **options)
    for actual, expected in zip(ours, exact):
        assert_near(actual, torch.from_numpy(expected).to(dtype), TOLERANCES[dtype])
    for state, expected in zip(kept, states):
        for name, letter in (("exp_avg_sq_row", "r"), ("exp_avg_sq_col", "c"), ("exp_avg_sq", "v"), ("exp_avg", "m")):
            if letter in expected:
                exact_state = torch.from_numpy(np.asarray(expected[letter]))
                assert_near(state[name], exact_state, STATE_TOLERANCE, name=name, check_dtype=False)


@every_cut
@pytest.mark.parametrize("shape", [(12, 5), (1, 9)], ids=str)
def test_a_matrix_and_its_transpose_agree(shape, cut, device):
    (w,), (g,) = normal(shape), normal(shape, seed=1)
    (ours, turned), _ = after(TritonAdafactor, [w, w.t().contiguous()], [[g, g.t().contiguous()]], device, beta1=0.9)
    # The factors of rows and of columns change places, and with them the order of roundings.
    assert_near(ours, turned.t(), rtol=2e-6, atol=2e-6)


NEIGHBOURS = [((7, 9), torch.float32), ((3, 2, 3), torch.bfloat16), ((19,), torch.float32), ((6, 4), torch.float64)]


@pytest.mark.slow
@every_cut
def test_a_tensor_neither_sees_its_neighbours_nor_their_order_or_dtype(cut, device):
    start = [normal(shape, seed=i, dtype=dtype)[0] for i, (shape, dtype) in enumerate(NEIGHBOURS)]
    grads = [normal(shape, seed=i + 9, dtype=dtype)[0] for i, (shape, dtype) in enumerate(NEIGHBOURS)]
    together, states = after(TritonAdafactor, start, [grads], device, beta1=0.9)
    turned, _ = after(TritonAdafactor, start[::-1], [grads[::-1]], device, beta1=0.9)
    assert_same(together, turned[::-1])
    for i, (p, g) in enumerate(zip(start, grads)):
        (alone,), (state,) = after(TritonAdafactor, [p], [[g]], device, beta1=0.9)
        assert_same(alone, together[i])
        assert_same(state, states[i])


@pytest.mark.slow
def test_two_runs_give_the_same_bits(device):
    shapes = [(300, 130), (2100,), (50, 9, 3, 3)]
    start, steps = normal(*shapes), [normal(*shapes, seed=1)]
    one, other = (after(TritonAdafactor, start, steps, device, beta1=0.9) for _ in range(2))
    assert_same(one[0], other[0])
    assert_same(one[1], other[1])
    for p, g, new in zip(start, steps[0], one[0]):
        expected = by_the_rules(p.double().numpy(), g.double().numpy(), {}, 1, beta1=0.9)
        assert_near(new.double(), torch.from_numpy(np.asarray(expected)), rtol=1e-6, atol=1e-7)


HARD_IN_TILES = ("denormal", "spike", "nan", "inf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "kind"),
    [*((AS_ON_A_GPU, kind) for kind in HARD_GRADIENTS), *((IN_PIECES[1], kind) for kind in HARD_IN_TILES)],
    indirect=["cut"],
)
def test_hard_gradients_do_what_they_do_in_the_original(kind, cut, device):
    """Small matrices by the constants of a GPU, tiles by the other ones."""
    shapes = [(6,), (9, 4), (2, 5, 3)]
    start, steps = normal(*shapes), [normal(*shapes, seed=k) for k in (1, 2, 3)]
    steps[1] = [HARD_GRADIENTS[kind](g) for g in steps[1]]
    options = {"beta1": 0.9, "weight_decay": 0.1}
    ours, states = after(TritonAdafactor, start, steps, device, **options)
    theirs, original = after(ReferenceAdafactor, start, steps, torch.device("cpu"), **options)
    for p, q, s, t in zip(ours, theirs, states, original):
        assert_near(p, q, rtol=2e-5, atol=2e-6, equal_nan=True)
        for name in t.keys() - {"step"}:
            expected = torch.as_tensor(t[name])
            # Sums of products that may nearly cancel: relative to the largest.
            atol = 5e-5 * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
            assert_near(s[name], expected, rtol=5e-5, atol=atol, equal_nan=True)


@pytest.mark.parametrize("cut", [AS_ON_A_GPU, IN_PIECES[1]], indirect=True)
def test_the_mean_square_of_an_update_whose_squared_gradient_underflows(cut, device):
    """Two blocks on the diagonal, one at 1e-23: its squares are 0 in float32, its updates are the largest."""
    g = torch.zeros(16, 16)
    g[:8, :8], g[8:, 8:] = normal((8, 8))[0], 1e-23 * normal((8, 8), seed=1)[0]
    (w,) = normal((16, 16), seed=2)
    (ours,), _ = after(TritonAdafactor, [w], [[g]], device)
    expected = by_the_rules(w.double().numpy(), g.double().numpy(), {}, 1)
    assert_near(ours.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)
    changed = (ours - w)[8:, 8:].double()
    rate = 0.01 * w.double().square().mean().sqrt()
    assert float((changed.square().sum() / g.numel()).sqrt() / rate) == pytest.approx(1.0, rel=1e-4)


IMAGE, VOLUME, LARGE = (4, 3, 5, 2), (2, 3, 2, 3, 2), (2, 40, 3)
LAID_OUT = {
    **{name: (IMAGE, lay_out) for name, lay_out in LAYOUTS.items()},
    "channels_last_3d": (VOLUME, lambda t: t.contiguous(memory_format=torch.channels_last_3d)),
    "a slice of both sides": (IMAGE, lambda t: torch.nn.functional.pad(t, (1, 2, 3, 4))[..., 3:-4, 1:-2]),
    "matrices transposed": (LARGE, lambda t: t.mT.contiguous().mT),
    "matrices as channels": (LARGE, lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    "rows far apart": (LARGE, lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]]),
}


@pytest.mark.parametrize(("shape", "lay_out"), LAID_OUT.values(), ids=LAID_OUT)
def test_layouts_give_the_same_numbers(shape, lay_out, device):
    """Of parameter and, in the second step, gradient."""
    (w,), (first, second) = normal(shape), normal(shape, shape, seed=1)
    (expected,), (state,) = after(TritonAdafactor, [w], [[first], [second]], device, beta1=0.9)
    p = torch.nn.Parameter(lay_out(w.clone().to(device)))
    strides = p.stride()
    optimizer = TritonAdafactor([p], beta1=0.9)
    run(optimizer, [[first.to(device)], [lay_out(second.to(device))]])
    assert_near(p.detach().cpu(), expected, rtol=1e-6, atol=1e-6)
    assert p.stride() == strides
    for name, value in state.items():
        assert_near(optimizer.state[p][name].cpu(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@every_cut
@pytest.mark.parametrize("offset", [1, 16])
def test_nothing_beside_the_tensors_is_read_or_written(offset, cut, device):
    """Neighbouring elements are NaN before and after, those of the workspace included."""
    shapes = [(8, 16), (5, 7), (33,), (2, 3, 3)]
    start, (grads,) = normal(*shapes), [normal(*shapes, seed=1)]
    expected, expected_states = after(TritonAdafactor, start, [grads], device, beta1=0.9)
    wholes = []

    def in_the_middle(t):
        whole = torch.full((t.numel() + 64,), torch.nan, dtype=t.dtype, device=device)
        wholes.append((part := whole[offset : offset + t.numel()].view(t.shape).copy_(t), whole))
        return part

    params = [torch.nn.Parameter(in_the_middle(p)) for p in start]
    optimizer = TritonAdafactor(params, beta1=0.9)
    optimizer.init_state()
    for p in params:
        optimizer.state[p] = {name: in_the_middle(value) for name, value in optimizer.state[p].items()}
    optimizer.apply_gradients([(in_the_middle(g), p) for p, g in zip(params, grads)])
    for part, whole in wholes:
        assert torch.cat([whole[:offset], whole[offset + part.numel() :]]).isnan().all()
        assert not part.isnan().any()
    for p, q, state in zip(params, expected, expected_states):
        # On a GPU, what is read 128 bits at a time is added up in another order.
        assert_near(p.detach().cpu(), q, rtol=1e-6, atol=1e-6)
        for name, value in state.items():
            assert_near(optimizer.state[p][name].cpu(), value, rtol=1e-6, atol=1e-6)


def test_the_scalars_of_a_step_are_right_in_float64(device):
    """Rates and weights, over many step counts at once."""
    counts = [1, 2, 3, 10, 99, 100, 12345, 10**6]
    options = [{}, {"warmup_init": True, "decay_rate": -0.5}, {"relative_step": False, "lr": 0.3, "decay_rate": 0.0}]
    for given in options:
        params = parameters([torch.ones(1, device=device)] * len(counts))
        optimizer = TritonAdafactor(params, **given)
        optimizer.init_state()
        for p, count in zip(params, counts):
            optimizer.state[p]["step"].fill_(count - 1)
        run(optimizer, [[torch.ones_like(p) for p in params]])
        (stepper,) = optimizer._engine.steppers.values()
        scalars = stepper._tables._eager._scratch["scalars"][: len(counts)].cpu().numpy()
        hyper = optimizer.hyper(optimizer.param_groups[0])._replace(scale_parameter=False)
        expected = [hyper.rate(float(count), 1.0) for count in counts]
        np.testing.assert_allclose(scalars[:, PLACES.rate], expected, rtol=1e-14)
        weights = [rules.square_weight(float(count), hyper.decay_rate, math.exp, math.log) for count in counts]
        np.testing.assert_allclose(scalars[:, PLACES.square_weight], weights, rtol=1e-13)
