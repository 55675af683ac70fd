"""Weights and moments of 16 bits go wherever others go: through checkpoints, copies, captures, compilers and hooks."""

import copy
import json
import pickle

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.files import through_a_file
from helpers.loops import Net, train
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS
from helpers.precision import (
    FROZEN,
    POLICIES,
    PRECISE,
    each_half,
    float32_weight,
    normal,
    outcome,
    parameters,
    step,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import state_dict as dcp

from fusedopt import AdamW, GradientAccumulator, Lion, register_step_in_backward
from fusedopt.backends.eager.storage import remainder_beside

pytestmark = [
    pytest.mark.filterwarnings(FROZEN),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

every_policy = pytest.mark.parametrize("policy", POLICIES)
every_optimizer = pytest.mark.parametrize("name", PRECISE)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(33, 5), (7,)]


def made(name, params, **options):
    if isinstance(params, nn.Module):
        return OPTIMIZERS[name](params, **options)
    return OPTIMIZERS[name].at(0.01, params, **options)


def net(half, seed=0, device="cpu"):
    return Net(seed).to(device, half)


# Checkpoints.


def carried(saved, how):
    if how == "file":
        return through_a_file(saved)  # with weights_only=True
    if how == "json":
        return json.loads(json.dumps(saved, default=as_json))
    return copy.deepcopy(saved)


def as_json(value):
    return value.tolist()


@every_policy
@every_optimizer
@each_half
def test_resuming_from_a_file(half, name, policy):
    options = POLICIES[policy]
    model = net(half)
    optimizer = made(name, model, **options)
    train(model, optimizer, 3)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 3, seed=2)
    resumed = net(half, 9)
    other = made(name, resumed, **options)
    train(resumed, other, 1)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, 3, seed=2)
    assert_same(resumed, model)
    assert_same(other.state_dict(), optimizer.state_dict())


@every_policy
def test_resuming_from_json(policy):
    options = POLICIES[policy]
    params, new = parameters(SHAPES, torch.bfloat16), parameters(SHAPES, torch.bfloat16)
    optimizer = AdamW(params, **options)
    step(optimizer, normal(SHAPES, 1, torch.bfloat16))
    saved = carried(optimizer.state_dict(), "json")
    other = AdamW(new)
    other.load_state_dict(saved)
    assert {name: other.param_groups[0][name] for name in options} == options
    assert_same([dict(other.state[p]) for p in new], [dict(optimizer.state[p]) for p in params])


def test_a_checkpoint_names_the_dtype_of_the_moments_and_is_read_with_a_dtype_too():
    optimizer = AdamW(parameters(SHAPES, torch.bfloat16), state_dtype=torch.bfloat16)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["state_dtype"] == "bfloat16"
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        other = AdamW(parameters(SHAPES, torch.bfloat16))
        other.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], "state_dtype": dtype}]})
        assert other.param_groups[0]["state_dtype"] is torch.bfloat16
    with pytest.raises(ValueError, match=r"torch\.bfloat16, got 'int8'"):
        other.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], "state_dtype": "int8"}]})


def test_checkpoints_hold_remainders_as_int16_and_every_tensor_alone(tmp_path):
    params = parameters([(50,)] * 40, torch.bfloat16)
    for options in (POLICIES["master"], POLICIES["stochastic"]):
        optimizer = AdamW(params, **options)
        step(optimizer, normal([(50,)] * 40, 1, torch.bfloat16))
        state = optimizer.state_dict()["state"]
        if "master_weights" in options:
            assert {s["remainder"].dtype for s in state.values()} == {torch.int16}
        for s in state.values():
            for value in s.values():
                assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@every_policy
