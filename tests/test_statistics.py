"""Statistics of a step are those of copies taken around a plain one, in float64; the step is that one, to the bit."""

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.kernels import captures
from helpers.loops import Net, train
from helpers.measured import RTOL, SHAPES, expected, give_gradients, made, parameters
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS, every_optimizer
from helpers.precision import FROZEN, float32_weight, normal, outcome
from helpers.waits import Waits
from torch import nn

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion, register_step_in_backward

pytestmark = [
    pytest.mark.filterwarnings(FROZEN),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
PRECISION = ("master_weights", "stochastic_rounding", "state_dtype")


def unrounded(name, optimizer, params, options):
    """The new weights before they are rounded to 16 bits: those of a step of float32 copies of everything."""
    twins = [nn.Parameter(p.detach().float()) for p in params]
    plain = {key: value for key, value in options.items() if key not in (*PRECISION, "track_statistics")}
    twin = made(name, twins, **plain)
    for p, q in zip(params, twins):
        if p.grad is not None:
            q.grad_dtype = p.grad.dtype
            q.grad = p.grad.clone()
        if optimizer.state.get(p):
            twin.state[q] = {
                key: value.to(torch.float32, copy=True) if key.startswith("exp_avg") else value.clone()
                for key, value in optimizer.state[p].items()
                if key not in ("number", "remainder", "master_weight")
            }
    twin.grad_scale, twin.found_inf = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
    twin.step()
    return [q.detach().double() for q in twins]


def weights(optimizer, params, options):
    if options.get("master_weights") and optimizer.state:
        return [(float32_weight(optimizer, p) if optimizer.state.get(p) else p.detach()).double() for p in params]
    return [p.detach().double().clone() for p in params]


def check(name, dtype, backend, options, *, scale=1.0, steps=2):
    params, plain_params = parameters(dtype), parameters(dtype)
    tracked = made(name, params, backend=backend, track_statistics=True, **options)
    plain = made(name, plain_params, backend=backend, **options)
    for step in range(steps):
        for o, own in ((tracked, params), (plain, plain_params)):
            give_gradients(own, step + 1, 0.01 * scale)
            if scale != 1.0:
                o.grad_scale, o.found_inf = torch.tensor(scale), torch.tensor(0.0)
        before = weights(tracked, params, options)
        rounds = dtype.itemsize == 2 and not options.get("master_weights")
        new = unrounded(name, tracked, params, {**options, "backend": backend}) if rounds else None
        tracked.step()
        plain.step()
        kept = weights(tracked, params, options)
        statistics = tracked.statistics.tensor
        wanted = expected(params, before, new or kept, kept, 1.0 / scale)
        assert_near(statistics, wanted, rtol=RTOL, atol=1e-12, equal_nan=True, name="statistics")
    assert_same(list(outcome(tracked)), list(outcome(plain)))


CASES = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "clipped": (torch.float32, {"max_grad_norm": 0.01}),
    "bfloat16": (BFLOAT16, {}),
    "float16-stochastic": (FLOAT16, {"stochastic_rounding": True}),
    "bfloat16-master": (BFLOAT16, {"master_weights": True}),
    "float16-master": (FLOAT16, {"master_weights": True, "max_grad_norm": 0.01}),
}
TRITON = {
    "AdamW": ("float32", "float64", "bfloat16-master", "float16-stochastic"),
    "Lion": ("clipped", "bfloat16", "float16-master"),
    "Adafactor": ("clipped", "float16-stochastic", "bfloat16-master"),
    "AdamWeightDecay": (),
}
ROWS = [pytest.param(name, case, "eager", id=f"{name}-{case}-eager") for name in OPTIMIZERS for case in CASES]
ROWS += [
    pytest.param(name, case, "triton", id=f"{name}-{case}-triton", marks=NEEDS_TRITON)
    for name, cases in TRITON.items()
    for case in cases
]


@pytest.mark.parametrize("name, case, backend", ROWS)
def test_numbers_of_copies_around_a_plain_step(name, case, backend):
    dtype, options = CASES[case]
    small = {"eps": 1e-4} if name == "AdamW" and dtype is FLOAT16 else {}  # which float16 moments can hold
    small = {"epsilon": 1e-4} if name == "AdamWeightDecay" and dtype is FLOAT16 else small
    check(name, dtype, backend, {**options, **small})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_gradients_are_unscaled_and_before_clipping(name, backend):
    check(name, torch.float32, backend, {"max_grad_norm": 0.01}, scale=1024.0)


