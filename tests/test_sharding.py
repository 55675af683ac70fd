"""Sharded parameters: whatever the layout, the numbers are those of whole ones."""

import copy
import os
from functools import cache
from itertools import product

import pytest
import sharded_on_four_processes as four
import torch
from filelock import FileLock
from helpers.comparing import Tolerance, assert_near, assert_same
from helpers.loops import Net, sharded, train, whole
from helpers.precision import joined
from helpers.processes import run_together
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, _utils

from fusedopt import Adafactor, AdamW, sharding
from fusedopt.interface import ParamSet, ShardPosition
from fusedopt.plan import Choice
from fusedopt.plan.costs import cost
from fusedopt.plan.families import Weight
from fusedopt.plan.mesh import shards
from fusedopt.precision import Precision

FINAL = ("params", "states")

STATISTICS = Tolerance("updates are differences of float32 weights, which are as near as that", rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where four processes leave what they have, for all workers of a test run."""
    shared = tmp_path_factory.getbasetemp().parent if os.environ.get("PYTEST_XDIST_WORKER") else None
    return (shared or tmp_path_factory.getbasetemp()) / "four_processes"


@pytest.fixture(scope="session")
def of_four_processes(folder):
    """A function from a case to what each of four processes has at its end. They run once for all workers."""

    @cache
    def everything():
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir(parents=True)
                run_together(four.__file__, four.WORLD, folder, timeout=1200, TRITON_INTERPRET="1")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(four.WORLD)]

    return lambda *key: [each[key if len(key) > 1 else key[0]] for each in everything()]


def named(cases):
    """The cases as parameters."""
    return [pytest.param(*case, id="-".join(case)) for case in cases]


@pytest.mark.parametrize("name, layout, backend", named(four.cases()))
def test_four_processes_have_the_numbers_of_one(of_four_processes, name, layout, backend):
    params = [torch.nn.Parameter(t) for t in four.tensors(0)]
    expected = four.result(four.run(name, params, lambda g: g, "eager"), params)
    first, *_ = each = of_four_processes(name, layout, backend)
    for result in each:
        assert result["skipped_steps"] == expected["skipped_steps"]
        assert result["average"] == first["average"]
        assert result["average"] == pytest.approx(expected["average"], rel=1e-6, abs=1e-6)
        for key in ("params", "states", "grad_norm"):
            assert_near(result[key], expected[key], rtol=1e-5, atol=1e-6, equal_nan=True)
        # To the bit, also where each process has worked it out by itself.
        assert_same([result["params"], result["states"]], [first[k] for k in FINAL])


@pytest.mark.parametrize("name, layout, backend", named(four.statistics_cases()))
def test_statistics_are_those_of_whole_tensors(of_four_processes, name, layout, backend):
    expected = four.run_tracked(name, [torch.nn.Parameter(t) for t in four.tensors(0)], lambda g: g, "eager")
    first, *_ = each = of_four_processes("statistics", name, layout, backend)
    for found in each:
        assert_near(found, expected, STATISTICS, equal_nan=True)
        assert_same(found, first, equal_nan=True)


def assert_states(actual, expected, to_the_bit):
    """With master weights the eager AdamW is torch's fused kernel, whose last bits depend on where a tensor ends."""
    if to_the_bit:
        assert_same(actual, expected)
        return
    for p, q, mine, state in zip(*(each[key] for key in ("params", "states") for each in (actual, expected))):
        assert_near(joined(p, mine["remainder"]), joined(q, state["remainder"]), rtol=1e-5, atol=1e-6)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert_near(mine[key], state[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, layout, backend", named(four.precise_cases()))
def test_four_processes_round_16_bits_as_one(of_four_processes, name, layout, backend):
    """To the bit, where no sum is spread over them."""
    expected = four.precise_result(*four.run_precisely(name, layout, lambda t: t, backend))
    for result in of_four_processes("precise", name, layout, backend):
        if "Adafactor" not in name:
            assert_states(result, expected, to_the_bit=(name, backend) != ("AdamW-master", "eager"))
            continue
        for p, q in zip(result["params"], expected["params"]):
            assert_near(p, q, rtol=2**-7, atol=1e-3)
            assert p.numel() < 50 or float((p != q).double().mean()) < 0.02
        for mine, state in zip(result["states"], expected["states"]):
            assert mine.get("number") == state.get("number")


@pytest.mark.parametrize("name", ["AdamW-master", "AdamW-stochastic"])
def test_a_checkpoint_of_four_processes_is_one_of_two_and_of_one(of_four_processes, name, folder):
    from torch import distributed

    shapes, expected = four.SHAPES[:4], None
    to_the_bit = name != "AdamW-master"
    for saved, went_on, resharded in (each[name] for each in of_four_processes("resharded")):
        assert_states(resharded, went_on, to_the_bit)
        wanted = ("remainder", torch.int16) if name == "AdamW-master" else ("number", torch.int64)
        assert all(state[wanted[0]].dtype == wanted[1] for state in saved["states"])
        expected = saved, went_on
    model = torch.nn.Module()
    for i, shape in enumerate(shapes):
        setattr(model, f"p{i}", torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))
    optimizer = four.POLICIES[name](model.parameters(), backend="eager")
    into = dict(zip(("model", "optimizer"), dcp.get_state_dict(model, optimizer)))
    distributed.checkpoint.load(into, checkpoint_id=folder / f"second checkpoint of {name}", no_dist=True)
    dcp.set_model_state_dict(model, into["model"])
    dcp.set_optimizer_state_dict(model, optimizer, into["optimizer"])
    assert_same(four.precise_result(optimizer, list(model.parameters())), expected[0])
    for p, g in zip(model.parameters(), four.tensors(2)):
        p.grad = g.bfloat16()
    optimizer.step()
    assert_states(four.precise_result(optimizer, list(model.parameters())), expected[1], to_the_bit)


def test_a_shard_whose_elements_cannot_be_numbered_is_refused_where_rounding_is_random(of_four_processes):
    for result in of_four_processes("refused"):
        for policy, message in result.items():
            assert (message is None) == (policy == "master_weights"), policy
            assert message is None or "shard it along one dimension" in message


def test_a_disagreement_gets_around_on_a_mesh_of_two_dimensions(of_four_processes):
    for said, weight in of_four_processes("disagreement"):
        assert said.startswith("the processes disagree about a step")
        assert_same(weight, torch.ones_like(weight))


COLLECTIVES = {"AdamW": 0, "AdamW-clipped": 1, "Adafactor": 3, "Adafactor-beta1": 3 + 1}


@pytest.mark.parametrize(
    "name, layout, backend", named((name, "rows", b) for name in COLLECTIVES for b in four.BACKENDS)
)
def test_collective_operations_of_a_step(of_four_processes, name, layout, backend):
    """On a mesh of one dimension, for seven parameters as for one; the norm is one number."""
    for result in of_four_processes(name, layout, backend):
        assert len(result["all_reduces"]) == four.STEPS * COLLECTIVES[name]
        assert name != "AdamW-clipped" or set(result["all_reduces"]) == {(1, 8)}


@pytest.mark.parametrize("how, name", four.model_cases())
def test_a_sharded_model_trains_saves_and_resumes(of_four_processes, how, name):
    """The checkpoint has whole tensors, and is that of the unsharded run."""
    model = four.model_of(name)
    optimizer = four.MODEL_OPTIMIZERS[name](model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer)["state"])
    train(model, optimizer, 2, seed=2)
    assert ("_StridedShard" in of_four_processes(how, name)[0]["placements"]) == (how != "fully_shard")
    for rank, result in enumerate(of_four_processes(how, name)):
        assert_same(result["resumed"], result["params"])
        if "bfloat16" in name:  # gradients are added up in bfloat16, in another order
            assert_near(result["params"], [p.detach() for p in model.parameters()], atol=0.2)
            continue
        if rank == 0:  # where torch gathers it
            assert_near(result["saved"]["optimizer"]["state"], saved, rtol=1e-4, atol=1e-6)
        assert_near(result["params"], [p.detach() for p in model.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", four.BACKENDS)
@pytest.mark.parametrize("convention", ["transformers", "keras"])
def test_a_sharded_model_trains_like_a_whole_one(backend, convention):
    plain = Net()
    train(plain, AdamW(plain.parameters(), lr=0.1, convention=convention, backend="eager"), 3)
    with sharded(Net()) as model:
        optimizer = AdamW(model.parameters(), lr=0.1, convention=convention, backend=backend)
        train(model, optimizer, 3)
        assert_near(whole(model), list(plain.parameters()), rtol=1e-5, atol=1e-6)
        assert {state["step"].item() for state in optimizer.state.values()} <= {1.0, 2.0, 3.0}
        assert all(hasattr(state["exp_avg"], "placements") for state in optimizer.state.values())


@pytest.mark.parametrize(
    "name, layout, backend", named(("Adafactor-beta1", layout, "eager") for layout in four.LAYOUTS)
)
def test_a_checkpoint_of_whole_tensors_loads_into_a_sharded_optimizer(of_four_processes, name, layout, backend):
    params = [torch.nn.Parameter(t) for t in four.tensors(0)]
    optimizer = four.run(name, params, lambda g: g, backend)
    for loaded, placements in of_four_processes("loaded", layout):
        assert_same(loaded, [optimizer.state[p] for p in params])
        assert placements == of_four_processes(name, layout, backend)[0]["placements"]


def test_a_checkpoint_of_shards_is_refused_by_an_unsharded_optimizer():
    with sharded(Net()) as model:
        optimizer = AdamW(model.parameters())
        train(model, optimizer, 1)
        saved = optimizer.state_dict()
        plain = AdamW(Net().parameters())
        with pytest.raises(ValueError, match=r"exp_avg as a DTensor.*gather the state"):
            plain.load_state_dict(saved)
        assert not plain.state


@pytest.mark.slow
@pytest.mark.parametrize("backend", four.BACKENDS)
def test_states_of_another_dtype_go_on(backend):
    """The kernels convert them: what they are converted to is the state from then on."""
    with sharded(Net()) as model:
        optimizer = Adafactor(model.parameters(), lr=0.1, relative_step=False, beta1=0.9, backend=backend)
        train(model, optimizer, 1)
        plain = Net()
        other = Adafactor(plain.parameters(), lr=0.1, relative_step=False, beta1=0.9, backend=backend)
        train(plain, other, 1)
        for params, one in ((model.parameters(), optimizer), (plain.parameters(), other)):
            for p in params:
                one.state[p]["exp_avg"] = one.state[p]["exp_avg"].bfloat16()
        train(model, optimizer, 2, seed=2)
        train(plain, other, 2, seed=2)
        for p, q in zip(model.parameters(), plain.parameters()):
            state = optimizer.state[p]["exp_avg"]
            assert state.dtype == other.state[q]["exp_avg"].dtype and state.placements == p.placements
            assert_near(p.full_tensor(), q, rtol=1e-5, atol=1e-6)


def test_torch_is_asked_for_the_position_of_a_shard_once(monkeypatch):
    """As the second of four processes, which never talk to each other here."""
    asked = []
    of_torch = _utils._compute_local_shape_and_global_offset
    monkeypatch.setattr(
        _utils, "_compute_local_shape_and_global_offset", lambda *args: asked.append(args) or of_torch(*args)
    )
    sharding._position_of.cache_clear()
    torch.distributed.init_process_group("fake", rank=1, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        layouts = [((8, 6), (2, 6), Shard(0)), ((8, 8), (8, 2), Shard(1)), ((8, 6), (2, 6), Shard(0))]
        expected = [ShardPosition(12, 36, 12), ShardPosition(2, 6, 2), ShardPosition(12, 36, 12)]
        for _ in range(2):
            params = [
                torch.nn.Parameter(
                    DTensor.from_local(torch.ones(own), mesh, [place], shape=torch.Size(shape), stride=(shape[1], 1))
                )
                for shape, own, place in layouts
            ]
            states = [{} for _ in params]
            param_set = ParamSet("lion", None, params, params, states, precision=Precision(stochastic_rounding=True))
            infos = sharding.local(param_set).shard_infos
            assert [info and info.position for info in infos] == expected
    finally:
        torch.distributed.destroy_process_group()
    assert len(asked) == 2


def test_scaled_gradients_of_shards():
    with sharded(Net()) as model:
        params = list(model.parameters())
        before = [p.clone() for p in whole(model)]
        AdamW(params, lr=0.1).apply_gradients([(torch.ones_like(p), p) for p in params], scale=0.5)
        for p, q in zip(whole(model), before):
            assert_near(p, q - 0.1, rtol=1e-4, atol=1e-5)


def test_what_an_overflow_in_one_process_stops_in_all(of_four_processes):
    """Whatever meshes the gradients are on: processes that go on would wait for the others for ever."""
    for result in of_four_processes("overflow in the last process"):
        for name, (before, after) in result.items():
            assert_same(before, after, name)


def test_states_of_another_layout_are_laid_out_anew(of_four_processes):
    for result in of_four_processes("from one layout to another"):
        for names, (loaded, expected, placements, expected_placements) in result.items():
            assert_same(loaded, expected, names)
            assert placements == expected_placements, names


def test_a_gradient_that_is_not_sharded_like_its_parameter_is_refused():
    with sharded(Net()) as model:
        p = next(model.parameters())
        whole_p = torch.nn.Parameter(torch.ones(p.shape))
        for one, grad in ((p, torch.ones(p.shape)), (whole_p, torch.ones_like(p))):
            optimizer = AdamW([one])
            with pytest.raises(RuntimeError, match="placements"):
                optimizer.apply_gradients([(grad, one)])
            assert not optimizer.state


def test_a_parameter_that_is_a_sum_over_processes_is_refused():
    with sharded(Net()) as model:
        mesh = next(model.parameters()).device_mesh
        p = torch.nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Partial()]))
        optimizer = Adafactor([p])
        with pytest.raises(RuntimeError, match="what is a sum over processes"):
            optimizer.apply_gradients([(torch.ones_like(p), p)])
        assert not optimizer.state


def planned(name, weights, fsdp, tp):
    """What `fusedopt.plan` says of an optimizer of `four.CASES` or `four.MODEL_OPTIMIZERS`."""
    guard = {"AdamW-clipped": {"max_grad_norm": 0.5}, "Adafactor-beta1": {"max_grad_norm": 2.0, "beta1": 0.9}}
    kind = AdamW if "AdamW" in name else Adafactor
    options = {"AdamW": {"max_grad_norm": 1.0}} if weights[0].name != "case" else guard
    return cost(Choice(kind, torch.float32, options.get(name, {})), shards(weights, fsdp, tp), [])


@pytest.mark.parametrize(
    "name, layout, backend",
    named(product(COLLECTIVES, ["rows", "rows and columns"], four.BACKENDS)),
)
def test_states_and_collective_operations_are_those_of_the_plan(of_four_processes, name, layout, backend):
    tp = 1 if layout == "rows" else 2
    weights = [Weight("case", shape, len(shape) - 1 if shape else None) for shape in four.SHAPES]
    plan = planned(name, weights, four.WORLD // tp, tp)
    result = of_four_processes(name, layout, backend)[0]
    calls = result["all_reduces"]
    assert len(calls) == four.STEPS * plan.all_reduces
    assert result["state_bytes"] == plan.states
    if backend == "triton":
        assert sum(size for _, size in calls) == four.STEPS * plan.all_reduced


@pytest.mark.parametrize("how", four.MODELS)
@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_collective_operations_of_a_sharded_model_are_those_of_the_plan(of_four_processes, how, name):
    split = {"first.weight": 0, "first.bias": 0}
    weights = [Weight(key, tuple(p.shape), split.get(key)) for key, p in Net().named_parameters()]
    tp = 1 if how == "fully_shard" else 2
    plan = planned(name, weights, four.WORLD // tp, tp)
    for result in of_four_processes(how, name):
        assert len(result["all_reduces"]) == 2 * plan.all_reduces
