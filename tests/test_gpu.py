"""On a GPU: no synchronisation, CUDA graphs, tensors beyond 2^31 elements, gradients anywhere in a bucket.

`pytest -m gpu` runs them where there is one. The other tests of the kernels run on it too.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers.adamw import RATES, gradients, parameters, run
from helpers.comparing import assert_near, assert_same
from helpers.optimizers import OPTIMIZERS

from fusedopt import AdamW, get_cosine_schedule_with_warmup

pytestmark = pytest.mark.gpu

SIZES = (7, 48, 1025, 2048)
OPTIONS = {"weight_decay": 0.1, "amsgrad": True}


@contextmanager
def no_synchronisation():
    """Turns whatever waits for the device into an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def matrices(params):
    """The same numbers of elements, three of them as matrices."""
    shapes = [(7,), (3, 16), (41, 25), (32, 64)]
    return [torch.nn.Parameter(p.detach().reshape(shape)) for p, shape in zip(params, shapes, strict=True)]


GUARD = {"max_grad_norm": 0.5, "skip_nonfinite": True, "skip_grad_norm_above": 1e3, "skip_outliers": 6.0}
MAKERS = {
    **{name: row.at for name, row in OPTIMIZERS.items()},
    "AdamW-amsgrad": partial(OPTIMIZERS["AdamW"].at, **OPTIONS),
    "AdamW-guarded": partial(OPTIMIZERS["AdamW"].at, **OPTIONS, **GUARD),
    "AdamW-statistics": partial(OPTIMIZERS["AdamW"].at, **OPTIONS, track_statistics=True),
    "Adafactor-statistics": partial(OPTIMIZERS["Adafactor"].at, track_statistics=True),
    "Adafactor-beta1": partial(OPTIMIZERS["Adafactor"].at, beta1=0.9, weight_decay=0.1),
    "AdamW-bfloat16-master": partial(OPTIMIZERS["AdamW"].at, **OPTIONS, master_weights=True),
    "AdamW-bfloat16-stochastic": partial(OPTIMIZERS["AdamW"].at, **OPTIONS, stochastic_rounding=True),
    "Lion-bfloat16-stochastic": partial(OPTIMIZERS["Lion"].at, weight_decay=0.1, stochastic_rounding=True),
    "Adafactor-bfloat16-master": partial(OPTIMIZERS["Adafactor"].at, weight_decay=0.1, master_weights=True),
    "Adafactor-bfloat16-stochastic": partial(OPTIMIZERS["Adafactor"].at, beta1=0.9, stochastic_rounding=True),
}
"""Each takes a learning rate, parameters and `backend=`."""


@pytest.fixture(params=MAKERS)
def two(device, request):
    """Two equal optimizers with a step behind them: one to capture, one to take the same steps eagerly."""
    pairs = []
    for _ in range(2):
        lr = torch.tensor(0.1, device=device)
        params = matrices(parameters(device, SIZES))
        if "bfloat16" in request.param:
            params = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
        optimizer = MAKERS[request.param](lr, params, backend="triton")
        step(optimizer, params, gradients(params, 0))
        pairs.append((optimizer, params, lr))
    return pairs


def step(optimizer, params, grads):
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()


