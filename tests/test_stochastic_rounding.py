"""Stochastic rounding: unbiased, without correlations, and a function of seed, parameter, step and element alone."""

import copy

import numpy as np
import pytest
import torch
from helpers.comparing import assert_near, assert_same, same
from helpers.files import through_a_file
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS
from helpers.precision import LAYOUTS, PRECISE, each_half, from_bits, normal, outcome, parameters, step

from fusedopt import AdamW, Lion
from fusedopt.backends.eager.rounding import random_keys, random_words, round_into
from fusedopt.backends.eager.storage import moment_bits, weight_bits
from fusedopt.interface import ShardPosition

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
CPU = torch.device("cpu")
MANY = 1 << 20


# The words.


def words(number=0, at=1, seed=0, n=MANY, start=0):
    return random_words(random_keys(seed, [number], at), [n], start, [None], CPU)


def independent(a, b, buckets=16):
    """Asserts that two streams of 16-bit numbers are independent: a chi-squared test on pairs of their top bits."""
    cells = (a >> 12).to(torch.int64) * buckets + (b >> 12).to(torch.int64)
    counts = torch.bincount(cells, minlength=buckets * buckets).double()
    expected = len(a) / buckets**2
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: six standard deviations, so that one in 10^9 draws fails, and these are always the same.
    assert abs(chi2 - 255) < 6 * (2 * 255) ** 0.5, chi2
    x, y = (t.double() - 32767.5 for t in (a, b))
    assert abs(float((x * y).mean())) < 6 * (2**32 / 12) / len(a) ** 0.5


def test_words_are_uniform():
    for bits in (weight_bits(words()), moment_bits(words(), torch.bfloat16)):
        counts = torch.bincount(bits.to(torch.int64) >> 8, minlength=256).double()
        chi2 = float(((counts - MANY / 256) ** 2 / (MANY / 256)).sum())
        assert abs(chi2 - 255) < 6 * (2 * 255) ** 0.5
        assert abs(float(bits.double().mean()) - 32767.5) < 6 * 65536 / 12**0.5 / MANY**0.5


@pytest.mark.parametrize("half", [weight_bits, lambda w: moment_bits(w, torch.bfloat16)], ids=["weights", "moments"])
def test_there_is_no_correlation_between(half):
    first = half(words())
    independent(first[:-1], first[1:])  # neighbours
    independent(first[:-64], first[64:])
    independent(first, half(words(at=2)))  # steps
    independent(first, half(words(at=1001)))
    independent(first, half(words(number=1)))  # parameters
    independent(first, half(words(number=1, at=2)))
    independent(first, half(words(seed=1)))  # seeds
    independent(first, half(words(seed=1 << 32)))
    # An element of a step and the next element of the next step.
    independent(first[1:], half(words(at=2))[:-1])


def test_there_is_no_correlation_between_the_bits_of_weights_and_moments():
    independent(weight_bits(words()), moment_bits(words(), torch.bfloat16))


def test_words_of_two_steps_are_not_the_same_words_in_another_order():
    assert not torch.equal(words(at=1).sort().values, words(at=2).sort().values)


def test_words_do_not_depend_on_how_a_tensor_is_cut_and_joined():
    whole = words(number=3, n=1000)
    assert_same(torch.cat([words(number=3, n=400), words(number=3, n=600, start=400)]), whole)
    keys = random_keys(0, [3, 7, 3], 1)
    assert_same(random_words(keys, [1000, 5, 10], 0, [None] * 3, CPU)[:1000], whole)
    assert_same(random_words(keys, [10, 5, 1000], 0, [None] * 3, CPU)[15:], whole)


def test_words_of_shards_are_those_of_the_whole():
    """Also where shards of several parameters come together."""
    whole, other = words(number=3, n=60).view(6, 10), words(number=5, n=40)
    keys = random_keys(0, [3, 5, 3], 1)
    positions = [ShardPosition(4, 6, 3), ShardPosition(10, 30, 20), None]
    columns, end, again = random_words(keys, [24, 10, 60], 0, positions, CPU).split([24, 10, 60])
    assert_same(columns.view(6, 4), whole[:, 3:7])
    assert_same(end, other[20:30])
    assert_same(again.view(6, 10), whole)
    alone = random_words(keys[:1], [12], 12, positions[:1], CPU)
    assert_same(alone.view(3, 4), whole[3:, 3:7])


