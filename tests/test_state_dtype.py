"""In which dtype states are kept, for parameters of every dtype; averages of squares that follow their gradients."""

import warnings

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS
from helpers.precision import FROZEN, PRECISE, normal, outcome, parameters, step

from fusedopt import Adafactor, AdamW, Lion
from fusedopt.warn import warn_once

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7,), (33, 5), ()]

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def after_a_fall(moments, **options):
    """sqrt(v) over what it should be, so many steps after gradients became a tenth of what they were."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=0.0, **options)
    optimizer.init_state()
    state = optimizer.state[p]
    state["step"].fill_(10_000.0)
    # What gradients of size 1 leave: 0.0316 is the deviation of an average of their squares.
    state["exp_avg_sq"].copy_(1.0 + 0.0316 * torch.randn(1000, generator=generator))
    found = []
    for number in range(1, max(moments) + 1):
        p.grad = (0.1 * torch.randn(1000, generator=generator)).bfloat16()
        optimizer.step()
        if number in moments:
            remembered = 0.999**number
            exact = remembered + (1 - remembered) * 0.01
            found.append(float((state["exp_avg_sq"].double().mean() / exact).sqrt()))
    return found


every_policy = pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1.635, 4.107]),
        ({"state_dtype": torch.bfloat16}, [1.00, 1.00]),
        ({"stochastic_rounding": True}, [1.00, 1.00]),
        pytest.param({"master_weights": True}, [1.00, 1.00], marks=pytest.mark.slow),
        pytest.param({"master_weights": True, "state_dtype": torch.bfloat16}, [1.00, 1.00], marks=pytest.mark.slow),
    ],
    ids=["nearest", "bfloat16 moments", "stochastic", "master", "master-bfloat16"],
)


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
@every_policy
def test_averages_of_squares_follow_gradients_that_fall_tenfold(options, expected):
    assert after_a_fall((1000,), **options) == pytest.approx(expected[:1], rel=0.005)


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
@every_policy
def test_averages_of_squares_follow_gradients_for_long(options, expected):
    assert after_a_fall((1000, 3000), **options) == pytest.approx(expected, rel=0.01)


# The warning.


@pytest.fixture
def unwarned():
    """As if nothing had been said in this process."""
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def messages(make, dtype=torch.bfloat16, steps=3):
    params = parameters(SHAPES, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make(params)
        for number in range(steps):
            step(optimizer, normal(SHAPES, number, dtype))
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def test_the_warning_comes_once_and_names_the_way_out(unwarned):
    (message,) = messages(AdamW)
    for word in ("beta2=0.999", "exp_avg_sq", "master_weights=True", "stochastic_rounding=True"):
        assert word in message
    assert not messages(AdamW)


@pytest.mark.parametrize(
    "make, dtype",
    [
        (lambda params: AdamW(params, betas=(0.9, 0.95)), torch.bfloat16),
        (lambda params: AdamW(params, master_weights=True), torch.bfloat16),
        (lambda params: AdamW(params, stochastic_rounding=True), torch.bfloat16),
        (lambda params: AdamW(params, state_dtype=torch.bfloat16), torch.bfloat16),
        (lambda params: AdamW(params, state_dtype=torch.float32), torch.bfloat16),
        (AdamW, torch.float16),
        (AdamW, torch.float32),
        (Lion, torch.bfloat16),
        (Adafactor, torch.bfloat16),
    ],
)
def test_there_is_no_warning_where_nothing_freezes(make, dtype, unwarned):
    assert not messages(make, dtype)


def test_the_warning_comes_where_an_option_is_taken_away(unwarned):
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = AdamW(params, master_weights=True)
    step(optimizer, normal(SHAPES, 1, torch.bfloat16))
    optimizer.param_groups[0]["master_weights"] = False
    with pytest.warns(UserWarning, match="exp_avg_sq hardly follows"):
        step(optimizer, normal(SHAPES, 2, torch.bfloat16))


# Dtypes.


def expected_dtypes(name, dtype, options):
    """By the documentation: of each state of a matrix but the step."""
    wide = torch.promote_types(dtype, torch.float32)
    state_dtype = options.get("state_dtype")
    short = dtype.itemsize == 2
    if name == "Adafactor":
        expected = {"exp_avg_sq_row": wide, "exp_avg_sq_col": wide, "RMS": wide, "exp_avg": state_dtype or wide}
        numbered = options.get("stochastic_rounding") and short
    else:
        moment = state_dtype or (wide if options.get("master_weights") else dtype)
        expected = {"exp_avg": moment} if name == "Lion" else {"exp_avg": moment, "exp_avg_sq": moment}
        random = any(options.values()) and moment.itemsize == 2 and name != "Lion"
        numbered = (options.get("stochastic_rounding") and short) or random
    if options.get("master_weights") and short:
        expected |= {"remainder": torch.int16} if dtype == torch.bfloat16 else {"master_weight": torch.float32}
    return expected | ({"number": torch.int64} if numbered else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRECISE)
def test_states_of_every_policy(name, dtype):
    shapes = [(3, 5)]
    for policy in ({}, {"master_weights": True}, {"stochastic_rounding": True}):
        for state_dtype in (None, torch.float32, torch.bfloat16):
            options = {**policy, "state_dtype": state_dtype}
            params = parameters(shapes, dtype)
            more = {"lr": 0.1, "beta1": 0.9, "relative_step": False} if name == "Adafactor" else {}
            optimizer = OPTIMIZERS[name].cls(params, **options, **more)
            step(optimizer, normal(shapes, 1, dtype))
            (state,) = [{k: v.dtype for k, v in optimizer.state[p].items() if k != "step"} for p in params]
            assert state == expected_dtypes(name, dtype, options), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("name", PRECISE)
def test_wide_parameters_are_updated_as_without_the_options(name, option, dtype):
    results = []
    for options in ({}, {option: True}):
        optimizer = OPTIMIZERS[name](parameters(SHAPES, dtype), **options)
        for number in range(3):
            step(optimizer, normal(SHAPES, number, dtype))
        results.append(list(outcome(optimizer)))
    assert_same(*results)


@pytest.mark.filterwarnings(FROZEN)
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in PRECISE if name != "Adafactor"])
def test_bfloat16_moments_are_those_of_wide_ones_but_for_their_rounding(name, dtype, backend, device):
    """And float32 moments of a 16-bit parameter, those of the float32 run."""
    device = device if backend == "triton" else torch.device("cpu")
    shapes = [(1025,), (7, 9)]
    results = {}
    for state_dtype in (torch.float32, torch.bfloat16):
        params = parameters(shapes, dtype, device=device)
        optimizer = OPTIMIZERS[name].cls(params, state_dtype=state_dtype, backend=backend)
        for number in range(2):
            step(optimizer, [g.to(device) for g in normal(shapes, number + 1, dtype)])
        results[state_dtype] = [s["exp_avg"].float() for s in outcome(optimizer)]
        if state_dtype == torch.float32 and dtype.itemsize == 2:
            wide = parameters(shapes, torch.float32, device=device)
            reference = OPTIMIZERS[name].cls(wide, backend=backend)
            for number in range(2):
                grads = normal(shapes, number + 1, dtype)  # rounded to this dtype
                step(reference, [g.to(device, torch.float32) for g in grads])
            assert_near(results[state_dtype], [s["exp_avg"] for s in outcome(reference)], rtol=1e-6, atol=1e-7)
    # Two roundings to 8 bits, each of numbers that may nearly cancel afterwards.
    for rounded, exact in zip(*reversed(results.values())):
        assert 0.0 < float((rounded - exact).norm() / exact.norm()) < 2**-7


@pytest.mark.filterwarnings(FROZEN)
@every_backend
@pytest.mark.parametrize("name", PRECISE)
def test_options_may_be_switched_between_steps(name, backend, device):
    """States are added and converted; what is not needed any more is left as it is."""
    device = device if backend == "triton" else torch.device("cpu")
    shapes = [(33,), (4, 6)]
    more = {"lr": 0.01, "beta1": 0.9, "relative_step": False} if name == "Adafactor" else {}
    changes = [
        {"master_weights": True},
        {"state_dtype": torch.bfloat16},
        {"master_weights": False, "stochastic_rounding": True},
        {"state_dtype": None},
        {"stochastic_rounding": False},
        {"master_weights": True, "state_dtype": torch.float32},
    ]
    params = parameters(shapes, torch.bfloat16, device=device)
    optimizer = OPTIMIZERS[name].cls(params, backend=backend, **more)
    (group,) = optimizer.param_groups
    for number, change in enumerate([{}, *changes]):
        before = [p.detach().clone() for p in params]
        group.update(change)
        step(optimizer, [g.to(device) for g in normal(shapes, number, torch.bfloat16)])
        specs = optimizer.state_specs(params[0], group)
        for p, old in zip(params, before):
            assert p.isfinite().all() and float((p.detach() - old).float().abs().max()) <= 0.1
            state = optimizer.state[p]
            assert state["step"] == number + 1
            for key, spec in optimizer.state_specs(p, group).items():
                if not spec.keeps_loaded_dtype:
                    assert state[key].dtype == spec.dtype, (change, key)
    assert specs.keys() <= optimizer.state[params[0]].keys()


def test_a_switch_to_master_weights_goes_on_as_if_they_had_been_there_with_no_remainder():
    shapes = [(33,), (4, 6)]
    runs = []
    for switched in (True, False):
        params = parameters(shapes, torch.bfloat16)
        optimizer = AdamW(params, lr=0.01, betas=(0.9, 0.95), master_weights=not switched)
        if switched:
            step(optimizer, [torch.zeros_like(p) for p in params])
            optimizer.param_groups[0]["master_weights"] = True
        else:
            step(optimizer, [torch.zeros_like(p) for p in params])
        for number in range(3):
            step(optimizer, normal(shapes, number, torch.bfloat16))
        runs.append(list(outcome(optimizer)))
    assert_same(*runs)


BAD = [
    ({"master_weights": True, "stochastic_rounding": True}, "master_weights=True and stochastic_rounding=True exclude"),
    ({"master_weights": 1}, "master_weights must be True or False, got 1"),
    ({"stochastic_rounding": None}, "stochastic_rounding must be True or False, got None"),
    ({"state_dtype": torch.float16}, "state_dtype must be None, torch.float32 or torch.bfloat16, got torch.float16"),
    ({"state_dtype": "bfloat16"}, "state_dtype must be None"),
    ({"seed": -1}, "seed must be"),
    ({"seed": 0.5}, "seed must be"),
    ({"seed": 2**63}, "seed must be less than"),
]


@pytest.mark.parametrize("options, message", BAD)
@pytest.mark.parametrize("name", PRECISE)
def test_options_that_make_no_sense_are_refused(name, options, message):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name].cls([p], **options)
    if "seed" in options:
        return
    optimizer = OPTIMIZERS[name].cls([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state


def test_options_go_for_a_group():
    shapes = [(5,)]
    params = [
        *parameters(shapes, torch.bfloat16),
        *parameters(shapes, torch.bfloat16),
        *parameters(shapes, torch.bfloat16),
    ]
    optimizer = Lion(
        [
            {"params": params[:1], "master_weights": True},
            {"params": params[1:2], "stochastic_rounding": True, "state_dtype": torch.float32},
            {"params": params[2:]},
        ]
    )
    step(optimizer, normal(shapes * 3, 1, torch.bfloat16))
    assert [{k: v.dtype for k, v in optimizer.state[p].items() if k != "step"} for p in params] == [
        {"exp_avg": torch.float32, "remainder": torch.int16},
        {"exp_avg": torch.float32, "number": torch.int64},
        {"exp_avg": torch.bfloat16},
    ]


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_backends_round_moments_to_the_same_bits(dtype, device):
    shapes = [(1025,), (7, 9)]
    results = []
    for backend, where in (("eager", torch.device("cpu")), ("triton", device)):
        params = parameters(shapes, dtype, device=where)
        optimizer = AdamW(params, state_dtype=torch.bfloat16, amsgrad=True, seed=3, backend=backend)
        for number in range(3):
            step(optimizer, [g.to(where) for g in normal(shapes, number, dtype)])
        results.append([{k: v for k, v in s.items() if k != "param"} for s in outcome(optimizer)])
    assert_same(*results)


@pytest.mark.parametrize("shape", [(7,), (190, 200)], ids=["small", "in tiles"])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Lion"])
def test_an_update_of_float64_is_not_rounded_as_its_averages_are(name, shape):
    """Averages are kept in float32; what a step makes of the gradient reaches the parameter in float64."""
    moved = []
    for dtype in (None, torch.float32):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        before = p.detach().clone()
        options = {"beta1": 0.9} if name == "Adafactor" else {}
        optimizer = OPTIMIZERS[name].at(0.01, [p], state_dtype=dtype, backend="eager", **options)
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype == (dtype or torch.float64)
        moved.append(p.detach() - before)
    assert_near(*moved, rtol=1e-11, atol=1e-16)
