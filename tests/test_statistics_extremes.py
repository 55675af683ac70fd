"""Statistics of numbers whose squares no float can hold, and of many numbers of one size."""

import math

import pytest
import torch
from helpers.comparing import assert_near
from helpers.measured import RTOL, expected, made
from helpers.optimizers import BACKENDS, every_optimizer
from torch import nn

from fusedopt import AdamWeightDecay, Lion

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18])
def test_all_magnitudes(size, backend):
    """Squares of which float32 holds none, or a few bits."""
    p = nn.Parameter(torch.full((5000,), size))
    optimizer = Lion([p], lr=size, backend=backend, track_statistics=True)
    p.grad = torch.full((5000,), -size)
    optimizer.step()
    norm = float(torch.full((5000,), size).double().norm())
    assert_near(
        optimizer.statistics.tensor[0],
        torch.tensor([norm, norm, norm, norm / 5000**0.5, 1.0, 0.0], dtype=torch.float64),
        rtol=RTOL,
    )


def test_many_numbers_of_one_size():
    """float32 sums of them go astray: all of Lion's updates are of one size."""
    p = nn.Parameter(torch.full((3_000_000,), 1.9999))
    optimizer = Lion([p], lr=0.1234567, track_statistics=True)
    p.grad = torch.full_like(p, 0.7654321)
    before = p.detach().double()
    optimizer.step()
    wanted = expected([p], [before], *[[p.detach().double()]] * 2, 1.0)
    assert_near(optimizer.statistics.tensor, wanted, rtol=RTOL)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_are_right_up_to_1e154_and_inf_beyond(backend):
    """Roots of float64 sums of squares; the largest update is not squared."""
    for size, seen in ((1e150, 1e151), (1e200, math.inf)):
        p = nn.Parameter(torch.full((100,), size, dtype=torch.float64))
        optimizer = Lion([p], lr=size, backend=backend, track_statistics=True)
        p.grad = torch.full_like(p, size)
        optimizer.step()
        numbers = optimizer.statistics.to_dict()
        norms = [numbers[f"{name}/0.0"] for name in ("grad_norm", "weight_norm", "update_norm", "largest_update")]
        assert norms == pytest.approx([seen, seen, seen, size], rel=RTOL)
        assert p.eq(0.0).all()


EVERY_WAY = [(), (1,), (5,), (1023,), (1024,), (1025,), (2048,), (5000,), (1 << 14 | 1,), (40, 33), (190, 200)]
"""Numbers, whole rows of what is added up at a time and rests of one element, what is joined, cut, or done in tiles."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {"track_statistics": True},
        {"track_statistics": True, "max_grad_norm": 1.0},
        {"track_statistics": True, "skip_nonfinite": True},
        {"skip_outliers": 3.0, "max_grad_norm": 1.0},
        {},
    ],
    ids=str,
)
@every_optimizer
def test_a_step_ends_however_large_its_numbers_are(name, options):
    """float64 gradients, weights and updates whose squares overflow, together and one by one."""
    for shapes in (EVERY_WAY, *([shape] for shape in EVERY_WAY)):
        for large in ("gradient", "weight", "both"):
            params = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
            for p in params:
                p.data.mul_(1.0 if large == "gradient" else 1e200)
                p.grad = torch.full_like(p, 1.0 if large == "weight" else 1e200)
            optimizer = made(name, params, **options)
            optimizer.step()
            beyond = large != "weight"
            if options.get("track_statistics"):
                grad_norm, weight_norm = optimizer.statistics.tensor[:, :2].unbind(1)
                assert grad_norm.isinf().all() or not beyond
                assert weight_norm.isinf().all() or large == "gradient"
            if options:
                assert math.isinf(float(optimizer.grad_norm or 0.0)) == (beyond and len(options) > 1)
            optimizer.step()
            skips = optimizer.skipped_steps is not None
            assert int(optimizer.skipped_steps or 0) == (2 if beyond and skips else 0)
            taken = 0.0 if beyond and skips else 2.0
            assert all(float(state["step"]) == taken for state in optimizer.state.values() if state)


@pytest.mark.filterwarnings("error")
@every_optimizer
def test_sums_that_overflow_are_inf_without_a_word(name):
    """Of rows whose own sums do not. numpy would warn, and raise where it is told to."""
    p = nn.Parameter(torch.full((4 * 1024,), 4e152, dtype=torch.float64))
    optimizer = made(name, [p], track_statistics=True)
    p.grad = p.detach().clone()
    optimizer.step()
    assert optimizer.statistics.tensor[0, :2].tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("clipping", [{}, {"clipvalue": 1.0}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_square_of_a_scale_may_overflow(backend, clipping):
    cases = ((1e200, 0.0, 0.0), (1e200, 1e-150, 1e50), (1e-200, 1e140, 1e-60), (1e-200, 1e200, math.inf))
    for scale, size, seen in cases:
        p = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = AdamWeightDecay([("w", p)], backend=backend, track_statistics=True, **clipping)
        optimizer.apply_gradients([(torch.full_like(p, size / 2.0), p)], scale=scale)
        assert optimizer.statistics.to_dict()["grad_norm/w"] == pytest.approx(seen, rel=RTOL, abs=0.0)