@pytest.mark.parametrize("clipping", [{"clipnorm": 0.01}, {"clipvalue": 0.001}, {"global_clipnorm": 0.01}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_gradients_before_clipping_as_in_keras(clipping, scale):
    check("AdamWeightDecay", torch.float32, "eager", clipping, scale=scale)


def test_gradients_before_keras_clipping_wait_for_nothing_whichever_there_are(monkeypatch):
    params = parameters(torch.float32)
    optimizer = AdamWeightDecay(params, clipnorm=0.01, track_statistics=True)
    with_gradients, waits = optimizer.tracker.with_gradients, Waits()

    def watched(*args):
        with waits:
            write = with_gradients(*args)

        def watched_write():
            with waits:
                write()

        return watched_write

    monkeypatch.setattr(optimizer.tracker, "with_gradients", watched)
    for turn in range(3):
        give_gradients(params, turn)
        without = params[turn]
        without.grad = None
        optimizer.step()
        norms = [torch.nan if p.grad is None else float(p.grad.double().norm()) for p in params]
        assert_near(
            optimizer.statistics.tensor[:, 0], torch.tensor(norms, dtype=torch.float64), rtol=RTOL, equal_nan=True
        )
    assert (waits.count, waits.copies) == (0, 0)
    with waits:
        torch.tensor([1])
    assert waits.copies == 1


@pytest.mark.parametrize(
    "options",
    [{"amsgrad": True, "maximize": True}, {"correct_bias": False}, {"convention": "torch", "weight_decay": 0.1}],
)
def test_variants_of_adamw(options):
    check("AdamW", torch.float32, "eager", options)


@pytest.mark.parametrize("backend", BACKENDS)
@every_optimizer
def test_a_skipped_step_has_gradients_and_weights_but_no_update(name, backend):
    params = parameters(torch.float32)
    optimizer = made(name, params, backend=backend, track_statistics=True, skip_nonfinite=True)
    give_gradients(params, 1)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    give_gradients(params, 2)
    params[1].grad[7] = torch.inf
    params[2].grad[0, 0, 0] = torch.nan
    optimizer.step()
    assert_same([p.detach() for p in params], before)
    found = optimizer.statistics.tensor
    wanted = expected(params, *[[w.double() for w in before]] * 3, 1.0)
    assert wanted[1, 0] == torch.inf and wanted[2, 0].isnan() and wanted[0, 2] == 0.0
    assert_near(found, wanted, rtol=RTOL, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_have_the_same_bits(backend):
    found = []
    for _ in range(2):
        params = parameters(torch.float32)
        optimizer = AdamW(params, backend=backend, track_statistics=True)
        give_gradients(params, 1)
        optimizer.step()
        found.append(optimizer.statistics.tensor)
    assert_same(*found, equal_nan=True)


@every_optimizer
def test_a_step_in_backward_has_those_of_a_plain_step(name):
    found = []
    for in_backward in (False, True):
        model = Net(0)
        optimizer = made(name, model, track_statistics=2)
        if in_backward:
            register_step_in_backward(optimizer, model)
        for seed in range(3):
            train(model, optimizer, 1, seed=seed)
        found.append(optimizer.statistics.tensor)
    assert_near(*found, rtol=1e-7)  # tensors that are joined are added up in another order


@pytest.mark.parametrize("track", [False, True])
def test_a_scaled_gradient_stays_where_its_elements_are(track):
    """One small tensor of another order in memory, whose gradient is scaled on the way."""
    weights = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        p, g = (normal([(4, 6, 3, 3)], seed)[0].to(memory_format=memory_format) for seed in (0, 1))
        p = nn.Parameter(p)
        optimizer = AdamW([p], lr=0.1, max_grad_norm=0.1, track_statistics=track)
        p.grad = g
        optimizer.step()
        weights.append(p.detach().contiguous())
    assert_near(*weights, rtol=1e-6)


def test_weights_that_others_wrote_to_get_the_same_bits():
    """A remainder that no longer fits, of which NaN would come."""
    found = []
    for track in (False, True):
        p = nn.Parameter(normal([(64,)], 0, BFLOAT16)[0])
        optimizer = AdamW([p], lr=0.01, master_weights=True, track_statistics=track)
        p.grad = normal([(64,)], 1, BFLOAT16)[0]
        optimizer.step()
        p.data.zero_()
        optimizer.step()
        found.append(list(outcome(optimizer)))
    assert_same(*found)


@pytest.mark.slow
@NEEDS_TRITON
@pytest.mark.parametrize("cls", [AdamW, Adafactor])
def test_a_captured_step_is_measured_at_every_replay(cls, monkeypatch):
    capture = captures(monkeypatch)
    params, plain_params = parameters(torch.float32)[:3], parameters(torch.float32)[:3]
    optimizer = cls(params, backend="triton", track_statistics=5)
    plain = cls(plain_params, backend="triton", track_statistics=True)
    for own in (params, plain_params):
        for p, g in zip(own, normal(SHAPES, 1)):
            p.grad = g
    for o in (optimizer, plain):
        o.step()
    with capture() as graph:
        optimizer.step()
    for seed in (2, 3):
        for own in (params, plain_params):
            for p, g in zip(own, normal(SHAPES, seed)):
                p.grad.copy_(g)
        graph.replay()
        plain.step()
        assert_same(optimizer.statistics.tensor, plain.statistics.tensor)


@NEEDS_TRITON
@pytest.mark.parametrize("cls", [AdamW, Lion, Adafactor])
def test_one_launch_more(cls, monkeypatch):
    from triton.runtime.jit import KernelInterface

    launched, launcher = [], KernelInterface.__getitem__
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda k, grid: (launched.append(k.__name__), launcher(k, grid))[1]
    )
    counts = []
    for track in (False, True):
        params = parameters(torch.float32)[:3]
        optimizer = cls(params, backend="triton", track_statistics=track)
        for p, g in zip(params, normal(SHAPES, 1)):
            p.grad = g
        launched.clear()
        optimizer.step()
        counts.append(len(launched))
    assert counts[1] == counts[0] + 1


@NEEDS_TRITON
@pytest.mark.parametrize("cls", [AdamW, Lion, Adafactor])
def test_a_step_waits_for_nothing(cls):
    params = parameters(torch.float32)[:3]
    optimizer = cls(params, backend="triton", track_statistics=True, max_grad_norm=1.0)
    for p, g in zip(params, normal(SHAPES, 1)):
        p.grad = g
    for _ in range(2):  # new states are looked at, on a CPU
        optimizer.step()
    with Waits() as waits:
        optimizer.step()
        statistics = optimizer.statistics.tensor
    assert waits.count == 0 and statistics.isfinite().all()
    with waits:
        float(statistics[0, 0])
    assert waits.count == 1