def test_elements_beyond_32_bits_have_words_of_their_own():
    at = [0, 1 << 32, 1 << 33, (1 << 32) - 8]
    found = [words(n=16, start=start) for start in at]
    assert not any(same(a, b) for i, a in enumerate(found) for b in found[:i])
    assert_same(found[3][8:], found[1][:8])


# The rounding.


def neighbours(x, half):
    """The largest number of 16 bits at most |x|, and the next, with the sign of x; x in float32."""
    nearest = x.to(half)
    bits = nearest.view(torch.int16)
    down = torch.where(nearest.float().abs() > x.abs(), bits - 1, bits).view(half)
    up = torch.where(down.float() == x, down.view(torch.int16), down.view(torch.int16) + 1).view(half)
    return down, up


@each_half
@pytest.mark.parametrize("scale", [1.0, 2.0**-14, 2.0**-20, 2.0**-24, 2.0**-130, 1000.0])
def test_the_mean_is_the_number(half, scale):
    """Over all 2^16 random bits: up in exactly as many cases as the part that does not fit says, to one in 2^16."""
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(64, generator=generator)
    down, up = neighbours(x, half)
    bits = torch.arange(1 << 16, dtype=torch.int32)
    target = torch.empty(len(x), len(bits), dtype=half)
    round_into(target, x[:, None].expand(target.shape).contiguous(), bits.expand(target.shape))
    assert ((target == down[:, None]) | (target == up[:, None])).all()
    unit = (up.double() - down.double()).abs()
    # float16 takes 13 bits. What float32 cannot hold of a subnormal of it is below 2^-13 of a unit.
    bound = unit * (2.0**-16 if half is torch.bfloat16 else 2.0**-12)
    assert ((target.double().mean(1) - x.double()).abs() <= bound).all()


@each_half
def test_what_has_16_bits_stays_what_it_is(half):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(half)
    for value in (0, 1, 0x7FFF, 0xFFFF):
        target = torch.empty_like(x)
        round_into(target, x.float(), torch.full(x.shape, value, dtype=torch.int32))
        assert_same(target, x, equal_nan=True)


@each_half
def test_past_the_largest_number_it_saturates_and_what_is_not_finite_stays(half):
    largest = torch.finfo(half).max
    x = torch.tensor([largest * 1.0009, -largest * 1.0009, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])
    expected = torch.tensor([largest, -largest, largest, -largest, torch.inf, -torch.inf, torch.nan], dtype=half)
    for value in (0, 0x8000, 0xFFFF):
        target = torch.empty_like(expected)
        round_into(target, x, torch.full(x.shape, value, dtype=torch.int32))
        assert_same(target, expected, equal_nan=True)


