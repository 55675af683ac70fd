"""Rates that are functions of the step when only the device knows which steps were skipped, or a graph is replayed."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.keras import BACKENDS, device_of, parameter, step
from helpers.schedules import CLOSED_FORMS
from helpers.waits import Waits
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt import checks, create_optimizer, register_step_in_backward
from fusedopt.interface import StepArgs
from fusedopt.keras import AdamWeightDecay
from fusedopt.keras.schedules import PolynomialDecay, WarmUp, rate_on_device, takes_tensors
from fusedopt.schedules.forms import PolynomialSchedule
from fusedopt.schedules.recorder import LRRecorder

RATE = WarmUp(0.5, PolynomialDecay(0.5, 8, 0.1, power=2.0), 3)
TRITON = pytest.mark.parametrize("backend", BACKENDS[1:])
OPTIONS = {"weight_decay_rate": 0.1, "decay": 0.25}

# The `found_inf` of a GradScaler at each step.
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
    ids=[
        "a function",
        "a function after a warm-up",
        "no steps",
        "a negative end",
        "no steps after a warm-up",
        "a negative end of a polynomial",
        "a subclass",
    ],
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
    assert_near(values(ours), values(expected), rtol=1e-6, atol=0.0)
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
@pytest.mark.parametrize(
    "make", [lambda: lambda n: 0.5 / (n + 1), lambda: WarmUp(0.5, lambda n: 0.25, 3)], ids=["alone", "warmed up"]
)
def test_a_function_of_the_users_counts_calls_as_ever(make, backend):
    function = make()
    optimizer = AdamWeightDecay(groups(device_of(backend)), function, backend=backend)
    for number in range(len(FOUND)):
        scaled_step(optimizer, number)
        assert optimizer.param_groups[1]["lr"] == function(number)
    assert optimizer.iterations == len(FOUND)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_no_step_can_be_skipped_the_rate_is_a_float(backend):
    optimizer = AdamWeightDecay([parameter(device=device_of(backend))], RATE, backend=backend)
    for n in range(3):
        step(optimizer)
        assert optimizer.param_groups[0]["lr"] == RATE(n) and type(optimizer.param_groups[0]["lr"]) is float


@TRITON
def test_a_step_that_may_be_skipped_waits_for_nothing(backend):
    optimizer = AdamWeightDecay(groups(device_of(backend)), RATE, backend=backend, **OPTIONS)
    scaled_step(optimizer, 0)
    optimizer.found_inf = torch.tensor([1.0], device=device_of(backend))
    with Waits() as waits:
        optimizer.follow_schedule()
        optimizer.hyper(optimizer.param_groups[0])
        optimizer.after_step(StepArgs(found_inf=torch.tensor(1.0, device=device_of(backend))))
    assert waits.count == 0
    with waits:
        assert optimizer.iterations == 0
    assert waits.count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["checkpoint", "deepcopy", "pickle"])
def test_a_run_goes_on_after_a_skipped_step(how, backend):
    """At the step that was the next one; numbers in a checkpoint are Python's, whatever knew them."""
    device = device_of(backend)
    ours, expected = groups(device), groups(device)
    optimizer = AdamWeightDecay(ours, RATE, backend=backend, **OPTIONS)
    for number in range(4):
        scaled_step(optimizer, number)
    by_hand(expected, backend)
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        saved = copy.deepcopy(optimizer.state_dict())
        assert [(group["iterations"], group["lr"]) for group in saved["param_groups"]] == [(2, RATE(2))] * 2
        assert {(type(group["iterations"]), type(group["lr"])) for group in saved["param_groups"]} == {(int, float)}
        other = AdamWeightDecay(copy.deepcopy(ours), RATE, backend=backend, **OPTIONS)
        other.load_state_dict(saved)
    for number in range(4, len(FOUND)):
        scaled_step(other, number)
    assert_near(values(other.param_groups), values(expected), rtol=1e-6, atol=0.0)
    assert other.iterations == 4 and optimizer.iterations == 2


