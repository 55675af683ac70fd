"""Statistics of a step are those of copies taken around a plain one, in float64; the step is that one, to the bit."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from helpers.comparing import assert_near, assert_same, same
from helpers.kernels import captures
from helpers.loops import Net, train
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS, every_optimizer
from helpers.precision import FROZEN, float32_weight, normal, outcome
from helpers.waits import Waits
from torch import nn

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion, register_step_in_backward
from fusedopt.backends.eager.measures import Measure
from fusedopt.statistics.values import QUANTITIES

pytestmark = [
    pytest.mark.filterwarnings(FROZEN),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# Borders of pieces, tensors that are joined, gaps and other orders in memory, no elements; the last has no gradient.
SHAPES = [(33, 70), (40,), (3, 16, 9), (0, 4), (1,), (41, 52), (2100,), (5, 7)]
RTOL = 1e-5
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


def parameters(dtype):
    params = [nn.Parameter(0.3 * t) for t in normal(SHAPES, 0, dtype)]
    params[5].data = params[5].data.mT.contiguous().mT
    return params


def give_gradients(params, seed, size=0.01):
    grads = normal(SHAPES, seed, torch.float32)
    for i, (p, g) in enumerate(zip(params[:-1], grads)):
        p.grad = (size * g).to(p.dtype)
        if i == 0:
            p.grad = p.grad.mT.contiguous().mT


def made(name, params, **options):
    return (
        OPTIMIZERS[name](params, **options)
        if isinstance(params, nn.Module)
        else OPTIMIZERS[name].cls(params, **options)
    )


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


def expected(params, before, new, kept, factor):
    rows = []
    for p, old, updated, after in zip(params, before, new, kept):
        if p.grad is None:
            rows.append([math.nan] * len(QUANTITIES))
            continue
        change = updated - old
        weight, update = old.norm().item(), change.norm().item()
        lost = ((after == old) & (change != 0)).double().mean().item() if p.dtype.itemsize == 2 and p.numel() else 0.0
        ratio = update / weight if weight else math.nan
        largest = change.abs().max().item() if p.numel() else 0.0
        rows.append([factor * p.grad.double().norm().item(), weight, update, largest, ratio, lost])
    return torch.tensor(rows, dtype=torch.float64)


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


def test_every_third_step():
    model = Net(0)
    optimizer = AdamW(model.parameters(), track_statistics=3)
    seen = []
    for seed in range(7):
        train(model, optimizer, 1, seed=seed)
        seen.append(optimizer.statistics.tensor)
    assert [same(*pair) for pair in pairwise(seen)] == [True, True, False, True, True, False]
    assert optimizer.tracker.measured_steps == 3


def test_nothing_without_the_option(monkeypatch):
    monkeypatch.delattr(Measure, "add")
    model = Net(0)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    assert optimizer.statistics is None


def test_names_and_a_dict_for_a_logger():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    named = AdamW(model.named_parameters(), track_statistics=True)
    assert named.statistics.tensor.shape == (4, len(QUANTITIES)) and named.statistics.tensor.isnan().all()
    assert named.statistics.to_dict() == {}
    model[0](torch.ones(3)).sum().backward()
    named.step()
    logged = named.statistics.to_dict()
    assert set(logged) == {f"{q}/0.{name}" for q in QUANTITIES for name in ("weight", "bias")}  # those with a gradient
    assert all(type(value) is float for value in logged.values())
    assert logged["grad_norm/0.weight"] == pytest.approx(6**0.5)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    assert Lion(groups, track_statistics=True).statistics.names == ["0.0", "0.1", "1.0", "1.1"]


def test_a_group_that_is_added():
    params = parameters(torch.float32)
    optimizer = AdamW(params[:3], track_statistics=True)
    give_gradients(params, 1)
    optimizer.step()
    optimizer.add_param_group({"params": params[3:]})
    assert optimizer.statistics.tensor[:, 1].isnan().tolist() == [False] * 3 + [True] * 5
    optimizer.step()
    assert optimizer.statistics.tensor[:, 1].isnan().tolist() == [False] * 7 + [True]


@pytest.mark.parametrize("through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_tracks_its_own_steps(through):
    model = Net(0)
    optimizer = AdamW(model.parameters(), track_statistics=2)
    train(model, optimizer, 1)
    before = optimizer.statistics.tensor
    other = through(optimizer)
    assert other.tracker.every == 2 and other.statistics.tensor.isnan().all()
    params = [p for group in other.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    other.step()
    assert not other.statistics.tensor.isnan().any()
    assert_same(optimizer.statistics.tensor, before)


def test_checkpoints_know_nothing_of_it():
    model = Net(0)
    tracked, plain = AdamW(model.parameters(), track_statistics=True), AdamW(model.parameters())
    train(model, tracked, 1)
    saved = tracked.state_dict()
    assert saved["param_groups"] == plain.state_dict()["param_groups"]
    plain.load_state_dict(saved)
    assert plain.statistics is None


@pytest.mark.parametrize("wrong", [-1, 0.5, "every", None, torch.tensor(1)])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="track_statistics must be True, False, or a whole number"):
        AdamW([nn.Parameter(torch.ones(2))], track_statistics=wrong)


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


def test_the_worst_layers_come_first():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    optimizer = AdamW(model.named_parameters(), lr=1e-3, track_statistics=True)
    with torch.no_grad():
        model[3].weight *= 100.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert optimizer.statistics.table() == "no step was measured yet"
    optimizer.step()
    lines = optimizer.statistics.table(rows=2).splitlines()
    assert lines[1].startswith("3.weight") and lines[-1] == "... and 4 more"
    model[1].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert repr(optimizer.statistics).splitlines()[1].startswith("1.weight")


def test_keras_half():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamWeightDecay([p], track_statistics=True)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.statistics.to_dict()["grad_norm/0.0"] == pytest.approx(3**0.5)


# What reviewers broke.


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


def test_numbers_stay_with_their_parameters():
    a, b = (nn.Parameter(torch.full((4,), size)) for size in (1.0, 2.0))
    optimizer = AdamW([("a", a), ("b", b)], track_statistics=10)
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    (group,) = optimizer.param_groups
    group["params"].reverse()
    group["param_names"].reverse()
    group["params"].append(nn.Parameter(torch.ones(2)))  # without a name
    logged = optimizer.statistics.to_dict()
    assert (logged["weight_norm/a"], logged["weight_norm/b"]) == (2.0, 4.0)
    assert optimizer.statistics.names == ["b", "a", "0.2"] and "0.2" not in optimizer.statistics.table()


def test_parameters_without_data():
    lazy = AdamW(nn.LazyLinear(3).parameters(), track_statistics=True)
    assert lazy.statistics.tensor.shape == (2, len(QUANTITIES)) and lazy.statistics.to_dict() == {}
    p = nn.Parameter(torch.ones(2))
    mixed = AdamW([*nn.Linear(3, 3, device="meta").parameters(), p], track_statistics=True)
    p.grad = torch.ones(2)
    mixed.step()
    assert mixed.statistics.tensor[:, 0].isnan().tolist() == [True, True, False]
    assert str(AdamW([{"params": []}], track_statistics=True).statistics) == "no step was measured yet"


def test_a_group_that_is_added_between_backward_and_step():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = AdamW(model[0].parameters(), track_statistics=True)
    register_step_in_backward(optimizer, model)
    model(torch.ones(3)).sum().backward()
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.step()
    assert optimizer.statistics.tensor[2:, 0].isfinite().all()