def capture(optimizer, params, grads):
    """A graph of one step with these gradients."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step(optimizer, params, grads)
    return graph


def assert_equal(two):
    (ours, params, _), (theirs, expected, _) = two
    assert_same(params, expected)
    assert_same([ours.state[p] for p in params], [theirs.state[p] for p in expected])


def test_a_gpu_gets_the_kernels(device):
    params = parameters(device, SIZES)
    optimizer = AdamW(params)
    run(optimizer, params, [gradients(params, 0)])
    assert {type(stepper).__name__ for stepper in optimizer._engine.steppers.values()} == {"TritonAdamW"}


@pytest.mark.parametrize("lr", ["float", "on the device"])
def test_a_step_waits_for_nothing(lr, two):
    """Gradients move, also to odd addresses, one is missing, the rate changes."""
    optimizer, params, rate = two[0]
    steps = [gradients(params, seed) for seed in range(3)]
    steps[1][0] = None
    steps[2] = [torch.cat([g[:1], g])[1:] for g in steps[2]]
    with no_synchronisation():
        for grads, value in zip(steps, RATES):
            if lr == "float":
                optimizer.param_groups[0]["lr"] = value
            rate.fill_(value)
            step(optimizer, params, grads)


def test_capture_eager_step_with_other_gradients_replay(two):
    (ours, params, _), (theirs, expected, _) = two
    static, other, third = gradients(params, 1), gradients(params, 2), gradients(params, 3)
    graph = capture(ours, params, static)
    for _ in range(2):
        graph.replay()
        step(theirs, expected, static)
    assert_equal(two)
    for grads in (other, third):
        for optimizer, own, _ in two:
            step(optimizer, own, grads)
        assert_equal(two)
        for g in static:
            g.mul_(-2.0)
        graph.replay()
        step(theirs, expected, static)
        assert_equal(two)


def test_two_graphs_in_turn_and_one_that_lacks_a_gradient(two):
    (ours, params, _), (theirs, expected, _) = two
    grads = [gradients(params, 1), [None, *gradients(params, 2)[1:]]]
    graphs = [capture(ours, params, grads[0])]
    params[0].requires_grad_(False)
    graphs.append(capture(ours, params, grads[1]))
    for turn in (0, 1, 1, 0):
        graphs[turn].replay()
        step(theirs, expected, grads[turn])
        assert_equal(two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_on_the_device_change_between_replays(device, name):
    """And eager steps with the same values have the same bits; nothing waits."""
    pairs = []
    for _ in range(2):
        params = matrices(parameters(device, SIZES))
        decay = torch.tensor(0.1, dtype=torch.float64, device=device)
        beta = torch.tensor(0.9, dtype=torch.float64, device=device)
        options = {
            "AdamWeightDecay": {"weight_decay_rate": decay, "beta_2": beta},
            "Adafactor": {"weight_decay": decay, "beta1": beta},
        }.get(name, {"weight_decay": decay, "betas": (0.8, beta)})
        optimizer = OPTIMIZERS[name].at(0.1, params, backend="triton", **options)
        step(optimizer, params, gradients(params, 0))
        pairs.append((optimizer, params, (decay, beta)))
    (ours, params, held), (theirs, expected, others) = pairs
    grads = gradients(params, 1)
    graph = capture(ours, params, grads)
    for values in ((0.1, 0.9), (0.5, 0.25)):
        for given in (held, others):
            for t, value in zip(given, values):
                t.fill_(value)
        graph.replay()
        with no_synchronisation():
            step(theirs, expected, grads)
        assert_equal(pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_replay_whose_gradients_are_too_large_changes_nothing(device, name):
    params = matrices(parameters(device, SIZES))
    optimizer = OPTIMIZERS[name].at(0.1, params, backend="triton", skip_outliers=3.0)
    static = gradients(params, 0)
    step(optimizer, params, static)
    norm = float(optimizer.grad_norm)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["grad_norm_average"] = (100.0, norm, (0.1 * norm) ** 2)
    optimizer.load_state_dict(saved)
    step(optimizer, params, static)
    graph = capture(optimizer, params, static)
    graph.replay()
    before = [p.detach().clone() for p in params]
    for g in static:
        g.mul_(1024.0)
    graph.replay()
    assert_same(params, before)
    assert dict(optimizer.skipped_steps) == {"nonfinite": 0, "grad_norm_above": 0, "outliers": 1}
    for g in static:
        g.div_(1024.0)
    graph.replay()
    assert optimizer.skipped_steps == 1 and not torch.equal(params[1], before[1])


def test_a_learning_rate_on_the_device_changes_between_replays(two):
    (ours, params, rate), (theirs, expected, expected_rate) = two
    grads = gradients(params, 1)
    graph = capture(ours, params, grads)
    for value in RATES:
        rate.fill_(value)
        expected_rate.fill_(value)
        graph.replay()
        step(theirs, expected, grads)
        assert_equal(two)


def test_fifty_replays_under_a_schedule_equal_fifty_steps(two):
    (ours, params, _), (theirs, expected, _) = two
    grads = gradients(params, 1)
    graph = capture(ours, params, grads)
    schedules = [get_cosine_schedule_with_warmup(optimizer, 5, 50) for optimizer, _, _ in two]
    for _ in range(50):
        graph.replay()
        step(theirs, expected, grads)
        for schedule in schedules:
            schedule.step()
    assert_equal(two)


def test_a_whole_iteration_in_a_graph(device):
    """Forward, backward and step, as torch's guide has it: warm-up on a side stream, gradients made in the graph."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (model.to(device) for model in models)
    batch = torch.randn(4, 8, device=device)
    optimizers = [AdamW(model.parameters(), lr=0.1, weight_decay=0.1, backend="triton") for model in (ours, theirs)]

    def iteration(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        model(batch).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            iteration(ours, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        iteration(ours, optimizers[0])
    for _ in range(3):
        iteration(theirs, optimizers[1])
    for seed in range(3):
        torch.manual_seed(seed)
        batch.copy_(torch.randn(4, 8))
        graph.replay()
        iteration(theirs, optimizers[1])
    assert_near(ours, theirs, rtol=1e-5, atol=1e-6)  # cuBLAS may choose other kernels in a graph.


def test_capture_without_a_step_before_it(device):
    params = parameters(device, SIZES)
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, backend="triton")
    with pytest.raises(RuntimeError, match=r"before the optimizer has state.*take one step"):
        capture(optimizer, params, gradients(params, 0))
    torch.cuda.synchronize()
    assert not optimizer.state
    assert_same(params, before)


def test_a_learning_rate_on_the_cpu_cannot_be_captured(device):
    params = parameters(device, SIZES)
    optimizer = AdamW(params, lr=torch.tensor(0.1), backend="triton")
    step(optimizer, params, gradients(params, 0))
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"lr is a tensor on cpu.*make it a tensor on cuda:0"):
        capture(optimizer, params, gradients(params, 0))
    torch.cuda.synchronize()
    assert_same(params, before)


