"""CUDA graphs without a GPU: what a captured step queues is recorded, and run again at every replay.

The stand-in graph keeps what a real one keeps: the copies from pinned memory and the launches, with their addresses.
"""

import pytest
import torch
from helpers.adamw import gradients, parameters
from helpers.comparing import assert_same
from helpers.optimizers import OPTIMIZERS, every_optimizer
from helpers.waits import Waits

from fusedopt import AdamW, Lion, register_step_in_backward
from fusedopt.backends.triton.adamw import TritonAdamW
from fusedopt.backends.triton.scalars import DeviceScalars

CPU = torch.device("cpu")
SIZES = (7, 48, 1025)
OPTIONS = {"weight_decay": 0.1, "amsgrad": True, "backend": "triton"}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def step(optimizer, params, grads):
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()


@pytest.fixture
def two():
    """Two equal optimizers with a step behind them: one to capture, one to take the same steps eagerly."""
    pairs = []
    for _ in range(2):
        params = parameters(CPU, SIZES)
        lr = torch.tensor(0.1)
        optimizer = AdamW(params, lr=lr, **OPTIONS)
        step(optimizer, params, gradients(params, 0))
        pairs.append((optimizer, params, lr))
    return pairs


def assert_equal(two):
    (ours, params, _), (theirs, expected, _) = two
    assert_same(params, expected)
    assert_same([ours.state[p] for p in params], [theirs.state[p] for p in expected])


def test_capture_eager_step_with_other_gradients_replay(capture, two):
    (ours, params, _), (theirs, expected, _) = two
    static, other, third = gradients(params, 1), gradients(params, 2), gradients(params, 3)
    with capture() as graph:
        step(ours, params, static)
    for _ in range(2):
        graph.replay()
        step(theirs, expected, static)
    assert_equal(two)
    for grads in (other, third):
        for optimizer, own, rate in two:
            step(optimizer, own, grads)
            rate.mul_(0.5)
        assert_equal(two)
        for g in static:
            g.mul_(-2.0)
        graph.replay()
        step(theirs, expected, static)
        assert_equal(two)


def test_two_graphs_in_turn_and_one_that_lacks_a_gradient(capture, two):
    (ours, params, _), (theirs, expected, _) = two
    grads = [gradients(params, 1), [None, *gradients(params, 2)[1:]]]
    graphs = []
    for some in grads:
        params[0].requires_grad_(some[0] is not None)
        with capture() as graph:
            step(ours, params, some)
        graphs.append(graph)
    for turn in (0, 1, 1, 0):
        graphs[turn].replay()
        step(theirs, expected, grads[turn])
        assert_equal(two)


def test_a_graph_outlives_what_the_optimizer_derived(capture, two):
    (ours, params, _), (theirs, expected, _) = two
    grads = gradients(params, 1)
    with capture() as graph:
        step(ours, params, grads)
    for optimizer, _, _ in two:
        optimizer.add_param_group({"params": parameters(CPU, (5,))})
    (captured,) = ours._engine.captured
    assert captured.captured and not ours._engine.steppers
    graph.replay()
    step(theirs, expected, grads)
    assert_equal(two)


def test_a_float_is_kept_as_it_was(capture):
    params = parameters(CPU, (16,))
    optimizer = AdamW(params, lr=0.5, betas=(0.0, 0.0), eps=0.0, correct_bias=False, backend="triton")
    grads = [torch.ones(16)]
    step(optimizer, params, grads)
    with capture() as graph:
        step(optimizer, params, grads)
    optimizer.param_groups[0]["lr"] = 100.0
    before = params[0].detach().clone()
    graph.replay()
    assert_same(params[0], before - 0.5)


def test_captures_in_a_row(capture, two):
    """There is room for sixteen, and for as many again after an eager step."""
    optimizer, params, _ = two[0]
    grads = gradients(params, 1)
    for _ in range(2):
        for _ in range(16):
            with capture():
                step(optimizer, params, grads)
        step(optimizer, params, grads)
    with pytest.raises(RuntimeError, match="no pinned memory for another captured step"):
        for _ in range(100):
            with capture():
                step(optimizer, params, grads)


