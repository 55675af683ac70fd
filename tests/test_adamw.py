"""AdamW's numbers: the recorded runs, torch's own optimizer, and every way a tensor can lie in memory."""

import hypothesis.strategies as st
import pytest
import torch
from helpers.adamw import GOLDEN, SIXTEEN_BITS, STATES, RoundedOnce, rounding_spoils_nothing, run
from helpers.comparing import Tolerance, assert_near
from helpers.golden import ROUNDED_TWICE_PER_STEP, assert_close, replay
from hypothesis import given, settings

from fusedopt import AdamW
from fusedopt_kernels import rules


@pytest.mark.parametrize("case", [case for case in GOLDEN if case.dtype not in SIXTEEN_BITS], ids=str)
def test_golden(case):
    assert_close(case, replay(case, AdamW))


@pytest.mark.parametrize("case", [case for case in GOLDEN if case.dtype in SIXTEEN_BITS], ids=str)
def test_golden_in_16_bits_is_float64_arithmetic_rounded_once(case):
    """The original rounds after every operation; rounding once per step misses its numbers by being better.

    So the measure is the same rule in float64, with parameter and moments rounded once per step; and no case may be
    further from the run in float64 throughout than the recording is.
    """
    ours = replay(case, AdamW)
    rounded = replay(case, RoundedOnce)
    exact = replay(case, AdamW, dtype=torch.float64)
    for p, actual, expected, reference in zip(case.parameters, ours.parameters, rounded.parameters, exact.parameters):
        allowed = Tolerance("a tie may fall to the other side, and move the moments for some steps", ulps=2)
        assert_near(actual, expected, allowed)
        ours_off = (actual.double() - reference).abs().max()
        recorded_off = (p.expected.double() - reference).abs().max()
        assert ours_off <= recorded_off + torch.finfo(case.dtype).eps * reference.abs().max()


@pytest.mark.parametrize("case", list(filter(rounding_spoils_nothing, GOLDEN)), ids=str)
def test_golden_in_16_bits_where_rounding_spoils_nothing(case):
    assert_close(case, replay(case, AdamW), parameters=ROUNDED_TWICE_PER_STEP[case.dtype], skip_state=STATES)


def parameters(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def gradients(params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        for _ in range(steps)
    ]


SHAPES = [(3, 4), (5,), (), (0,), (2, 3, 4, 5), (1025,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.0, 0.9)}, {"lr": 0.0}],
    ids=str,
)
def test_torch_convention_equals_torch(options, dtype):
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.0, **options}
    ours = parameters(SHAPES, dtype)
    theirs = [torch.nn.Parameter(p.detach().to(torch.promote_types(dtype, torch.float32), copy=True)) for p in ours]
    grads = gradients(ours, steps=6)
    grads[2][1] = None
    run(AdamW(ours, convention="torch", **options), ours, grads)
    wide = [[None if g is None else g.to(q.dtype) for g, q in zip(step, theirs)] for step in grads]
    run(torch.optim.AdamW(theirs, foreach=False, **options), theirs, wide)
    # bfloat16: parameter and moments are rounded to 8 bits in each of the 6 steps.
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-14), torch.bfloat16: (6 * 2**-8, 2**-8)}[dtype]
    for p, q in zip(ours, theirs):
        assert_near(p.to(q.dtype), q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_keras_convention(weight_decay):
    """Decay before the update, eps next to sqrt(v), one step count for all: written out in float64."""
    (p, late) = parameters([(7,), (3,)], torch.float64)
    expected, exact_late = p.detach().clone(), late.detach().clone()
    grads = gradients([p, late], steps=4)
    optimizer = AdamW([p, late], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=weight_decay, convention="keras")
    moments = {id(x): (torch.zeros_like(x), torch.zeros_like(x)) for x in (expected, exact_late)}
    for t, (g, g_late) in enumerate(grads, start=1):
        run(optimizer, [p, late], [[g, g_late if t > 2 else None]])
        for x, gradient in ((expected, g), (exact_late, g_late if t > 2 else None)):
            if gradient is None:
                continue
            m, v = moments[id(x)]
            m.mul_(0.8).add_(gradient, alpha=0.2)
            v.mul_(0.9).addcmul_(gradient, gradient, value=0.1)
            x.mul_(1 - 0.1 * weight_decay)
            x.sub_(0.1 * (1 - 0.9**t) ** 0.5 / (1 - 0.8**t) * m / (v.sqrt() + 1e-3))
    assert_near(p.detach(), expected, rtol=1e-12, atol=1e-14)
    assert_near(late.detach(), exact_late, rtol=1e-12, atol=1e-14)
    assert optimizer.state[late]["step"] == 4  # two updates, but four applied steps of the optimizer


def test_keras_without_any_gradient_is_no_step():
    (p,) = parameters([(3,)])
    optimizer = AdamW([p], convention="keras")
    optimizer.step()
    assert not optimizer.state


def channels_last(p):
    return p.to(memory_format=torch.channels_last)


def column_slice(p):
    wide = torch.full((*p.shape[:-1], p.shape[-1] + 3), 7.0, dtype=p.dtype)
    wide[..., : p.shape[-1]] = p
    return wide[..., : p.shape[-1]]


def misaligned(p):
    storage = torch.empty(p.numel() + 1, dtype=p.dtype)
    return storage[1:].view(p.shape).copy_(p)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": channels_last,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "column_slice": column_slice,
    "misaligned": misaligned,
}


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
@pytest.mark.parametrize("convention", rules.CONVENTIONS)
def test_layouts_give_the_same_numbers(of_parameter, of_gradient, convention):
    (reference,) = parameters([(4, 3, 5, 2)])
    p = torch.nn.Parameter(LAYOUTS[of_parameter](reference.detach().clone()))
    grads = gradients([reference], steps=3)
    laid_out = [[LAYOUTS[of_gradient](g)] for (g,) in grads]
    run(AdamW([reference], lr=0.1, weight_decay=0.1, convention=convention), [reference], grads)
    run(AdamW([p], lr=0.1, weight_decay=0.1, convention=convention), [p], laid_out)
    assert_near(p, reference, rtol=1e-5, atol=1e-6)