def test_resuming_through_a_folder_of_distributed_checkpoint(policy, flat, tmp_path):
    options = POLICIES[policy]
    model = net(torch.bfloat16)
    optimizer = made("AdamW", model, **options)
    train(model, optimizer, 4)
    how = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    parts = dict(zip(("model", "optimizer"), dcp.get_state_dict(model, optimizer, options=how)))
    torch.distributed.checkpoint.save(parts, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, 2, seed=2)
    resumed = net(torch.bfloat16, 9)
    other = made("AdamW", resumed, **options)
    into = dict(zip(("model", "optimizer"), dcp.get_state_dict(resumed, other, options=how)))
    torch.distributed.checkpoint.load(into, checkpoint_id=tmp_path, no_dist=True)
    dcp.set_model_state_dict(resumed, into["model"])
    dcp.set_optimizer_state_dict(resumed, other, into["optimizer"], options=how)
    train(resumed, other, 2, seed=2)
    assert_same(model, resumed)
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("copied", ["master_weight", "master_param", None])
@every_policy
@each_half
def test_a_state_of_torch_loads_into_every_policy(half, policy, copied):
    """With a remainder of 0, or with one made from a float32 copy, if there is one."""
    params = parameters(SHAPES, half)
    theirs = torch.optim.AdamW(params, lr=0.01, eps=1e-3)  # float16 has no 1e-8
    step(theirs, normal(SHAPES, 1, half))
    saved = copy.deepcopy(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    exact = []
    for p, state in zip(params, saved["state"].values()):
        # float32 weights that round to the parameter.
        exact.append(p.detach().float() * (1 + 2**-11 * 0.9 * (torch.rand(p.shape, generator=generator) - 0.5)))
        if copied:
            state[copied] = exact[-1].clone()
    options = POLICIES[policy]
    ours = AdamW(params, lr=0.01, convention="torch", **options)
    ours.load_state_dict(saved)
    for i, p in enumerate(params):
        state, specs = ours.state[p], ours.state_specs(p, ours.param_groups[0])
        assert state["step"] == 1
        for moment in ("exp_avg", "exp_avg_sq"):
            assert_same(state[moment], saved["state"][i][moment].to(state[moment].dtype))
            assert specs[moment].keeps_loaded_dtype or state[moment].dtype == specs[moment].dtype
    step(ours, [torch.zeros_like(p) for p in params])
    assert all(p.isfinite().all() for p in params)
    if "master" in policy:
        ours = AdamW(params, lr=0.0, convention="torch", **options)
        with torch.no_grad():
            for p, x in zip(params, exact):
                p.copy_(x)
        ours.load_state_dict(saved)
        ours.param_groups[0]["lr"] = 0.0
        step(ours, [torch.zeros_like(p) for p in params])
        expected = exact if copied else [p.detach().float() for p in params]
        assert_same([float32_weight(ours, p) for p in params], expected)


def test_a_remainder_beside_a_parameter_that_was_rounded_to_even():
    """Exact, but at ties that went down: there a copy loses one unit of float32. 0 where the copy does not fit."""
    upper = torch.arange(0x3F00, 0x4100, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        exact = (upper + lower).view(torch.float32)
        p = exact.bfloat16()
        joined = ((p.view(torch.int16).to(torch.int32) << 16) + remainder_beside(p, exact).to(torch.int32)).view(
            exact.dtype
        )
        off = joined.view(torch.int32) - exact.view(torch.int32)
        assert int(off.abs().max()) == (1 if lower == 0x8000 else 0)
        assert_same(remainder_beside(-p, exact), torch.zeros(p.shape, dtype=torch.int16))
        assert_same(remainder_beside(p, 2.0 * exact), torch.zeros(p.shape, dtype=torch.int16))


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_checkpoint_of_a_bfloat16_model_loads_into_one_of_another_dtype(policy, dtype):
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = AdamW(params, **POLICIES[policy])
    step(optimizer, normal(SHAPES, 1, torch.bfloat16))
    new = parameters(SHAPES, dtype)
    other = AdamW(new, **POLICIES[policy])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in new:
        specs = other.state_specs(p, other.param_groups[0])
        assert other.state[p].keys() - {"step", "number"} <= specs.keys() | {"master_weight"}
    step(other, normal(SHAPES, 2, dtype))
    assert all(p.isfinite().all() for p in new)
    assert {float(other.state[p]["step"]) for p in new} == {2.0}


def test_a_float32_copy_becomes_a_remainder_in_a_bfloat16_model():
    params = parameters(SHAPES, torch.float16)
    optimizer = AdamW(params, lr=1e-4, master_weights=True)
    step(optimizer, normal(SHAPES, 1, torch.float16))
    exact = [float32_weight(optimizer, p) for p in params]
    new = [nn.Parameter(x.bfloat16()) for x in exact]
    other = AdamW(new, master_weights=True)
    other.load_state_dict(optimizer.state_dict())
    for p, x in zip(new, exact):
        assert "master_weight" not in other.state[p]
        assert_near(float32_weight(other, p), x, rtol=2**-23)


def test_the_options_of_a_checkpoint_say_in_which_dtype_its_states_go_on():
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = AdamW(params, state_dtype=torch.float32)
    step(optimizer, normal(SHAPES, 1, torch.bfloat16))
    other = AdamW(parameters(SHAPES, torch.bfloat16), state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["state_dtype"] is torch.float32
    assert_same(list(other.state_dict()["state"].values()), list(optimizer.state_dict()["state"].values()))


@pytest.mark.parametrize("bad", [torch.float32, torch.int64])
def test_a_remainder_of_another_dtype_is_refused(bad):
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = AdamW(params, master_weights=True)
    step(optimizer, normal(SHAPES, 1, torch.bfloat16))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["remainder"] = saved["state"][0]["remainder"].to(bad)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"remainder of dtype .*, expected torch.int16"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


@every_policy
@every_optimizer
def test_copies_and_pickles_go_on_alike(name, policy):
    optimizer = made(name, parameters(SHAPES, torch.bfloat16), **POLICIES[policy], seed=7)
    step(optimizer, normal(SHAPES, 1, torch.bfloat16))
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for other in (optimizer, *others):
        assert other.seed == 7
        step(other, normal(SHAPES, 2, torch.bfloat16))
    for other in others:
        assert_same(list(outcome(other)), list(outcome(optimizer)))


# Ways to take a step.


@every_policy
@every_optimizer
def test_a_step_in_backward(name, policy):
    results = []
    for in_backward in (False, True):
        model = net(torch.bfloat16)
        optimizer = made(name, model, **POLICIES[policy])
        if in_backward:
            register_step_in_backward(optimizer, model)
        train(model, optimizer, 4)
        results.append(optimizer.state_dict()["state"])
        results.append(dict(model.state_dict()))
    assert_same(results[2:], results[:2])


@every_policy
def test_a_step_in_backward_of_the_kernels(policy, device):
    pytest.importorskip("triton")
    results = []
    for in_backward in (False, True):
        model = net(torch.bfloat16, device=device)
        optimizer = made("AdamW", model, backend="triton", **POLICIES[policy])
        if in_backward:
            register_step_in_backward(optimizer, model)
        train(model, optimizer, 1)
        results.append([optimizer.state_dict()["state"], dict(model.state_dict())])
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["master", "stochastic"])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_a_compiled_training_step(name, policy):
    torch._dynamo.reset()
    plain = net(torch.bfloat16)
    reference = made(name, plain, **POLICIES[policy])
    train(plain, reference, 2)
    model = net(torch.bfloat16)
    optimizer = made(name, model, **POLICIES[policy])

    @torch.compile(backend="aot_eager")
    def compiled(x):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        compiled(torch.randn(4, 5, generator=generator).bfloat16())
    assert_same(model, plain)
    torch._dynamo.reset()


@every_policy
def test_accumulated_gradients(policy):
    """Sums in float32 of bfloat16 weights, handed on as they are."""
    results = []
    for accumulated in (True, False):
        params = parameters(SHAPES, torch.bfloat16)
        optimizer = AdamW(params, lr=0.01, **POLICIES[policy])
        grads = [normal(SHAPES, seed, torch.bfloat16) for seed in (1, 2)]
        if accumulated:
            accumulator = GradientAccumulator(torch.float32)
            for some in grads:
                accumulator(some)
            optimizer.apply_gradients(zip(accumulator.gradients, params), scale=accumulator.scale)
        else:
            sums = [a.float() + b.float() for a, b in zip(*grads)]
            optimizer.apply_gradients(zip(sums, params), scale=0.5)
        results.append(list(outcome(optimizer)))
    assert_same(*results)


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py")
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
@pytest.mark.parametrize("policy", ["master", "stochastic", "bfloat16 moments"])
def test_a_captured_step_goes_on_as_eager_ones(name, policy, capture):
    """Steps that a graph replays count, and draw bits of their own."""
    results = []
    for captured in (True, False):
        params = parameters(SHAPES, torch.bfloat16)
        optimizer = made(name, params, backend="triton", **POLICIES[policy])
        step(optimizer, normal(SHAPES, 1, torch.bfloat16))
        static = normal(SHAPES, 2, torch.bfloat16)
        if captured:
            with capture() as graph:
                step(optimizer, static)
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                step(optimizer, static)
        results.append(list(outcome(optimizer)))
    assert_same(*results)


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py")
def test_an_option_that_was_switched_on_before_a_capture_is_refused(capture):
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = Lion(params, backend="triton")
    step(optimizer, normal(SHAPES, 1, torch.bfloat16))
    optimizer.param_groups[0]["master_weights"] = True
    before = list(outcome(optimizer))
    with pytest.raises(RuntimeError, match="take a step first"), capture():
        step(optimizer, normal(SHAPES, 2, torch.bfloat16))
    assert_same(list(outcome(optimizer)), before)


# Models that change.


@every_policy
@every_optimizer
def test_a_model_that_becomes_another_dtype_after_the_optimizer_was_made(name, policy):
    model = Net()
    optimizer = made(name, model, **POLICIES[policy])
    train(model, optimizer, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        train(model, optimizer, 2)
        for p in model.parameters():
            specs = optimizer.state_specs(p, optimizer.param_groups[0])
            assert specs.keys() <= optimizer.state[p].keys()
            assert p.isfinite().all()


def test_a_model_made_on_meta_or_lazily_or_by_fake_tensors_has_a_state():
    for options in POLICIES.values():
        p = nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16, device="meta"))
        optimizer = AdamW([p], **options)
        optimizer.init_state()
        p.grad = torch.empty_like(p)
        optimizer.step()
        specs = optimizer.state_specs(p, optimizer.param_groups[0])
        assert {k: v.dtype for k, v in optimizer.state[p].items()} == {
            "step": torch.float64,
            **{k: spec.dtype for k, spec in specs.items()},
        }
        assert all(t.is_meta for t in optimizer.state[p].values())

        with FakeTensorMode():
            p = nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16))
            optimizer = AdamW([p], **options)
            p.grad = torch.empty_like(p)
            optimizer.step()
            assert optimizer.state[p].keys() == {"step", *specs}

        lazy = nn.LazyLinear(3, dtype=torch.bfloat16)
        optimizer = AdamW(lazy.parameters(), **options)
        for number in range(2):
            lazy(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(state["step"] == number + 1 for state in optimizer.state.values())
        if "stochastic_rounding" in options:
            assert sorted(int(s["number"]) for s in optimizer.state.values()) == [0, 1]


@pytest.mark.gpu
@every_policy
def test_a_model_that_moves_takes_its_state_along(policy, device):
    model = net(torch.bfloat16)
    optimizer = made("AdamW", model, **POLICIES[policy])
    train(model, optimizer, 1)
    model.to(device)
    train(model, optimizer, 1)
    assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {device.type}
