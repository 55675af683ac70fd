"""Checkpoints that other tools made, and loads that fail: everything is loaded, or nothing has changed."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers.comparing import assert_same, same
from helpers.files import through_a_file
from helpers.loops import Net, train
from helpers.optimizers import OPTIMIZERS

from fusedopt import Adafactor, AdamW, AdamWeightDecay

MAKE = {name: partial(row, **{row.rate: 0.01, **row.fixed_rate}) for name, row in OPTIMIZERS.items()}
every_optimizer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def trained(make, seed=0, **options):
    model = Net(seed)
    optimizer = make(model, **options)
    train(model, optimizer, 2)
    return model, optimizer


# What other tools make of a checkpoint.


def per_state(change):
    return lambda saved: {**saved, "state": {i: change(dict(state)) for i, state in saved["state"].items()}}


def per_group(change):
    return lambda saved: {**saved, "param_groups": [change(dict(group)) for group in saved["param_groups"]]}


def in_float32(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(in_float32, value))
    return value if isinstance(value, (bool, type(None))) else torch.tensor(value)


def without_tensors(value):
    if isinstance(value, dict):
        return {key: without_tensors(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(without_tensors, value))
    return value.tolist() if isinstance(value, torch.Tensor) else value


FORMS = {
    "groups in a tuple": lambda saved: {**saved, "param_groups": tuple(saved["param_groups"])},
    "options as tensors": per_group(
        lambda g: {k: v if k in ("params", "param_names", "lr") else in_float32(v) for k, v in g.items()}
    ),
    "moments as arrays": per_state(lambda state: {name: value.numpy() for name, value in state.items()}),
    "counts of numpy": per_state(lambda state: {**state, "step": np.int64(state["step"].item())}),
    "keys as strings": lambda saved: {**saved, "state": {str(i): state for i, state in saved["state"].items()}},
    "all of it as JSON": lambda saved: json.loads(json.dumps(without_tensors(saved))),
    "names of parameters as keys": lambda saved: {
        "state": {f"p{i}": state for i, state in saved["state"].items()},
        "param_groups": [{**g, "params": [f"p{i}" for i in g["params"]]} for g in saved["param_groups"]],
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@every_optimizer
def test_a_run_goes_on_from_its_checkpoint_in_the_form_that_another_tool_gave_it(make, form):
    model, optimizer = trained(make)
    other_model = copy.deepcopy(model)
    other = make(other_model)
    other.load_state_dict(form(copy.deepcopy(optimizer.state_dict())))
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
    train(model, optimizer, 2, seed=2)
    train(other_model, other, 2, seed=2)
    assert_same(model, other_model)


def test_goes_on_from_torch_with_betas_that_are_tensors():
    model = Net()
    theirs = torch.optim.AdamW(model.parameters(), betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False)
    train(model, theirs, 1)
    ours = AdamW(model.parameters(), convention="torch")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    "pair", [np.array([0.9, 0.999], np.float32), torch.tensor([0.9, 0.999])], ids=["numpy", "torch"]
)
def test_goes_on_from_betas_that_are_one_array(pair):
    model = Net()
    ours = AdamW(model.parameters(), betas=(0.5, 0.5))
    saved = ours.state_dict()
    saved["param_groups"][0]["betas"] = pair
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["betas"] == (0.9, 0.999)


@every_optimizer
@pytest.mark.parametrize("when", ["constructor", "later"])
def test_numbers_of_numpy_are_saved_as_pythons(make, when):
    model = Net()
    optimizer = (
        make(model, weight_decay_rate=np.float64(0.5))
        if make is MAKE["AdamWeightDecay"]
        else make(model, weight_decay=np.float64(0.5))
    )
    if when == "later":
        optimizer.param_groups[0].update(lr=np.float32(0.25), weight_decay=np.float64(0.5), extra={"k": (np.int64(1),)})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(model, optimizer, 1)
    saved = (
        through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
        if (when == "constructor")
        else {"optimizer": through_a_file(optimizer.state_dict())}
    )
    (group,) = saved["optimizer"]["param_groups"]
    assert type(group["weight_decay"]) is float and group["weight_decay"] == 0.5
    assert type(group["lr"]) is float and group["lr"] == (0.01 if when == "constructor" else 0.25)


# Loads that fail.


def moment(change):
    return lambda saved, state, name: state.update({name: change(state[name])})


def step(value):
    return lambda saved, state, name: state.update(step=value)


def group(**options):
    return lambda saved, state, name: saved["param_groups"][0].update(options)


DAMAGE = {
    "meta": moment(lambda t: t.to("meta")),
    "sparse": moment(lambda t: t.to_sparse()),
    "mkldnn": moment(lambda t: t.to_mkldnn()),
    "complex": moment(lambda t: t + 0j),
    "float8": moment(lambda t: t.to(torch.float8_e4m3fn)),
    "another shape": moment(lambda t: t[..., :1].repeat(2, *[1] * (t.dim() - 1))),
    "no tensor": moment(lambda t: None),
    "ragged lists": moment(lambda t: [[1.0], [1.0, 2.0]]),
    **{
        f"step {value}": step(value)
        for value in (10**400, 1e39, 2**200, math.inf, math.nan, -1, 1.5, "3", None, True, np.float64(0.5), 1j)
    },
    "step tensor(inf)": step(torch.tensor(math.inf)),
    "step sparse": step(torch.ones(1).to_sparse()),
    "step meta": step(torch.ones((), device="meta")),
    "two steps": step(torch.ones(2)),
    "a missing moment": lambda saved, state, name: state.pop(name),
    "too few names": group(param_names=["a"]),
    "numbers for names": group(param_names=[1, 2, 3, 4, 5]),
    "an option out of range": group(weight_decay=-1.0),
    "a group without parameters": lambda saved, state, name: saved["param_groups"][0].pop("params"),
    "a group that is a list": lambda saved, state, name: saved.update(param_groups=[[]]),
    "a state that is a list": lambda saved, state, name: saved["state"].update({4: [1]}),
}


def everything(optimizer):
    """Also which tensors and which groups there are."""
    groups = [(id(group), dict(group)) for group in optimizer.param_groups]
    states = {p: {name: (id(t), t.clone()) for name, t in state.items()} for p, state in optimizer.state.items()}
    return groups, states, dict(optimizer.defaults)


def unchanged(before, optimizer):
    after = everything(optimizer)
    return (
        before[0] == after[0]
        and before[2] == after[2]
        and all(same(list(before[1][p].values()), list(after[1][p].values())) for p in before[1])
    )


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("damage", DAMAGE)
@every_optimizer
def test_a_checkpoint_that_is_refused_changes_nothing(make, damage, place):
    model, optimizer = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][place]
    DAMAGE[damage](saved, state, next(name for name in state if name.startswith("exp_avg")))
    optimizer.param_groups[0]["lr"] = 0.125
    before = everything(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert unchanged(before, optimizer)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    train(model, optimizer, 1)


@every_optimizer
def test_memory_that_runs_out_at_any_tensor_of_a_load_changes_nothing(make, monkeypatch):
    model, optimizer = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] += 1.0
    tensors = sum(len(state) - 1 for state in saved["state"].values())
    before = everything(optimizer)
    real = torch.empty_like
    for place in range(tensors):
        made = iter(range(tensors))

        def fails(*args, made=made, place=place, **kwargs):
            if next(made) == place:
                raise MemoryError
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", fails)
            with pytest.raises(MemoryError):
                optimizer.load_state_dict(saved)
        assert unchanged(before, optimizer)
    train(model, optimizer, 1)


SWITCHES = {
    "AdamW": ("amsgrad", True, False),
    "AdamWeightDecay": ("amsgrad", True, False),
    "Adafactor": ("beta1", 0.9, None),
}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", SWITCHES)
def test_an_option_whose_state_cannot_be_made_waits_until_it_can(name, backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    option, on, _ = SWITCHES[name]
    model, optimizer = trained(MAKE[name], backend=backend)
    optimizer.param_groups[0][option] = on
    names = [list(state) for state in optimizer.state.values()]
    real, made = torch.zeros_like, iter(range(100))

    def fails(*args, **kwargs):
        if next(made) == 5:
            raise MemoryError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", fails)
        with pytest.raises(MemoryError):
            train(model, optimizer, 1)
    assert [list(state) for state in optimizer.state.values()] == names
    train(model, optimizer, 1)
    assert all(len(state) == len(before) + 1 for state, before in zip(optimizer.state.values(), names))


@pytest.mark.parametrize("begins_on", [True, False], ids=["switched off", "switched on"])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", SWITCHES)
def test_an_optimizer_loads_its_own_checkpoint_after_an_option_was_switched(name, steps, begins_on):
    option, on, off = SWITCHES[name]
    model, optimizer = trained(MAKE[name], **({option: on} if begins_on else {}))
    optimizer.param_groups[0][option] = off if begins_on else on
    train(model, optimizer, steps)
    saved = through_a_file(optimizer.state_dict())
    other_model = copy.deepcopy(model)
    other = MAKE[name](other_model)
    other.load_state_dict(saved)
    assert_same(other.state_dict(), saved)
    train(model, optimizer, 2, seed=2)
    train(other_model, other, 2, seed=2)
    assert_same(model, other_model)


OTHERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    "SGD without state": lambda ps: torch.optim.SGD(ps, 0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.1, momentum=0.5),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "torch.optim.Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("ours", [AdamW, Adafactor], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizers_checkpoint_is_refused_with_its_name(name, ours):
    model = Net()
    theirs = OTHERS[name](model.parameters())
    train(model, theirs, 2)
    with pytest.raises(ValueError, match=f"a checkpoint of {name.split()[0]}.*{ours.__name__} cannot go on"):
        ours(model.parameters()).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("steps", [0, 2])
def test_adamw_and_adafactor_name_each_other(steps):
    model = Net()
    adam, adafactor = AdamW(model.parameters()), Adafactor(model.parameters())
    train(model, adam, steps), train(model, adafactor, steps)
    with pytest.raises(ValueError, match="a checkpoint of Adam or AdamW"):
        adafactor.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="a checkpoint of Adafactor"):
        adam.load_state_dict(adafactor.state_dict())


def test_lions_checkpoint_is_refused_with_its_name():
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2))])
    group = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "params": [0]}
    with pytest.raises(ValueError, match="a checkpoint of Lion"):
        optimizer.load_state_dict({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [group]})


@pytest.mark.parametrize("count", [-1, 1.5, "3", None, math.inf])
def test_a_count_of_calls_that_is_none_is_refused(count):
    optimizer = AdamWeightDecay(Net().named_parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["iterations"] = count
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        optimizer.load_state_dict(saved)


# What a load shares with others.


@every_optimizer
def test_a_run_does_not_write_into_the_checkpoint_it_came_from(make):
    model, optimizer = trained(make)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    train(model, optimizer, 1)
    assert_same(saved, kept)


def test_a_checkpoint_loaded_in_inference_mode_goes_on_outside_of_it():
    model, optimizer = trained(MAKE["AdamW"])
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)


def test_parameters_that_are_not_in_the_checkpoint_start_anew_and_what_is_nobodys_is_kept():
    model, optimizer = trained(MAKE["AdamW"])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]
    saved["state"]["note"] = {"from": "elsewhere"}
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    counts = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert counts == [1.0, 3.0, 3.0, 3.0, 3.0]
    assert optimizer.state_dict()["state"]["note"] == {"from": "elsewhere"}


def test_a_checkpoint_from_before_the_first_step_brings_options_and_forgets_states():
    _, optimizer = trained(MAKE["AdamW"])
    optimizer.load_state_dict(AdamW(Net().parameters(), lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state


def test_the_states_of_a_group_that_was_taken_out_are_not_saved():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdamW([{"params": [p]}, {"params": [q]}])
    optimizer.apply_gradients([(torch.ones(2), p), (torch.ones(2), q)])
    del optimizer.param_groups[0]
    saved = optimizer.state_dict()
    assert saved["state"].keys() == {0} and saved["param_groups"][0]["params"] == [0]
    AdamW([q]).load_state_dict(saved)


# Hooks.


@every_optimizer
def test_hooks_on_saving_hand_out_whatever_they_like(make):
    _, optimizer = trained(make)
    own = optimizer.state_dict()
    handles = [optimizer.register_state_dict_post_hook(lambda o, saved: {"format": 2, "optimizer": saved})]
    assert optimizer.state_dict().keys() == {"format", "optimizer"}
    assert_same(optimizer.state_dict()["optimizer"], own)
    handles.append(optimizer.register_state_dict_post_hook(lambda o, saved: {"groups": saved["optimizer"]}))
    assert_same(optimizer.state_dict(), {"groups": own})
    for handle in handles:
        handle.remove()

    def plain_counts(o, saved):
        for state in saved["state"].values():
            state["step"] = int(state["step"])

    optimizer.register_state_dict_post_hook(plain_counts)
    saved = optimizer.state_dict()
    assert {type(state["step"]) for state in saved["state"].values()} == {int}
    assert {type(state["step"]) for state in optimizer.state.values()} == {torch.Tensor}
    optimizer.load_state_dict(saved)


def test_hooks_on_loading_may_change_the_checkpoint_and_see_what_was_loaded():
    _, optimizer = trained(MAKE["AdamW"])
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: saved["optimizer"])
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict({"optimizer": optimizer.state_dict()})
    assert seen == [5]


def test_lists_of_a_shape_that_ends_in_ones_load():
    """JSON makes one list more of every element of a 1x1 convolution."""
    model = torch.nn.Conv2d(32, 32, 1, bias=False)
    optimizer = AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    saved = json.loads(json.dumps(optimizer.state_dict(), default=lambda t: t.tolist()))
    other = AdamW(torch.nn.Conv2d(32, 32, 1, bias=False).parameters())
    other.load_state_dict(saved)
    assert_same(other.state_dict(), optimizer.state_dict())
