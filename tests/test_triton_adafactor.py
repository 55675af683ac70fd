"""The Triton Adafactor as an optimizer: launches, workspace, what a step skips, checkpoints, graphs."""

import copy
import gc
import math
import weakref
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.adafactor import TritonAdafactor, after, normal, parameters, run
from helpers.comparing import assert_near, assert_same
from helpers.kernels import KERNELS, TINY, set_constants
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedopt import Adafactor
from fusedopt_kernels.adafactor import plan as adafactor_plan
from fusedopt_kernels.adafactor.layout import MATRIX, SCALARS, SMALL, VECTOR
from fusedopt_kernels.adafactor.splits import Shards
from fusedopt_kernels.table import ROWS_PER_PROGRAM, dtype_codes, launch_keys
from perf import workloads

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(33,), (40, 3), (2, 3, 3), (16, 64)]  # a vector, an odd matrix, small matrices, an even one
SIX = Counter(prologue=1, sums=1, averages=1, squares=1, finish=1, apply=1)


@contextmanager
def counted(monkeypatch):
    """Names of the kernels that are launched inside."""
    names = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    with monkeypatch.context() as patch:
        for module, kernel_names in KERNELS.items():
            for name in kernel_names:
                patch.setattr(module, name, Counted(name, getattr(module, name)))
        yield names


def launches(monkeypatch, start, device, grads=None, groups=1, **options):
    params = parameters([p.to(device) for p in start])
    rates = [{"lr": 0.1 * (i + 1), "beta1": 0.9 if i else None, "scale_parameter": i > 1} for i in range(groups)]
    optimizer = TritonAdafactor(
        [{"params": params[i::groups], **rates[i]} for i in range(groups)], relative_step=False, **options
    )
    with counted(monkeypatch) as names:
        optimizer.apply_gradients((g if grads else p.detach(), p) for p, g in zip(params, grads or params))
    return Counter(names)


@pytest.mark.parametrize("groups", [1, 3])
def test_six_launches_for_all_tensors(groups, monkeypatch, device):
    """Vectors, matrices and convolutions, even and odd, in groups with and without momentum and parameter scale."""
    assert launches(monkeypatch, normal(*SHAPES * 3), device, groups=groups) == SIX


def test_six_launches_for_many_tensors(monkeypatch, device):
    assert launches(monkeypatch, normal(*[(1 + i % 5,) for i in range(60)], (40, 2)), device) == SIX


@pytest.mark.slow
def test_classes_share_what_does_not_read_gradients(monkeypatch, device):
    """A second dtype adds the three launches that do; float64 is averaged by itself."""
    start = [normal(shape, dtype=d)[0] for d in (torch.float32, torch.bfloat16) for shape in SHAPES]
    assert launches(monkeypatch, start, device) == SIX + Counter(sums=1, squares=1, apply=1)
    start += normal((40, 3), dtype=torch.float64)
    assert launches(monkeypatch, start, device) == SIX + Counter(sums=2, squares=2, apply=2, averages=1)


def test_less_launches_where_there_is_less_to_do(monkeypatch, device):
    assert launches(monkeypatch, normal((2, 3, 3), (7,)), device) == SIX - Counter(averages=1)
    assert launches(monkeypatch, normal((7,)), device) == SIX - Counter(averages=1, squares=1)


# The workspace.


def plan_for(tensors, shards=None):
    small = [True] * len(tensors) if shards is None else [not one for one in shards.is_shard]
    rows = [adafactor_plan.shape_of(t, small=one) for t, one in zip(tensors, small)]
    shapes = adafactor_plan.Shapes(*np.array(rows, np.int64).T)
    keys = launch_keys([dtype_codes([t.dtype for t in tensors])] * 2, np.zeros(len(tensors), bool))
    return shapes, adafactor_plan.plan_of(shapes, keys, shards)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["gpt2", "llama_1g", "bert_base", "vit_l", "resnet50"])