def refused(capture, optimizer, params, grads, match):
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=match), capture() as graph:
        step(optimizer, params, grads)
    assert_same(params, before)
    assert not graph.launches


def test_capture_without_a_step_before_it(capture):
    params = parameters(CPU, SIZES)
    optimizer = AdamW(params, backend="triton")
    refused(capture, optimizer, params, gradients(params, 0), "before the optimizer has state.*take one step")
    assert not optimizer.state
    optimizer.init_state()
    refused(capture, optimizer, params, gradients(params, 0), "no pinned memory .* take one step outside")
    assert all(float(state["step"]) == 0.0 for state in optimizer.state.values())
    step(optimizer, params, gradients(params, 0))
    with capture():
        step(optimizer, params, gradients(params, 0))


def test_capture_of_a_launch_that_never_ran(capture, two):
    optimizer, params, _ = two[0]
    params[0].data = params[0].data.double()
    refused(capture, optimizer, params, gradients(params, 1), "no step before it had tensors of these dtypes.*take one")


def test_counts_that_would_be_converted_at_every_replay_are_refused(capture, two):
    """From the same float32 number, so that replays would not count; an eager step converts them for good."""
    (ours, params, _), (theirs, expected, _) = two
    grads = gradients(params, 1)
    for p in params:
        ours.state[p]["step"] = ours.state[p]["step"].float()
    refused(capture, ours, params, grads, "is torch.float32 on cpu, and every replay .*: take a step before")
    assert {ours.state[p]["step"].dtype for p in params} == {torch.float32}
    step(ours, params, grads)
    with capture() as graph:
        step(ours, params, grads)
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        step(theirs, expected, grads)
    assert_equal(two)


UNTRAINED = "requires a gradient and has none in the step that is being captured"


@every_optimizer
def test_a_parameter_that_would_never_be_trained_is_refused(capture, name):
    """Whether others have a gradient or not; one that requires none is left alone."""
    params = parameters(CPU, SIZES)
    optimizer = OPTIMIZERS[name](params, backend="triton")
    step(optimizer, params, gradients(params, 0))
    grads = [None, *gradients(params, 1)[1:]]
    for some in (grads, [None] * len(params)):
        refused(capture, optimizer, params, some, f"^parameter 0 of group 0 {UNTRAINED}")
    step(optimizer, params, grads)  # which is none of its business
    params[0].requires_grad_(False)
    with capture():
        step(optimizer, params, grads)


def test_the_parameter_that_would_never_be_trained_is_named(capture):
    params = parameters(CPU, SIZES)
    groups = [{"params": [("first", params[0])]}, {"params": [(f"layer.{i}", p) for i, p in enumerate(params[1:])]}]
    optimizer = AdamW(groups, backend="triton")
    step(optimizer, params, gradients(params, 0))
    grads = gradients(params, 1)
    refused(capture, optimizer, params, [*grads[:-1], None], f"^parameter 'layer.{len(params) - 2}' {UNTRAINED}")


def test_what_is_left_out_on_purpose_is_not_refused(capture):
    """Parameters that `apply_gradients` was not given, and those without elements, which have nothing to train."""
    empty = torch.nn.Parameter(torch.ones(0, 3))
    params = [*parameters(CPU, SIZES), empty]
    optimizer = AdamW(params, backend="triton")
    step(optimizer, params[:-1], gradients(params[:-1], 0))
    with capture():
        step(optimizer, params[:-1], gradients(params[:-1], 1))
    pairs = list(zip(gradients(params, 2), params))
    optimizer.apply_gradients(pairs[1:])
    with capture():
        optimizer.apply_gradients(pairs[1:])
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"^parameter 0 of group 0 {UNTRAINED}"), capture():
        optimizer.apply_gradients([(None, params[0]), *pairs[1:]])
    assert_same([p.detach() for p in params], before)


def test_a_step_in_backward_knows_what_it_has_updated(capture):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = AdamW(model.parameters(), backend="triton")
    handle = register_step_in_backward(optimizer, model)
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    with capture():
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    with capture(), pytest.raises(RuntimeError, match="requires a gradient and has none"):
        model[0](torch.ones(3, 4)).sum().backward()
        optimizer.step()
    handle.remove()
    with capture(), pytest.raises(RuntimeError, match="requires a gradient and has none"):
        optimizer.step()