def test_the_host_may_run_far_ahead(two):
    """50 steps are queued while the device is busy: each reads the tables and gradients that were meant for it."""
    (ours, params, _), (theirs, expected, _) = two
    steps = [gradients(params, seed) for seed in range(50)]

    def take(optimizer, own, number):
        optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
        step(optimizer, own, [g.clone() for g in steps[number]])
        optimizer.zero_grad(set_to_none=True)

    torch.cuda.synchronize()
    with no_synchronisation():
        torch.cuda._sleep(3_000_000_000)  # cycles, more than a second
        awake = torch.cuda.Event()
        awake.record()
        for number in range(50):
            take(ours, params, number)
        assert not awake.query()
    for number in range(50):
        take(theirs, expected, number)
        torch.cuda.synchronize()
    assert_equal(two)


def test_steps_on_changing_streams(two):
    """Tables belong to the stream that they were made on."""
    (ours, params, _), (theirs, expected, _) = two
    streams = [torch.cuda.Stream() for _ in range(2)]
    for seed in range(6):
        grads = gradients(params, seed % 2)
        stream = streams[seed % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(ours, params, grads)
        torch.cuda.current_stream().wait_stream(stream)
        step(theirs, expected, grads)
    assert_equal(two)


def test_gradients_anywhere_in_a_bucket(device):
    """As DDP's: views of one flat tensor, one behind the other, at other offsets from time to time."""
    sizes = (48, 5, 1024, 3, 2048)
    ours, theirs = parameters(device, sizes), parameters(device, sizes)
    optimizers = [AdamW(params, lr=0.1, backend="triton") for params in (ours, theirs)]
    for seed in range(6):
        grads = gradients(ours, seed)
        order = list(range(len(sizes)))[:: 1 if seed % 2 else -1]
        bucket = torch.full((sum(sizes) + seed,), torch.nan, device=device)
        start = seed
        views = list(grads)
        for row in order:
            views[row] = bucket[start : start + sizes[row]].copy_(grads[row])
            start += sizes[row]
        step(optimizers[0], ours, views)
        step(optimizers[1], theirs, grads)
    assert_same(ours, theirs)


def test_more_than_2_31_elements(device):
    """bfloat16: 4 bytes for parameter and gradient, 4 for the moments, 12 in all with room to compare."""
    size = 2**31 + 4096
    free, _ = torch.cuda.mem_get_info(device)
    if free < 10 * size:
        pytest.skip(f"needs {10 * size / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    p = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=device))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], lr=0.5, betas=(0.0, 0.0), eps=0.0, correct_bias=False, backend="triton")
    optimizer.step()
    # Everywhere 1 - 0.5 * 1 / sqrt(1), the last elements included, and nothing twice.
    assert p.min().item() == p.max().item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_random_rounding_is_that_of_a_cpu(device, name, dtype):
    """The random bits depend on seed, parameter, step and element alone."""
    runs = []
    for home in ("cpu", device):
        params = [torch.nn.Parameter(p.detach().to(home, dtype)) for p in matrices(parameters("cpu", SIZES))]
        optimizer = OPTIMIZERS[name].at(0.01, params, weight_decay=0.1, stochastic_rounding=True, seed=3)
        for k in range(3):
            step(optimizer, params, [g.to(home) for g in gradients([p.detach().cpu() for p in params], k)])
        runs.append(params)
    assert_same([p.cpu() for p in runs[1]], runs[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_gpus():
    """Kernels run where their tensors are, whatever device is current; a rate on one serves the other."""
    params = [p for index in range(2) for p in parameters(torch.device("cuda", index), SIZES)]
    alone = parameters(torch.device("cuda", 0), SIZES)
    lr = torch.tensor(0.1, device="cuda:0")
    optimizers = [AdamW(own, lr=lr, backend="triton", **OPTIONS) for own in (params, alone)]
    for seed in range(3):
        step(optimizers[0], params, gradients(params[: len(SIZES)], seed) + gradients(params[len(SIZES) :], seed))
        step(optimizers[1], alone, gradients(alone, seed))
    for i, q in enumerate(alone):
        assert_same(params[i].cpu(), q.cpu())
        assert_same(params[i + len(SIZES)].cpu(), q.cpu())


def test_a_gradient_on_another_device(device):
    p = torch.nn.Parameter(torch.ones(16, device=device))
    optimizer = AdamW([p], backend="triton")
    with pytest.raises(RuntimeError, match=r"on cpu does not fit its parameter .* on cuda:0"):
        optimizer.apply_gradients([(torch.ones(16), p)])
    assert_same(p, torch.ones_like(p))


def test_a_scaler_clipping_and_skipping_wait_for_nothing(device):
    params = parameters(device, SIZES)
    optimizer = AdamW(params, backend="triton", max_grad_norm=0.5, skip_nonfinite=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))
    step(optimizer, params, gradients(params, 0))
    bad = [g * 1024.0 for g in gradients(params, 1)]
    bad[0][0] = float("inf")
    before = [p.detach().clone() for p in params]
    with no_synchronisation():
        for p, g in zip(params, bad):
            p.grad = g
        scaler.step(optimizer)
    assert optimizer.skipped_steps == 1
    assert_same(params, before)
