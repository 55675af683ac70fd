"""Rates that are functions of the step where only the device knows which steps were skipped, or a graph is replayed."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from keras_cases import BACKENDS, device_of, parameter, step
from schedule_cases import CLOSED_FORMS
from test_capture import capture  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt import AdamW, create_optimizer, register_step_in_backward
from fusedopt.closed_forms import PolynomialSchedule
from fusedopt.keras import AdamWeightDecay
from fusedopt.keras_schedules import PolynomialDecay, WarmUp, rate_on_device, takes_tensors
from fusedopt.recorder import LRRecorder

RATE = WarmUp(0.5, PolynomialDecay(0.5, 8, 0.1, power=2.0), 3)
ON_TRITON = BACKENDS[1].marks
OPTIONS = {"weight_decay_rate": 0.1, "decay": 0.25}

# What a GradScaler finds in the gradients of each step.
FOUND = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def gradient(number, like):
    return torch.full_like(like, [1.0, -2.0, 3.0, 0.5, -1.0, 2.0, -0.25][number])


def scaled_step(optimizer, number, found=None):
    """A step as a GradScaler takes it; with skip_nonfinite, the gradient itself is what is not finite."""
    skips = FOUND[number] if found is None else found
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = gradient(number, p)
            if optimizer.guard.skip_nonfinite and skips:
                p.grad[0] = float("inf")
    if not optimizer.guard.skip_nonfinite:
        optimizer.found_inf = torch.tensor([skips], device=p.device)
    try:
        optimizer.step()
    finally:
        optimizer.forget_scaler()


def by_hand(params, backend):
    """The same run without a schedule: only the steps that count, each with its rate set from outside."""
    optimizer = AdamWeightDecay(params, 0.5, weight_decay_rate=0.1, backend=backend)
    applied = [number for number, found in enumerate(FOUND) if not found]
    for taken, number in enumerate(applied):
        for group in optimizer.param_groups:
            group["lr"] = RATE(taken) / (1 + 0.25 * taken)
            for p in group["params"]:
                p.grad = gradient(number, p)
        optimizer.step()


def groups(device):
    return [{"params": [parameter(1.0, -2.0, 3.0, device=device)]}, {"params": [parameter(0.5, device=device)]}]


def values(some):
    return [p for group in some for p in group["params"]]


@pytest.mark.parametrize(
    "schedule",
    [
        RATE,
        PolynomialDecay(0.4, 5, 0.1, cycle=True),
        WarmUp(0.1, WarmUp(0.3, PolynomialDecay(0.4, 5), 2, power=0.5), 0),
        WarmUp(0.1, PolynomialDecay(0.4, 5, power=0.0), 3, power=0.0),
        *CLOSED_FORMS.values(),
    ],
    ids=repr,
)
def test_a_rate_worked_out_from_a_tensor_is_that_of_a_number(schedule):
    assert takes_tensors(schedule)
    for n in range(60):
        rate = rate_on_device(schedule, torch.tensor(float(n)))
        assert rate.dtype == torch.float64 and rate.shape == ()
        assert rate.item() == pytest.approx(schedule(n), rel=1e-13)


@pytest.mark.parametrize(
    "function",
    [
        lambda step: 0.1,
        WarmUp(0.1, lambda step: 0.1, 3),
        PolynomialDecay(0.1, 0),
        PolynomialDecay(0.1, 5, -0.1),
        WarmUp(0.1, PolynomialDecay(0.1, 0), 3),
        PolynomialSchedule(1, 5, lr_init=0.1, lr_end=-0.1),
        type("Mine", (WarmUp,), {})(0.1, RATE, 3),
    ],
    ids=str,
)
def test_what_the_host_has_to_look_at_is_not_worked_out_on_the_device(function):
    assert not takes_tensors(function)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip_nonfinite", [False, True], ids=["scaler", "skip_nonfinite"])
def test_a_skipped_step_does_not_move_the_schedule_on(backend, skip_nonfinite):
    ours, expected = groups(device_of(backend)), groups(device_of(backend))
    optimizer = AdamWeightDecay(ours, RATE, skip_nonfinite=skip_nonfinite, backend=backend, **OPTIONS)
    recorder = LRRecorder(optimizer)
    for number in range(len(FOUND)):
        scaled_step(optimizer, number)
    by_hand(expected, backend)
    for p, q in zip(values(ours), values(expected)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0.0)
    assert optimizer.iterations == FOUND.count(0.0) == 4
    assert recorder.rates[:, 0].tolist() == pytest.approx([RATE(n) for n in (0, 0, 1, 2, 2, 2, 3)], rel=1e-13)
    assert [group["iterations"] for group in optimizer.param_groups] == [4, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_create_optimizer_with_a_grad_scaler_whose_scale_overflows(backend):
    device = device_of(backend)
    model = torch.nn.Linear(3, 1).to(device)
    optimizer, schedule = create_optimizer(
        model, 0.1, 20, 4, weight_decay_rate=0.1, adam_global_clipnorm=1.0, backend=backend
    )
    scaler = torch.amp.GradScaler(device, init_scale=2.0**127, backoff_factor=2.0**-60, growth_interval=100)
    rates = []
    for _ in range(4):
        scaler.scale(model(100 * torch.ones(2, 3, device=device)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([schedule(n) for n in (0, 0, 1, 2)], rel=1e-13)
    assert optimizer.iterations == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [lambda: (lambda n: 0.5 / (n + 1)), lambda: WarmUp(0.5, lambda n: 0.25, 3)], ids=str)
def test_a_function_of_the_users_counts_calls_as_ever(make, backend):
    function = make()
    optimizer = AdamWeightDecay(groups(device_of(backend)), function, backend=backend)
    for number in range(len(FOUND)):
        scaled_step(optimizer, number)
        assert optimizer.param_groups[1]["lr"] == function(number)
    assert optimizer.iterations == len(FOUND)


def test_without_anything_that_skips_the_rate_is_a_float(backend="triton"):
    for backend in ("eager", "triton"):
        if backend == "triton" and device_of("triton") == "cpu" and not ON_TRITON:
            continue
    optimizer = AdamWeightDecay([parameter()], RATE)
    for n in range(3):
        step(optimizer)
        assert optimizer.param_groups[0]["lr"] == RATE(n) and type(optimizer.param_groups[0]["lr"]) is float