@each_half
def test_float64_that_float32_cannot_hold_saturates_too(half):
    largest = torch.finfo(half).max
    x = torch.tensor([3.5e38, -1e300, torch.inf, -torch.inf, torch.nan, 1e-300], dtype=torch.float64)
    target = torch.empty(len(x), dtype=half)
    round_into(target, x, torch.full(x.shape, 0xFFFF, dtype=torch.int32))
    expected = torch.tensor([largest, -largest, torch.inf, -torch.inf, torch.nan, 0.0], dtype=half)
    assert_same(target, expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@every_backend
def test_an_average_of_squares_of_float64_saturates(backend, device):
    """One outlier does not freeze a weight for ever, as an infinite average would."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64, device=device if backend == "triton" else CPU))
    optimizer = AdamW([p], betas=(0.0, 0.5), state_dtype=torch.bfloat16, backend=backend)
    p.grad = torch.tensor([1.0, 1e30, torch.inf, torch.nan], dtype=p.dtype, device=p.device)
    optimizer.step()
    expected = torch.tensor([0.5, torch.finfo(torch.bfloat16).max, torch.inf, torch.nan], dtype=torch.bfloat16)
    assert_same(optimizer.state[p]["exp_avg_sq"].cpu(), expected, equal_nan=True)


@NEEDS_TRITON
@each_half
def test_kernels_round_to_the_same_bits(half, device):
    """Of every exponent, infinities and denormals included: from 0, with a gradient of 0, a weight becomes -m."""
    exponents = torch.arange(256, dtype=torch.int64) << 23
    mantissas = torch.tensor([0, 1, 0x1000, 0x1FFF, 0x8000, 0xFFFF, 0x7FFFFF, 0x400000])
    bits = (exponents[:, None] + mantissas).flatten()
    x = from_bits(torch.cat([bits, bits + 0x80000000]))
    x = x[~x.isnan()]
    results = []
    for backend, where in (("eager", CPU), ("triton", device)):
        p = torch.nn.Parameter(torch.zeros(len(x), dtype=half, device=where))
        options = {"lr": 1.0, "betas": (1 - 2**-24, 0.0), "eps": 1.0, "correct_bias": False}
        optimizer = AdamW([p], **options, stochastic_rounding=True, state_dtype=torch.float32, backend=backend)
        optimizer.init_state()
        optimizer.state[p]["exp_avg"].copy_(-x)
        p.grad = torch.zeros_like(p)
        optimizer.step()  # p = 0 + x / (0 + 1)
        results.append(p.detach().cpu())
    assert_same(*results, equal_nan=True)
    assert results[0].isinf().any() and len(results[0].unique()) > 300


def trajectory(backend, device, half, shapes=((7,), (33, 5), (1025,)), steps=3, lay=None, where=slice(None), **options):
    params = [torch.nn.Parameter((lay or (lambda t: t))(t).to(device)) for t in normal(shapes, 0, half)]
    name = options.pop("name", "AdamW")
    optimizer = OPTIMIZERS[name].cls(params, backend=backend, stochastic_rounding=True, **options)
    for number in range(steps):
        step(optimizer, [g.to(device) for g in normal(shapes, number + 1, half)])
    return optimizer, list(outcome(optimizer))[where]


@NEEDS_TRITON
@each_half
@pytest.mark.parametrize("name", [name for name in PRECISE if name != "Adafactor"])
def test_both_backends_have_the_same_bits(name, half, device):
    assert_same(trajectory("eager", CPU, half, name=name)[1], trajectory("triton", device, half, name=name)[1])


@NEEDS_TRITON
@each_half
def test_both_backends_of_adafactor_round_the_same_elements_up(half, device):
    """They add up sums in another order, so that a few numbers may come to lie on the other side."""
    shapes = [(33, 65), (70,)]
    eager, triton = (
        trajectory(backend, where, half, shapes, steps=1, name="Adafactor")[1]
        for backend, where in (("eager", CPU), ("triton", device))
    )
    for a, b in zip(eager, triton):
        assert float((a["param"] != b["param"]).double().mean()) < 0.002
        assert_near(a["param"], b["param"], rtol=2**-7)


@every_backend
@pytest.mark.parametrize("name", [name for name in PRECISE if name != "Adafactor"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_the_layout_does_not_matter(name, layout, backend, device):
    device = device if backend == "triton" else CPU
    shapes, options = [(13, 10), (40, 70)], {"name": name, "steps": 2}
    expected = trajectory(backend, device, torch.bfloat16, shapes, **options)[1]
    assert_same(trajectory(backend, device, torch.bfloat16, shapes, lay=LAYOUTS[layout], **options)[1], expected)


def large(name, lay, number=0):
    """A step of a parameter that is cut into pieces, or tiles."""
    p = torch.nn.Parameter(lay(normal([(301, 1001)], 0, torch.bfloat16)[0]))
    optimizer = OPTIMIZERS[name].cls([p], stochastic_rounding=True)
    p.grad = normal([(301, 1001)], 1, torch.bfloat16)[0]
    optimizer.step()
    return p.detach().contiguous()


@pytest.mark.parametrize("name", [name for name in PRECISE if name != "Adafactor"])
def test_the_layout_of_large_tensors_does_not_matter(name):
    expected = large(name, LAYOUTS["contiguous"])
    for layout in LAYOUTS:
        assert_same(large(name, LAYOUTS[layout]), expected, layout)


@every_backend
@pytest.mark.parametrize("name", PRECISE)
def test_it_does_not_matter_what_shares_the_launch(name, backend, device):
    """The first parameter, beside others of its size, its shape and other dtypes, and alone."""
    device = device if backend == "triton" else CPU
    shapes = [(33, 5), (33, 5), (7,), (165,)]
    beside = trajectory(backend, device, torch.bfloat16, shapes, steps=2, name=name)[1]
    alone = trajectory(backend, device, torch.bfloat16, shapes[:1], steps=2, name=name)[1]
    assert_same(beside[:1], alone)
    assert not same(beside[0], beside[1])


@every_backend
def test_seeds_numbers_and_steps_make_other_bits(backend, device):
    device = device if backend == "triton" else CPU
    run = [trajectory(backend, device, torch.bfloat16, seed=seed)[1] for seed in (0, 1, 1 << 40, 0)]
    assert_same(run[0], run[3])
    for other in run[1:3]:
        assert not same(run[0][2]["param"], other[2]["param"])
        assert not same(run[0][2]["exp_avg_sq"], other[2]["exp_avg_sq"])


def test_updates_far_below_a_unit_add_up():
    """One in a thousand of a unit, a thousand times: to nearest, nothing would move at all."""
    p = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = Lion([p], lr=2.0**-17, stochastic_rounding=True)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # Of each step the variance is below unit * lr, and there are 10,000 elements.
    deviation = (200 * 2.0**-8 * 2.0**-17 / 10_000) ** 0.5
    assert abs(float(p.detach().double().mean()) - (1 - 200 * 2.0**-17)) < 6 * deviation


# Numbers and resuming.


def numbers(optimizer):
    return [int(optimizer.state[p]["number"]) for group in optimizer.param_groups for p in group["params"]]


def test_numbers_are_places_whatever_gets_a_gradient_first():
    params = parameters([(3,)] * 4, torch.bfloat16)
    optimizer = Lion([{"params": params[:1]}, {"params": params[1:]}], stochastic_rounding=True)
    step(optimizer, [None, None, torch.ones_like(params[2]), None])
    step(optimizer, [torch.ones_like(p) for p in params])
    assert numbers(optimizer) == [0, 1, 2, 3]


def test_numbers_stay_and_stay_unique_when_groups_change():
    params = parameters([(3,)] * 8, torch.bfloat16)
    optimizer = Lion(params[:3], stochastic_rounding=True)

    def go():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        return numbers(optimizer)

    assert go() == [0, 1, 2]
    optimizer.add_param_group({"params": params[3:5]})
    assert go() == [0, 1, 2, 3, 4]
    del optimizer.param_groups[0]["params"][1]
    assert go() == [0, 2, 3, 4]
    optimizer.add_param_group({"params": params[5:6]})
    assert go()[:4] == [0, 2, 3, 4] and len(set(go())) == 5
    optimizer.param_groups[1]["params"][0] = params[6]
    found = go()
    assert len(set(found)) == 5 and found[0:2] == [0, 2]
    optimizer.param_groups.reverse()
    assert sorted(go()) == sorted(found)
    other = Lion([p for group in optimizer.param_groups for p in group["params"]], stochastic_rounding=True)
    saved = optimizer.state_dict()
    saved["param_groups"] = [
        {**saved["param_groups"][0], "params": [i for g in saved["param_groups"] for i in g["params"]]}
    ]
    other.load_state_dict(saved)
    assert numbers(other) == numbers(optimizer)
    other.add_param_group({"params": params[7:]})
    params[7].grad = torch.ones_like(params[7])
    other.step()
    assert len(set(numbers(other))) == 6


@every_backend
@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy"])
@pytest.mark.parametrize("name", [name for name in PRECISE if name != "Adafactor"])
def test_resuming_goes_on_with_the_same_bits(name, how, backend, device):
    device = device if backend == "triton" else CPU
    shapes = [(33, 5), (7,)]
    optimizer, _ = trajectory(backend, device, torch.bfloat16, shapes, steps=2, name=name, seed=5)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if how == "deepcopy":
        params, resumed = copy.deepcopy((params, optimizer))
    else:
        saved = optimizer.state_dict()
        saved = through_a_file(saved) if how == "file" else copy.deepcopy(saved)
        # In another order of making: the first two parameters are others.
        new = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = OPTIMIZERS[name].cls(new, stochastic_rounding=True, seed=5, backend=backend)
        resumed.load_state_dict(saved)
    for number in (7, 8):
        grads = [g.to(device) for g in normal(shapes, number, torch.bfloat16)]
        step(optimizer, grads)
        step(resumed, grads)
    assert_same(list(outcome(resumed)), list(outcome(optimizer)))


def test_the_keys_are_those_of_the_formula():
    """Written out in numpy: what a checkpoint goes on with must not change from version to version."""

    def mix(x):
        x = np.uint32(x)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    with np.errstate(over="ignore"):
        odd, seed, number, at = np.uint32(0x9E3779B9), (5, 7), np.uint32(3), np.uint32(11)
        stream = mix(mix(np.uint32(seed[0]) ^ mix(np.uint32(seed[1]) + odd)) + number * odd)
        key0 = mix(stream ^ at)
        key1 = mix(key0 + stream + at * np.uint32(0x85EBCA6B))
        expected = [mix(mix(np.uint32(i) ^ key0) + key1) for i in range(10)]
    found = words(number=3, at=11, seed=(7 << 32) + 5, n=10)
    assert_same(found, torch.from_numpy(np.array(expected, np.uint32).view(np.int32)))