def test_the_workspace_is_at_most_2_percent_of_the_parameters(name, dtype):
    workload = workloads.get(f"{name}:{dtype}")
    tensors = [workload.empty(shape, torch.device("meta")) for shape in workload.shapes]
    _, plan = plan_for(tensors)
    scalars = 8 * 10 * (len(tensors) + 127)
    chunks = 8 * sum(int(n.sum()) for n in (plan.pieces, plan.matrix_pieces, plan.averages, plan.whole))
    sums = 4 * plan.partial_sums[0] + 8 * (plan.partial_sums[1] + plan.square_partials)
    workspace = sums + scalars + chunks
    assert workspace <= 0.02 * sum(t.nbytes for t in tensors)


@pytest.mark.slow
def test_the_workspace_is_reported_and_made_once(device):
    params = parameters([p.to(device) for p in normal(*SHAPES, (300, 200))])
    optimizer = TritonAdafactor(params)
    assert optimizer.workspace_bytes() == 0
    addresses = set()
    for seed in range(2):
        run(optimizer, [[g.to(device) for g in normal(*SHAPES, (300, 200), seed=seed)]])
        (stepper,) = optimizer._engine.steppers.values()
        addresses.add(tuple(t.data_ptr() for t in stepper._tables._eager._scratch.values()))
    assert len(addresses) == 1
    _, plan = plan_for(params)
    sums = 4 * plan.partial_sums[0] + 8 * plan.square_partials
    assert sums <= optimizer.workspace_bytes() <= sums + 8 * SCALARS.places.length * ROWS_PER_PROGRAM + 8 * 60
    assert Adafactor(params, backend="eager").workspace_bytes() == 0


def tensors():
    sides = st.integers(0, 40)
    shapes = st.one_of(st.tuples(sides), st.tuples(sides, sides), st.tuples(st.integers(0, 4), sides, sides))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    return st.lists(
        st.builds(lambda s, d: torch.empty(s, dtype=d, device="meta"), shapes, dtypes), min_size=1, max_size=8
    )


@settings(max_examples=60)
@given(tensors(), st.sampled_from([{}, TINY, {**TINY, "SMALL_SIDE": 2}]))
def test_every_tensor_has_a_place_of_its_own_and_is_cut_the_same_among_others(tensors, constants):
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, constants)
        shapes, plan = plan_for(tensors)
        alone = [plan_for([t])[1] for t in tensors]
    f = plan.fields
    pieces = plan.pieces
    cut = ("tiles_x", "tiles_y", "rows_per_program", "row_programs", "pieces")
    taken = {False: [], True: []}
    for i, t in enumerate(tensors):
        assert pieces[i] == alone[i].pieces[0] and (pieces[i] == 0) == (t.numel() == 0)
        assert all(f[name][i] == alone[i].fields[name][0] for name in cut) or t.numel() == 0
        if shapes.kind[i] == MATRIX.value and t.numel():
            matrices, (height, width) = math.prod(t.shape[:-2]), t.shape[-2:]
            tiles_x, tiles_y, programs = (int(f[name][i]) for name in ("tiles_x", "tiles_y", "row_programs"))
            sums, means = int(f["partial_sums"][i]), int(f["row_mean_partials"][i])
            wide = t.dtype is torch.float64
            taken[wide].append((sums, sums + matrices * (tiles_x * height + tiles_y * width)))
            taken[wide].append((means, means + matrices * programs))
            assert programs * f["rows_per_program"][i] >= height > (programs - 1) * f["rows_per_program"][i]
            assert pieces[i] == matrices * tiles_x * tiles_y
    for places, size in ((taken[False], plan.partial_sums[0]), (taken[True], plan.partial_sums[1])):
        borders = [0, *(border for place in sorted(places) for border in place), size]
        assert borders == sorted(borders)
    assert (f["square_partials"] == np.cumsum(2 * pieces) - 2 * pieces).all()
    assert plan.square_partials == 2 * pieces.sum()


def shards_of(tensors, overs):
    """Shards, None for whole ones, whose rows, columns and elements are sharded over what the letters stand for."""
    size = np.array([t.numel() for t in tensors])
    over = [[None if own is None else own[i] for own in overs] for i in range(3)]
    return Shards(np.array([own is not None for own in overs], np.int64), size, size, size, *over)