@TRITON
@pytest.mark.parametrize("hand", ["assigns", "fills", "scheduler"])
def test_a_second_hand_on_a_rate_on_the_device_is_refused(hand, backend):
    optimizer = AdamWeightDecay([parameter(device=device_of(backend))], RATE, backend=backend)
    for number in range(3):
        scaled_step(optimizer, number)
    (p,) = values(optimizer.param_groups)
    before = p.detach().clone()
    if hand == "assigns":
        optimizer.param_groups[0]["lr"] = 0.25
    elif hand == "fills":
        optimizer.param_groups[0]["lr"].fill_(0.25)
    else:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5)
    with pytest.raises(ValueError, match="by a torch scheduler or by hand, but learning_rate is a function"):
        scaled_step(optimizer, 5)
    assert_same(p, before)
    assert optimizer.iterations == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_raised_does_not_move_the_schedule_on(backend):
    optimizer = AdamWeightDecay([parameter(device=device_of(backend))], RATE, backend=backend)
    for number in range(3):
        scaled_step(optimizer, number)
    (p,) = values(optimizer.param_groups)
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.iterations == 2
    scaled_step(optimizer, 5)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(RATE(2), rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_in_backward_uses_the_rate_of_the_applied_steps(backend):
    """After a scaler has made steps skip, and was given up."""
    device = device_of(backend)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to(device)
    optimizer = AdamWeightDecay(model.named_parameters(), RATE, backend=backend, **OPTIONS)
    for number in (0, 1):
        scaled_step(optimizer, number)
    optimizer.zero_grad()
    other = copy.deepcopy(model)
    expected = AdamWeightDecay(other.named_parameters(), RATE, backend=backend, **OPTIONS)
    expected.load_state_dict(optimizer.state_dict())
    register_step_in_backward(optimizer, model)
    for _ in range(3):
        for one, own in ((model, optimizer), (other, expected)):
            one(torch.ones(2, 3, device=device)).square().sum().backward()
            own.step()
            own.zero_grad()
    assert_near(model, other, rtol=1e-6, atol=0.0)
    assert optimizer.iterations == expected.iterations == 4
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(RATE(3), rel=1e-13)


# CUDA graphs: what torch queues is recorded too, and run again.


class Recorded(TorchDispatchMode):
    """What torch operations a graph keeps: run again, they write where they wrote.

    A capture runs nothing, so what was there before it is as it was.
    """

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph is captured, and the host waits"
        if func._schema.is_mutable:

            def again():
                with torch.autograd._unsafe_preserve_version_counter(args[0]):  # A replay passes torch by.
                    func(*args, **kwargs)

            before = None if args[0].data_ptr() in {t.data_ptr() for t in self.made} else args[0].clone()
            out = func(*args, **kwargs)
            self.graph.queued.append(again)
            if before is not None:
                args[0].copy_(before)
            return out
        out = func(*args, **kwargs)
        if not func.is_view and isinstance(out, torch.Tensor):
            self.made.append(out)
            self.graph.queued.append(lambda: out.copy_(func(*args, **kwargs)))
        return out


@contextmanager
def captured(capture):
    with capture() as graph, Recorded(graph):
        yield graph


@pytest.fixture
def values_are_not_read(monkeypatch):
    """Of tensors on a GPU, for which those of these tests stand in, a step looks at the kind and not at the value."""
    monkeypatch.setattr("fusedopt.optimizer.state_check.has_data", lambda t: False)
    in_use = checks.rate_in_use
    monkeypatch.setattr(checks, "rate_in_use", lambda rate: 0.0 if isinstance(rate, torch.Tensor) else in_use(rate))


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.usefixtures("values_are_not_read")
def test_a_captured_schedule_goes_on_with_every_replay_that_counts(capture):
    """And with the steps between replays; a step that a GradScaler's overflow skips does not count."""
    ours, expected = [parameter(1.0, -2.0, 3.0)], [parameter(1.0, -2.0, 3.0)]
    optimizer = AdamWeightDecay(ours, RATE, backend="triton", **OPTIONS)
    eager = AdamWeightDecay(expected, RATE, backend="eager", **OPTIONS)
    static, found = torch.ones(3), torch.zeros(1)

    def take(one, p, g):
        p.grad, one.found_inf = g, found
        one.step()

    for one, p in ((optimizer, ours[0]), (eager, expected[0])):
        p.grad = static
        one.step()
    with captured(capture) as graph:
        take(optimizer, ours[0], static)
    rates = []
    for turn, (value, skipped) in enumerate(((1.0, 0.0), (-2.0, 0.0), (0.0, 1.0), (0.5, 0.0), (3.0, 0.0))):
        static.fill_(value)
        found.fill_(skipped)
        if turn == 3:
            take(optimizer, ours[0], static)
        else:
            graph.replay()
        take(eager, expected[0], static.clone())
        rates.append(float(optimizer.param_groups[0]["lr"]))
        assert_near(ours[0], expected[0], rtol=1e-6, atol=0.0)
    assert rates == pytest.approx([RATE(n) for n in (1, 2, 3, 3, 4)], rel=1e-13)
    assert optimizer.iterations == eager.iterations == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.usefixtures("values_are_not_read")
def test_replays_count_where_nothing_can_be_skipped(capture):
    p = parameter()
    optimizer = AdamWeightDecay([p], RATE, backend="triton")
    p.grad = torch.ones_like(p)
    optimizer.step()
    with captured(capture) as graph:
        optimizer.step()
    for taken in (2, 3, 4):
        graph.replay()
        assert optimizer.iterations == taken
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(RATE(taken - 1), rel=1e-13)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_a_capture_before_the_first_step_is_refused(capture):
    p = parameter()
    optimizer = AdamWeightDecay([p], RATE, backend="triton")
    optimizer.init_state()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="take one step before the capture"), capture():
        optimizer.step()
    assert optimizer.iterations == 0 and p.tolist() == [1.0, -2.0]