def test_neighbours_in_a_larger_storage_are_left_alone():
    storage = torch.full((100,), 5.0)
    p = torch.nn.Parameter(storage[10:20])
    optimizer = AdamW([p], lr=0.1)
    run(optimizer, [p], gradients([p], steps=2))
    assert (storage[:10] == 5).all() and (storage[20:] == 5).all() and (storage[10:20] != 5).all()


@st.composite
def problems(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=5))
    dtypes = draw(st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=len(shapes), max_size=len(shapes)))
    permute = draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    absent = draw(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=len(shapes), max_size=len(shapes)))
    split = draw(st.integers(0, len(shapes)))
    options = draw(
        st.fixed_dictionaries(
            {
                "lr": st.floats(0, 0.5),
                "weight_decay": st.floats(0, 1.5),
                "amsgrad": st.booleans(),
                "maximize": st.booleans(),
                "convention": st.sampled_from(["transformers", "torch", "keras"]),
            }
        )
    )
    return shapes, dtypes, permute, absent, split, options


@settings(max_examples=60)
@given(problems())
def test_any_mixture_equals_each_parameter_by_itself_in_float64(problem):
    """Shapes, dtypes, strides, groups and missing gradients of one optimizer do not leak into each other."""
    shapes, dtypes, permute, absent, split, options = problem
    wide = parameters(shapes, torch.float64)
    params = []
    for p, dtype, transposed in zip(wide, dtypes, permute):
        data = p.detach().to(dtype)
        params.append(torch.nn.Parameter(data.mT.contiguous().mT if transposed and data.ndim > 1 else data))
    groups = [{"params": params[:split], "eps": 1e-4}, {"params": params[split:], "eps": 1e-3}]
    optimizer = AdamW([g for g in groups if g["params"]], **options)
    alone = [AdamW([p], **options, eps=1e-4 if i < split else 1e-3) for i, p in enumerate(wide)]
    for step, grads in enumerate(gradients(wide, steps=3)):
        anyone = not all(row[step] for row in absent)
        for i, (p, q, g) in enumerate(zip(params, wide, grads)):
            p.grad = q.grad = None
            if not absent[i][step]:
                p.grad, q.grad = g.to(p.dtype), g.to(p.dtype).double()
        optimizer.step()
        for i, one in enumerate(alone):
            if options["convention"] == "keras" and anyone and absent[i][step]:
                # By itself it would not count a step that the others applied.
                one.init_state()
                one.state[wide[i]]["step"] += 1
            one.step()
    for p, q in zip(params, wide):
        tight = p.dtype == torch.float64
        assert_near(p.double(), q, rtol=1e-11 if tight else 1e-4, atol=1e-12 if tight else 1e-5, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_reach_their_element_and_no_other(bad):
    p, q = parameters([(4,), (4,)])
    optimizer = AdamW([p, q], lr=0.1)
    grads = gradients([p, q], steps=2)
    grads[0][0][2] = bad
    run(optimizer, [p, q], grads)
    assert p.isnan().tolist() == [False, False, True, False]
    assert q.isfinite().all()


def test_a_small_decay_is_not_lost_by_the_rule():
    """lr * weight_decay = 1e-6 as a float32 factor 1 - 1e-6 decays 1.3 % too fast; subtracting 1e-6 * p does not."""
    decay_step = 1e-6
    p = torch.linspace(0.5, 2, 1000)
    zero = torch.zeros_like(p)
    exact = p.double()
    for _ in range(5000):
        p = rules.adamw_update(p, zero, zero, decay_step, 0.0, 1.0, sqrt=torch.sqrt, div=torch.div)
        exact = exact * (1 - decay_step)
    decayed = 1 - (1 - decay_step) ** 5000
    assert ((p.double() - exact).mean() / exact.mean()).abs() < 2e-3 * decayed


@pytest.mark.parametrize(("lr", "too_fast"), [(1e-4, 0.013), (1e-5, 0.19)])
def test_the_factor_one_minus_decay_is_coarse_in_float32(lr, too_fast):
    """The figures of docs/how-it-works.md, for a weight decay of 0.01."""
    factor = torch.tensor(1 - lr * 0.01, dtype=torch.float32).double().item()
    assert (1 - factor) / (lr * 0.01) - 1 == pytest.approx(too_fast, rel=0.05)