@settings(max_examples=60)
@given(tensors(), st.lists(st.none() | st.tuples(*[st.sampled_from("ab")] * 3), min_size=8, max_size=8))
def test_sums_that_processes_add_up_lie_behind_each_other(tensors, overs):
    """Nowhere else, and in an order that does not depend on how much of the tensors a process has."""
    overs = overs[: len(tensors)]
    shards = shards_of(tensors, overs)
    shapes, plan = plan_for(tensors, shards)
    f = {name: column.tolist() for name, column in plan.fields.items()}
    own = {False: [], True: []}  # places of each tensor alone
    shared = {phase: {} for phase in ("sums", "means", "squares")}
    for i, (t, over) in enumerate(zip(tensors, overs)):
        matrices, height, width = (int(a[i]) for a in (shapes.matrices, shapes.height, shapes.width))
        wide = t.dtype is torch.float64
        if shapes.kind[i] == MATRIX.value:
            sums = matrices * (f["tiles_x"][i] * height + f["tiles_y"][i] * width)
            own[wide] += [(f["partial_sums"][i], sums), (f["row_mean_partials"][i], matrices * f["row_programs"][i])]
        if over is not None:
            if shapes.kind[i] == MATRIX.value:
                shared["sums"].setdefault((wide, over[1]), []).append((f["row_totals"][i], matrices * height))
                shared["sums"].setdefault((wide, over[0]), []).append((f["column_totals"][i], matrices * width))
                shared["means"].setdefault((wide, over[0]), []).append((f["row_means"][i], matrices))
                assert f["row_means_count"][i] == 1
            shared["squares"].setdefault((False, over[2]), []).append((f["square_totals"][i], 2))
    for phase, places in shared.items():
        segments = {(bool(s.wide), s.processes): (s.start, s.stop) for s in plan.segments[phase]}
        assert segments.keys() == places.keys()
        for key, (start, stop) in segments.items():
            assert sum(length for _, length in places[key]) == stop - start
            assert all(start <= at and at + length <= stop for at, length in places[key] if length)
            if phase != "squares":
                own[key[0]] += places[key]
    for wide, size in ((False, plan.partial_sums[0]), (True, plan.partial_sums[1])):
        borders = [border for at, length in sorted(own[wide]) if length for border in (at, at + length)]
        assert borders == sorted(borders) and all(0 <= border <= size for border in borders)
    assert plan.square_partials == 2 * int(plan.pieces.sum()) + 2 * sum(over is not None for over in overs)

    empty = [torch.empty((0, *t.shape[1:]), dtype=t.dtype, device="meta") if t.dim() else t for t in tensors]
    _, other = plan_for(empty, shards)
    for phase, segments in plan.segments.items():
        assert [(s.wide, s.processes) for s in segments] == [(s.wide, s.processes) for s in other.segments[phase]]


def test_what_a_tensor_is():
    def shape_of(*shape, layout=torch.contiguous_format):
        return adafactor_plan.shape_of(torch.empty(shape, device="meta").contiguous(memory_format=layout))

    last = torch.channels_last
    assert shape_of() == (VECTOR.value, 1, 1, 1, 1, 1)
    assert shape_of(7) == (VECTOR.value, 7, 1, 1, 1, 1)
    assert shape_of(40, 3) == (MATRIX.value, 120, 1, 40, 3, 1)
    assert shape_of(32, 32) == (SMALL.value, 1024, 1, 32, 32, 1)
    assert shape_of(8, 4, 3, 5) == (SMALL.value, 480, 32, 3, 5, 1)
    assert shape_of(8, 4, 3, 5, layout=last) == (SMALL.value, 480, 32, 3, 5, 4)
    assert shape_of(8, 4, 1, 1, layout=last) == (SMALL.value, 32, 32, 1, 1, 1)
    assert shape_of(2, 4, 40, 5, layout=last) is None
    assert adafactor_plan.shape_of(torch.empty(40, 5, device="meta").t()) is None


