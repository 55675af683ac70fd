"""Resuming is the uninterrupted run, bit for bit, whatever carried the checkpoint."""

import copy
from typing import Any

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.files import through_a_file
from helpers.loops import Net, sharded, train, whole
from helpers.optimizers import BACKENDS, ROWS, VARIANTS, scheduler_for
from helpers.schedules import EVERY_NAME, advance, by_name
from torch.distributed.checkpoint import state_dict as dcp

from fusedopt import Adafactor, AdamW, AdamWeightDecay
from fusedopt.optimizer.state import settle_states

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def is_slow(row: Any, dtype: torch.dtype) -> bool:
    """True where the interpreter runs, but for one dtype."""
    return row.values[1] == "triton" and dtype is not torch.float32


def runs(name: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    model = Net(seed).to(device, dtype)
    optimizer = VARIANTS[name](model, backend=backend)
    return model, optimizer, scheduler_for(name, optimizer)


@pytest.mark.parametrize(
    "name, backend, dtype",
    [
        pytest.param(
            *row.values, dtype, id=f"{row.id}-{dtype}", marks=[*row.marks, *[pytest.mark.slow] * is_slow(row, dtype)]
        )
        for row in ROWS
        for dtype in DTYPES
    ],
)
def test_resuming_from_a_file(name, backend, dtype, device):
    more = 3 if backend == "eager" else 1  # steps
    model, optimizer, scheduler = runs(name, backend, device, dtype)
    train(model, optimizer, 3, scheduler)
    parts = {"model": model, "optimizer": optimizer} | ({"scheduler": scheduler} if scheduler else {})
    saved = through_a_file({key: part.state_dict() for key, part in parts.items()})
    train(model, optimizer, more, scheduler, seed=2)

    resumed, other, other_scheduler = runs(name, backend, device, dtype, seed=9)
    train(resumed, other, 1, other_scheduler)  # a checkpoint also replaces what was there
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    if scheduler:
        other_scheduler.load_state_dict(saved["scheduler"])
    train(resumed, other, more, other_scheduler, seed=2)
    assert_same(model, resumed)
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("optimizer_name", ["AdamW", "Adafactor-lr-beta1", "AdamWeightDecay"])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_resuming_with_every_schedule(name, optimizer_name):
    def run(seed):
        model = Net(seed)
        optimizer = VARIANTS[optimizer_name](model)
        return model, optimizer, by_name(name, optimizer, num_training_steps=8)

    def go_on(model, optimizer, scheduler, seed):
        for _ in range(4):
            train(model, optimizer, 1, seed=seed)
            advance(scheduler)

    uninterrupted = run(0)
    go_on(*uninterrupted, seed=1)
    saved = through_a_file([part.state_dict() for part in uninterrupted])
    go_on(*uninterrupted, seed=2)
    resumed = run(9)
    for part, state in zip(resumed, saved):
        part.load_state_dict(state)
    go_on(*resumed, seed=2)
    assert_same(uninterrupted[0], resumed[0])


@pytest.mark.parametrize("there", BACKENDS)
@pytest.mark.parametrize("here", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW", "AdamW-torch-amsgrad", "AdamWeightDecay", "Adafactor"])
def test_a_checkpoint_of_one_backend_is_one_of_the_other(name, here, there, device):
    model, optimizer, _ = runs(name, here, device)
    train(model, optimizer, 3)
    other = VARIANTS[name](model, backend=there)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())
    on_the_other = copy.deepcopy(model)
    moved = VARIANTS[name](on_the_other, backend=there)
    moved.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1, seed=2)
    train(on_the_other, moved, 1, seed=2)
    # Two backends may differ in the last bits of each update, which is at most 0.05.
    assert_near(model, on_the_other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, backend", ROWS)
def test_looking_at_a_fresh_optimizer_changes_nothing(name, backend, device):
    model, optimizer, _ = runs(name, backend, device)
    before, groups = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["param_groups"])
    shown = dcp.get_optimizer_state_dict(model, optimizer)
    assert_same(model, before)
    assert_same(optimizer.state_dict()["param_groups"], groups)
    assert {state["step"].item() for state in optimizer.state.values()} == {0.0}
    assert shown["state"].keys() == {key for key, _ in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    reference = VARIANTS[name](before, backend=backend)
    train(model, optimizer, 1)
    train(before, reference, 1)
    assert_same(model, before)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_through_a_folder_of_distributed_checkpoint(name, flat, tmp_path):
    model, optimizer, _ = runs(name, "eager", torch.device("cpu"))
    train(model, optimizer, 4)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    parts = dict(zip(("model", "optimizer"), dcp.get_state_dict(model, optimizer, options=options)))
    torch.distributed.checkpoint.save(parts, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, 3, seed=2)

    resumed, other, _ = runs(name, "eager", torch.device("cpu"), seed=9)
    before = copy.deepcopy(resumed)
    into = dict(zip(("model", "optimizer"), dcp.get_state_dict(resumed, other, options=options)))
    assert_same(resumed, before)
    torch.distributed.checkpoint.load(into, checkpoint_id=tmp_path, no_dist=True)
    dcp.set_model_state_dict(resumed, into["model"])
    dcp.set_optimizer_state_dict(resumed, other, into["optimizer"], options=options)
    assert {state["step"].item() for state in other.state.values()} <= {3.0, 4.0}
    train(resumed, other, 3, seed=2)
    assert_same(model, resumed)


@pytest.mark.parametrize("name", VARIANTS)
def test_setting_the_state_of_a_fresh_optimizer_moves_no_weight(name):
    model, optimizer, _ = runs(name, "eager", torch.device("cpu"))
    train(model, optimizer, 4)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    other_model, other, _ = runs(name, "eager", torch.device("cpu"))
    before = copy.deepcopy(other_model)
    dcp.set_optimizer_state_dict(other_model, other, saved)
    assert_same(other_model, before)
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "AdamW-eps_0", "AdamWeightDecay-function"])
def test_looking_at_a_fresh_optimizer_of_a_sharded_model_changes_nothing(name):
    with sharded(Net()) as model:
        optimizer = VARIANTS[name](model)
        shown = dcp.get_optimizer_state_dict(model, optimizer, options=dcp.StateDictOptions(full_state_dict=True))
        assert {float(state["step"]) for state in shown["state"].values()} == {0.0}
        assert_same(whole(model), whole(Net()))


