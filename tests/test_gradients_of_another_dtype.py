"""Gradients of another dtype than their parameter: 16-bit ones of float32 weights, float32 ones of 16-bit weights."""

import itertools

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.optimizers import BACKENDS, OPTIMIZERS
from helpers.precision import FROZEN, HALVES, PRECISE, normal, outcome

from fusedopt import GradientAccumulator, register_step_in_backward

pytestmark = pytest.mark.filterwarnings(FROZEN)

PAIRS = [pair for pair in itertools.permutations((torch.float32, *HALVES), 2)]
SHAPES = [(33, 5), (7,)]

every_pair = pytest.mark.parametrize("dtype, grad_dtype", PAIRS, ids=lambda d: str(d).removeprefix("torch."))
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def test_there_are_six():
    assert len(PAIRS) == 6


def parameters(dtype, grad_dtype, device):
    params = [torch.nn.Parameter(t.to(device)) for t in normal(SHAPES, 0, dtype)]
    for p in params:
        p.grad_dtype = grad_dtype
    return params


def run(name, dtype, grad_dtype, backend, device, given=None, steps=2, **options):
    """`given`: the dtype in which the same numbers are given."""
    params = parameters(dtype, given or grad_dtype, device)
    optimizer = OPTIMIZERS[name].cls(params, backend=backend, **options)
    for number in range(steps):
        for p, g in zip(params, normal(SHAPES, number + 1, grad_dtype)):
            p.grad = g.to(device, given or grad_dtype)
        optimizer.step()
    return list(outcome(optimizer))


@every_backend
@every_pair
@every_optimizer
def test_they_count_with_all_their_digits(name, dtype, grad_dtype, backend, device):
    """As the same numbers in float64 do, which are rounded to no dtype of 16 bits on their way."""
    device = device if backend == "triton" else torch.device("cpu")
    steps = 1 if name == "Adafactor" and backend == "triton" else 2
    ours = run(name, dtype, grad_dtype, backend, device, steps=steps)
    assert all(state["param"].dtype == dtype for state in ours)
    if dtype == torch.float32:
        expected = run(name, dtype, grad_dtype, backend, device, given=torch.float32, steps=steps)
        assert_near(ours, expected, rtol=1e-6, atol=1e-7)
    elif backend == "eager":
        expected = run(name, dtype, grad_dtype, backend, device, given=torch.float64, steps=steps)
        assert_near(ours, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@every_backend
@every_pair
@pytest.mark.parametrize("name", [name for name in PRECISE if name != "Adafactor"])
def test_none_of_their_digits_is_lost_on_the_way(name, dtype, grad_dtype, backend, device):
    """A first average is the gradient times a number, also where the parameter's dtype has fewer digits."""
    device = device if backend == "triton" else torch.device("cpu")
    p = torch.nn.Parameter(torch.ones(200, dtype=dtype, device=device))
    p.grad_dtype = grad_dtype
    optimizer = OPTIMIZERS[name].cls([p], state_dtype=torch.float32, backend=backend)
    p.grad = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(device, grad_dtype)
    optimizer.step()
    weight = 1.0 - optimizer.param_groups[0]["betas"][name == "Lion"]
    assert_near(optimizer.state[p]["exp_avg"], weight * p.grad.double(), rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("policy", ["master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_float32_gradients_of_16_bit_weights_with_every_policy(half, name, policy):
    """The numbers of 16-bit gradients that are equal to them."""
    options = {policy: True}
    cpu = torch.device("cpu")
    given = run(name, half, torch.bfloat16, "eager", cpu, given=torch.float32, **options)
    if half is torch.bfloat16:
        assert_same(given, run(name, half, half, "eager", cpu, **options))
    else:
        assert_near(given, run(name, half, half, "eager", cpu, **options), rtol=1e-2, atol=1e-3)


@every_pair
def test_from_backward_accumulation_and_a_step_in_backward(dtype, grad_dtype):
    results = []
    for how in ("step", "in backward", "accumulator", "apply_gradients"):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4).to(dtype)
        for p in model.parameters():
            p.grad_dtype = grad_dtype
        optimizer = OPTIMIZERS["AdamW"].cls(model.parameters(), lr=0.01)
        if how == "in backward":
            register_step_in_backward(optimizer, model)
        seen = []
        for p in model.parameters():
            p.register_hook(lambda g, seen=seen: seen.append(g.dtype))
        model(torch.ones(3, 6, dtype=dtype)).float().square().sum().backward()
        params = list(model.parameters())
        if how in ("accumulator", "apply_gradients"):
            grads = [p.grad for p in params]
            assert {g.dtype for g in grads} == {grad_dtype}
            scale = 1.0
            if how == "accumulator":
                accumulator = GradientAccumulator()
                accumulator(grads)
                grads, scale = accumulator.gradients, accumulator.scale
            optimizer.apply_gradients(zip(grads, params), scale=scale)
        else:
            optimizer.step()
        results.append(list(outcome(optimizer)))
    for other in results[1:]:
        assert_same(other, results[0])