def test_a_stepper_is_gone_as_soon_as_its_optimizer_lets_it_go(device):
    """It holds tables and workspace on the device, which must not wait for Python's collector of cycles."""
    params = parameters([p.to(device) for p in normal((40, 3))])
    optimizer = TritonAdafactor(params)
    run(optimizer, [[torch.ones_like(p) for p in params]])
    (stepper,) = optimizer._engine.steppers.values()
    gone = weakref.ref(stepper)
    gc.disable()
    try:
        del stepper
        optimizer._forget()
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)], ids=str)
def test_a_model_that_changes_its_dtype_between_two_steps(dtypes, device):
    """The states' own dtypes follow the arithmetic: what is written is never longer than what is there."""
    results = []
    for backend in ("triton", "eager"):
        model = torch.nn.Linear(40, 50)
        model.load_state_dict(dict(zip(("weight", "bias"), normal((50, 40), (50,)))))
        model.to(device)
        optimizer = Adafactor(model.parameters(), lr=0.1, relative_step=False, beta1=0.9, backend=backend)
        for number, dtype in enumerate((torch.float32, *dtypes)):
            model.to(dtype)
            grads = normal((50, 40), (50,), seed=number + 1)
            run(optimizer, [[g.to(device, dtype) for g in grads]])
        results.append([p.detach().double() for p in model.parameters()])
        results[-1] += [optimizer.state[p][name].double() for p in model.parameters() for name in optimizer.state[p]]
    # As exact as bfloat16 where that was on the way.
    tolerance = 2**-7 if torch.bfloat16 in dtypes else 1e-5
    assert_near(*results, rtol=tolerance, atol=tolerance)


# What a step reads, and what it leaves alone.


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.slow
@pytest.mark.parametrize("found", [0.0, 1.0, math.nan])
def test_a_step_with_found_inf_changes_nothing_and_is_not_counted(found, device):
    start, first, second = normal(*SHAPES), normal(*SHAPES, seed=1), normal(*SHAPES, seed=2)
    options = {"beta1": 0.9, "weight_decay": 0.1}
    params = parameters([p.to(device) for p in start])
    optimizer = TritonAdafactor(params, **options)
    run(optimizer, [[g.to(device) for g in first]])
    before, weights = state_of(optimizer), [p.detach().clone() for p in params]
    optimizer.grad_scale = torch.tensor([8.0], device=device)
    optimizer.found_inf = torch.tensor([found], device=device)
    run(optimizer, [[8.0 * g.to(device) for g in second]])
    if found == 0.0:
        expected, _ = after(TritonAdafactor, start, [first, second], device, **options)
        assert_same(params, expected)
    else:
        assert_same(params, weights)
        assert_same(before, state_of(optimizer))


def test_learning_rate_on_the_device_is_read_at_every_step(device):
    options = {"relative_step": False, "weight_decay": 0.1}
    params, others = (parameters([p.to(device) for p in normal(*SHAPES)]) for _ in range(2))
    lr = torch.tensor(1.0, device=device)
    by_tensor, by_value = TritonAdafactor(params, lr=lr, **options), TritonAdafactor(others, lr=1.0, **options)
    for k, rate in enumerate((0.5, 0.0)):
        lr.fill_(rate)
        by_value.param_groups[0]["lr"] = rate
        for optimizer in (by_tensor, by_value):
            run(optimizer, [[g.to(device) for g in normal(*SHAPES, seed=k)]])
        assert_same(params, others)