def test_a_first_step_of_a_warm_up_on_zero_gradients_counts():
    """To the optimizer it looks like what torch.distributed.checkpoint does."""
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}


def test_frozen_parameters_have_no_state_to_look_at():
    model = Net()
    model.sometimes.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    assert dcp.get_optimizer_state_dict(model, optimizer)["state"].keys() == {
        "first.weight",
        "first.bias",
        "last.weight",
    }


def test_init_state_lets_torch_set_what_never_had_a_gradient():
    model = Net()
    optimizer = AdamW(model.parameters())
    optimizer.init_state()
    model(torch.ones(2, 5), skip=True).sum().backward()
    optimizer.step()
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    assert {float(state["step"]) for state in saved["state"].values()} == {0.0, 1.0}
    other_model = Net()
    other = AdamW(other_model.parameters())
    dcp.set_optimizer_state_dict(other_model, other, saved)
    assert_same(other.state_dict(), optimizer.state_dict())


def test_a_compiled_models_checkpoint_is_the_plain_ones():
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer = AdamW(compiled.parameters())
    train(model, optimizer, 2)
    saved = dcp.get_optimizer_state_dict(compiled, optimizer)
    other_model = Net(9)
    other = AdamW(other_model.parameters())
    dcp.set_optimizer_state_dict(other_model, other, saved)
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_in_a_model_that_changed_its_dtype(name):
    """The state keeps the dtype that it had, in the uninterrupted run as in the resumed one."""
    model, optimizer, _ = runs(name, "eager", torch.device("cpu"))
    train(model, optimizer, 3)
    model.to(torch.bfloat16)
    train(model, optimizer, 3, seed=2)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    states = saved["optimizer"]["state"].values()
    assert all(t.dtype == torch.float32 for state in states for name, t in state.items() if name != "step")

    resumed, other, _ = runs(name, "eager", torch.device("cpu"), seed=9)
    resumed.to(torch.bfloat16)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(model, optimizer, 3, seed=3)
    train(resumed, other, 3, seed=3)
    assert_same(model, resumed)


def test_states_follow_their_parameters_to_another_device():
    model, optimizer, _ = runs("AdamW", "eager", torch.device("cpu"))
    train(model, optimizer, 1)
    for p in model.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.to("meta")))
    settle_states(optimizer, optimizer.param_groups)  # what the next step does; nothing can be stepped on "meta"
    assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_moved_to_the_gpu_goes_on_there(name, device):
    model, optimizer, _ = runs(name, "auto", torch.device("cpu"))
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    model.to(device)
    loaded_model = copy.deepcopy(model)
    loaded = VARIANTS[name](loaded_model)
    loaded.load_state_dict(saved)
    train(model, optimizer, 2, seed=2)
    train(loaded_model, loaded, 2, seed=2)
    assert_same(model, loaded_model)


@pytest.mark.parametrize("kind", ["foreach", "fused", "for_loop"])
@pytest.mark.parametrize("ours", ["AdamW-torch-amsgrad", "AdamW-torch"])
def test_torch_goes_on_from_ours(ours, kind):
    options = {"foreach": kind == "foreach", "fused": kind == "fused"}
    amsgrad = ours.endswith("amsgrad")
    model = Net().double()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-8, convention="torch", amsgrad=amsgrad)
    train(model, optimizer, 4)
    theirs_model = copy.deepcopy(model)
    theirs = torch.optim.AdamW(theirs_model.parameters(), **options)
    theirs.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, optimizer, 3, seed=2)
    train(theirs_model, theirs, 3, seed=2)
    assert_near(model, theirs_model, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("ours", [AdamW, AdamWeightDecay], ids=lambda c: c.__name__)
def test_torchs_optimizers_accept_ours(ours, theirs):
    model = Net()
    optimizer = ours(model.named_parameters())
    train(model, optimizer, 2)
    other = theirs(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    train(model, other, 1)


def test_transformers_adafactor_and_ours_continue_each_other():
    theirs_class = pytest.importorskip("transformers.optimization").Adafactor
    model = Net().double()
    theirs = theirs_class(model.parameters(), weight_decay=0.1)
    train(model, theirs, 3)
    ours_model = copy.deepcopy(model)
    ours = Adafactor(ours_model.parameters())
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    back_model = copy.deepcopy(model)
    back = theirs_class(back_model.parameters())
    back.load_state_dict(through_a_file(ours.state_dict()))
    for one_model, one in ((model, theirs), (ours_model, ours), (back_model, back)):
        train(one_model, one, 3, seed=2)
    assert_near(ours_model, model, rtol=1e-9, atol=1e-12)
    assert_near(back_model, model, rtol=1e-9, atol=1e-12)


def test_looking_for_a_state_that_is_not_there_yet_makes_none():
    """`optimizer.state` is a dict that makes an empty entry for whoever asks."""
    model = Net()
    optimizer = AdamW(model.parameters())
    assert all(optimizer.state[p] == {} for p in model.parameters())
    train(model, optimizer, 1)