WAYS = {
    "nearest": {},
    "stochastic": {"stochastic_rounding": True},
    "master": {"master_weights": True},
    "statistics": {"track_statistics": True},
    "clipped": {"max_grad_norm": 0.5},
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_but_the_first_waits_for_the_device(name, how):
    """Nor looks at what it has written itself, as `.tolist()` would."""
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters(CPU, SIZES)]
    optimizer = OPTIMIZERS[name].at(0.1, params, backend="triton", **WAYS[how])
    step(optimizer, params, gradients(params, 0))
    for seed in (1, 2):
        with Waits() as waits:
            step(optimizer, params, gradients(params, seed))
        assert waits.lists == 0
    assert waits.count == 0  # Before, counts on a CPU are checked.


def test_numbers_that_were_loaded_are_read_before_a_capture(capture):
    """Those that a step has given, or read, are known."""
    runs = []
    for _ in range(2):
        params = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters(CPU, SIZES)]
        optimizer = AdamW(params, **OPTIONS, stochastic_rounding=True, seed=3)
        step(optimizer, params, gradients(params, 0))
        runs.append((optimizer, params))
    (ours, params), (theirs, expected) = runs
    ours.load_state_dict(ours.state_dict())
    before = [p.detach().clone() for p in params]
    refused = pytest.raises(RuntimeError, match=r"numbers for random rounding .* take a step before the capture")
    with refused, capture():
        step(ours, params, gradients(params, 1))
    assert_same(params, before)
    for optimizer, own in runs:
        step(optimizer, own, gradients(own, 1))
    grads = gradients(params, 2)
    with Waits() as waits, capture() as graph:
        step(ours, params, grads)
    assert waits.count == waits.lists == 0
    graph.replay()
    step(theirs, expected, grads)
    assert_same(params, expected)


def test_a_number_on_the_cpu_is_refused(capture):
    """Its present value would be frozen into the graph."""
    numbers = DeviceScalars(torch.device("cuda", 0))
    assert numbers.number("lr", torch.tensor(0.5)) == (0.5, 0, 0)
    with capture(), pytest.raises(RuntimeError, match=r"lr is a tensor on cpu, .* make it a tensor on cuda:0"):
        numbers.number("lr", torch.tensor(0.5))
    with capture():
        assert numbers.number("lr", 0.5) == (0.5, 0, 0)


def test_a_callable_learning_rate_is_refused():
    with pytest.raises(ValueError, match="lr must be a number"):
        AdamW(parameters(CPU, SIZES), lr=lambda step: 0.1, backend="triton")


def test_outside_of_captures_nothing_is_kept():
    params = parameters(CPU, SIZES)
    optimizer = AdamW(params, backend="triton")
    for seed in range(3):
        step(optimizer, params, gradients(params, seed))
    (stepper,) = optimizer._engine.steppers.values()
    assert isinstance(stepper, TritonAdamW) and not stepper.captured


def test_a_captured_step_of_lion_reads_rate_and_gradients_at_every_replay(capture):
    captured, expected = parameters(CPU, SIZES), parameters(CPU, SIZES)
    a = Lion(captured, lr=torch.tensor(0.25), weight_decay=0.1, backend="triton")
    b = Lion(expected, lr=torch.tensor(0.25), weight_decay=0.1, backend="triton")
    for optimizer, params in ((a, captured), (b, expected)):
        step(optimizer, params, gradients(params, 0))
    static = [torch.zeros_like(p) for p in captured]
    with capture() as graph:
        step(a, captured, static)
    for seed, rate in ((1, 0.5), (2, 0.125)):
        for g, new in zip(static, gradients(captured, seed)):
            g.copy_(new)
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"].fill_(rate)
        graph.replay()
        step(b, expected, gradients(expected, seed))
    assert_same(captured, expected)
    assert_same([a.state[p] for p in captured], [b.state[p] for p in expected])