def test_groups_and_missing_gradients_are_as_on_the_eager_backend(device):
    def make(params, **options):
        groups = [
            {"params": params[:2], "beta1": 0.5, "weight_decay": 0.3},
            {"params": params[2:3], "relative_step": False, "lr": 0.3, "eps": (1e-3, 0.1), "maximize": True},
            {"params": params[3:], "scale_parameter": False, "warmup_init": True, "decay_rate": -0.5},
        ]
        return Adafactor(groups, clip_threshold=0.5, **options)

    start, steps = normal(*SHAPES), [normal(*SHAPES, seed=k) for k in (1, 2, 3)]
    for k, i in [(0, 0), (0, 1), (1, 1), (1, 3), (2, 2)]:
        steps[k][i] = None
    ours, states = after(make, start, steps, device, backend="triton")
    expected, others = after(make, start, steps, torch.device("cpu"), backend="eager")
    assert [int(s["step"]) for s in states] == [2, 1, 2, 2]
    for p, q, s, t in zip(ours, expected, states, others):
        assert_near(p, q, rtol=2e-6, atol=2e-6)
        assert s.keys() == t.keys()
        for name, value in t.items():
            assert_near(s[name], value, rtol=2e-6, atol=2e-6 * float(value.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_another_dtype(dtype, device):
    start, grads = normal(*SHAPES), [g.bfloat16() for g in normal(*SHAPES, seed=1)]
    expected, _ = after(TritonAdafactor, start, [[g.float() for g in grads]], device)
    params = parameters([p.to(device) for p in start])
    TritonAdafactor(params).apply_gradients([(g.to(device, dtype), p) for p, g in zip(params, grads)])
    assert_near(params, expected, rtol=1e-6, atol=1e-7)


# Checkpoints.


@pytest.mark.parametrize("in_turn", [("eager", "triton"), ("triton", "eager")], ids="->".join)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_a_checkpoint_moves_between_the_backends(in_turn, dtype, device):
    shapes = SHAPES[:3]
    start, steps = normal(*shapes, dtype=dtype), [normal(*shapes, seed=k, dtype=dtype) for k in (1, 2, 3)]
    steps = [[g.to(device) for g in grads] for grads in steps]
    options = {"beta1": 0.9, "weight_decay": 0.1}
    stayed, _ = after(TritonAdafactor, start, steps, device, **options)
    params = parameters([p.to(device) for p in start])
    first = Adafactor(params, backend=in_turn[0], **options)
    run(first, steps[:2])
    second = Adafactor(params, backend=in_turn[1], **options)
    second.load_state_dict(first.state_dict())
    run(second, steps[2:])
    for p, q in zip(params, stayed):
        tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 0.0}
        assert_near(p.detach().cpu(), q, **tolerance)


def test_states_of_another_dtype_or_layout_are_converted(device):
    """As in a checkpoint of the same model in float64."""
    shapes, steps = SHAPES[1:3], [normal(*SHAPES[1:3], seed=k) for k in (1, 2)]
    expected, _ = after(TritonAdafactor, normal(*shapes), steps, device, beta1=0.9)
    params = parameters([p.to(device) for p in normal(*shapes)])
    optimizer = TritonAdafactor(params, beta1=0.9)
    run(optimizer, [[g.to(device) for g in steps[0]]])
    for state in optimizer.state.values():
        for name in state.keys() - {"step"}:
            state[name] = state[name].double()
            if state[name].dim() == 2:
                state[name] = state[name].t().contiguous().t()
    run(optimizer, [[g.to(device) for g in steps[1]]])
    assert_same(params, expected)
    dtypes = {value.dtype for state in optimizer.state.values() for name, value in state.items() if name != "step"}
    assert dtypes == {torch.float32}


# CUDA graphs, as test_capture.py stands in for them.


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py")
@pytest.mark.slow
def test_captured_steps_and_eager_ones_in_turn(capture, device):
    """The rate changes between replays; eager steps in between have other gradients, at other addresses."""
    start = [p.to(device) for p in normal(*SHAPES)]
    steps = [[g.to(device) for g in normal(*SHAPES, seed=k)] for k in range(3)]
    pairs = []
    for _ in range(2):
        params, lr = parameters(start), torch.tensor(0.1, device=device)
        optimizer = TritonAdafactor(params, lr=lr, relative_step=False, beta1=0.9, weight_decay=0.1)
        run(optimizer, [steps[0]])
        pairs.append((optimizer, params, lr))
    (ours, params, rate), (theirs, others, other_rate) = pairs
    with capture() as graph:
        run(ours, [steps[1]])
    assert graph.launches == SIX.total()
    for g in steps[2]:
        g.neg_()
    for value in (0.3, 0.0, 0.2):
        rate.fill_(value)
        other_rate.fill_(value)
        graph.replay()
        run(theirs, [steps[1]])
        run(ours, [[g.clone() for g in steps[2]]])
        run(theirs, [steps[2]])
        assert_same(params, others)
        assert_same(state_of(ours), state_of(theirs))


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py")
def test_a_capture_of_kernels_that_never_ran_is_refused(capture, device):
    params = parameters([p.to(device) for p in normal((40, 3), (7,))])
    optimizer = TritonAdafactor(params)
    run(optimizer, [[torch.ones_like(p) for p in params]])
    before = [p.detach().clone() for p in params]
    message = "take one step like the captured one before the capture"
    with capture() as graph, pytest.raises(RuntimeError, match=message):
        optimizer.apply_gradients([(torch.ones_like(p).bfloat16(), p) for p in params])
    assert graph.launches == 0
    assert_same(params, before)
