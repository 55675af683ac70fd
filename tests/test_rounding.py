"""Numbers that are worked out in float64 and kept in 16 bits are rounded once, on every backend."""

import importlib.util

import numpy as np
import pytest
import torch
from helpers.comparing import assert_same

from fusedopt import AdamW
from fusedopt.accumulate import GradientAccumulator
from fusedopt.backends.eager.rounding import random_keys, round_into
from fusedopt.backends.eager.storage import Storage
from fusedopt.interface import ShardInfo, ShardPosition

HALVES = {torch.bfloat16: 8, torch.float16: 11}
"""16-bit dtypes and the digits of their numbers."""

BACKENDS = ["eager", *["triton"] * (importlib.util.find_spec("triton") is not None)]
each_half = pytest.mark.parametrize("half", HALVES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def beside_ties(half):
    """float64 so close above, at and below ties of a 16-bit dtype that float32 puts all of them on the tie."""
    digits = HALVES[half]
    ties = 1.0 + (2.0 * torch.arange(2 ** (digits - 1), dtype=torch.float64) + 1.0) * 2.0**-digits
    return torch.cat([sign * (ties + beside) for beside in (0.0, 2.0**-40, -(2.0**-40)) for sign in (1.0, -1.0)])


def rounded_once(exact, half):
    """By numpy: to float16 as it does, to bfloat16 by the integer that a number is of its last digit."""
    if half is torch.float16:
        return torch.from_numpy(exact.numpy().astype(np.float16))
    fraction, exponent = np.frexp(exact.numpy())
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8)).to(half)


@each_half
def test_float64_is_rounded_to_the_nearest_number_of_16_bits(half):
    exact = beside_ties(half)
    scales = 2.0 ** torch.arange(-120 if half is torch.bfloat16 else -20, 14, dtype=torch.float64)
    exact = torch.outer(exact, scales)
    target = torch.empty_like(exact, dtype=half)
    round_into(target, exact)
    assert_same(target, rounded_once(exact, half))
    assert not torch.equal(exact.to(half), target)  # torch rounds twice, or the numbers are too easy


@each_half
def test_what_is_no_ordinary_number_is_rounded_as_by_torch(half):
    exact = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e300, -1e300, 1e-300, -1e-300, 3.4028236e38])
    exact = exact.double()
    exact[5:9] = torch.tensor([1e300, -1e300, 1e-300, -1e-300], dtype=torch.float64)
    target = torch.empty_like(exact, dtype=half)
    round_into(target, exact)
    expected = exact.to(half)
    assert_same(target.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))
    assert_same(target.signbit()[~exact.isnan()], expected.signbit()[~exact.isnan()])


@each_half
@each_backend
def test_moments_of_16_bits_of_a_float64_parameter_are_rounded_once(half, backend, device):
    device = device if backend == "triton" else torch.device("cpu")
    exact = beside_ties(half)
    p = torch.nn.Parameter(torch.zeros_like(exact, device=device))
    optimizer = AdamW([p], lr=0.1, betas=(0.5, 0.75), amsgrad=True, backend=backend)
    optimizer.init_state()
    state = optimizer.state[p]
    state.update({name: value.to(half) for name, value in state.items() if name != "step"})
    optimizer.apply_gradients([(2.0 * exact.to(device), p)])
    assert_same(state["exp_avg"].cpu(), rounded_once(exact, half))
    square = rounded_once(exact * exact, half)
    assert_same(state["exp_avg_sq"].cpu(), square)
    assert_same(state["max_exp_avg_sq"].cpu(), square)


@each_half
@each_backend
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_float64_gradients_are_rounded_once_when_they_are_added_to_sums_of_16_bits(weight, half, backend, device):
    device = device if backend == "triton" else torch.device("cpu")
    exact = beside_ties(half)
    accumulator = GradientAccumulator(half, backend=backend)
    for _ in range(2):
        accumulator([exact.to(device) / weight], weight)
    (total,) = accumulator.gradients
    expected = rounded_once(rounded_once(exact, half).double() + exact, half)
    assert_same(total.cpu(), expected)


def test_shards_that_are_updated_together_have_the_random_words_of_their_places():
    keys, positions = random_keys(5, [0, 1], 1.0), [ShardPosition(3, 9, 4), ShardPosition(10, 0, 2**32 - 5)]
    infos = [ShardInfo(torch.Size((100,)), (), (), (), position) for position in positions]
    both = Storage([None] * 2, True, keys, infos).words([0, 1], [6, 10], 0, torch.device("cpu"))
    for i, places in enumerate(([4, 5, 6, 16, 17, 18], range(2**32 - 5, 2**32 + 5))):
        for word, place in zip(both.split([6, 10])[i], places):
            info = infos[i]._replace(position=ShardPosition(1, 0, place))
            alone = Storage([None], True, keys[i : i + 1], [info]).words([0], [1], 0, torch.device("cpu"))
            assert alone == word
