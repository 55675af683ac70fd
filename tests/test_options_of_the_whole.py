"""What goes for a whole optimizer, its defaults and its groups: rebuilt, wrapped, and rates that are tensors."""

import copy
import pickle
import re

import pytest
import torch
from helpers.comparing import assert_same
from helpers.optimizers import OPTIMIZERS

from fusedopt import Adafactor, AdamW, AdamWeightDecay, PolynomialDecay, WarmUp


def weights():
    return [("weight", torch.nn.Parameter(torch.full((3, 2), 2.0))), ("bias", torch.nn.Parameter(torch.ones(3)))]


def updated(optimizer):
    (group,) = optimizer.param_groups
    for _ in range(3):
        optimizer.apply_gradients([(torch.full_like(p, 5.0), p) for p in group["params"]])
    return [p.detach() for p in group["params"]]


MAKE = {
    **OPTIMIZERS,
    "AdamW in all options": lambda ps: AdamW(
        ps, 0.1, (0.8, 0.9), 0.5, 0.3, amsgrad=True, maximize=True, convention="torch", backend="eager",
        max_grad_norm=0.1, skip_nonfinite=True
    ),
    "AdamW without correction": lambda ps: AdamW(ps, 0.1, correct_bias=False),
    "Adafactor in all options": lambda ps: Adafactor(
        ps, 0.1, (1e-20, 1e-2), 0.5, -0.7, 0.9, 0.1, False, False, maximize=True, backend="eager", max_grad_norm=0.1
    ),
    "Keras, epsilon 0": lambda ps: AdamWeightDecay.from_config({"epsilon": 0.0}, ps),
    "Keras in all options": lambda ps: AdamWeightDecay(
        ps, 0.1, 0.8, 0.9, 0.5, True, 0.3, ["weight"], ["bias"], "own name", backend="eager", clipnorm=0.5,
        clipvalue=0.4, decay=0.1, skip_nonfinite=True
    ),
    "Keras with a function": lambda ps: AdamWeightDecay(
        ps, WarmUp(0.1, PolynomialDecay(0.1, 8), warmup_steps=2), max_grad_norm=0.1
    ),
}  # fmt: skip

AFTER = {
    "nothing": lambda o: o,
    "load_state_dict": lambda o: (o.load_state_dict(o.state_dict()), o)[1],
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_defaults_of_an_optimizer_make_the_same_one_again(make, after):
    old = AFTER[after](make(weights()))
    new = type(old)(weights(), **old.defaults)
    assert new.defaults == old.defaults
    assert new.whole_options() == old.whole_options()
    assert_same(updated(new), updated(make(weights())))


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_groups_have_the_options_of_groups_and_no_others(make, after):
    optimizer = make(weights())
    before = set(optimizer.param_groups[0])
    assert not before & optimizer.whole_options().keys()
    optimizer = AFTER[after](optimizer)
    optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(2)))]})
    assert [set(group) for group in optimizer.param_groups] == [before] * 2


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_group_may_repeat_what_goes_for_the_whole_optimizer(make):
    """As wrappers do that have groups of their own."""
    optimizer = make(weights())
    (group,) = optimizer.param_groups
    wrapped = (
        type(optimizer)([{**optimizer.defaults, **group, "params": weights()}], **optimizer.defaults)
        if (optimizer.whole_options().get("learning_rate") is None)
        else type(optimizer)([{**optimizer.whole_options(), "params": weights()}], **optimizer.defaults)
    )
    assert set(wrapped.param_groups[0]) == set(group)
    assert_same(updated(wrapped), updated(optimizer))


def test_a_group_that_contradicts_the_whole_optimizer_is_refused_with_both_values():
    p = torch.nn.Parameter(torch.ones(2))
    message = "convention='keras', which goes for the whole optimizer, and this AdamW has convention='torch'"
    with pytest.raises(TypeError, match=re.escape(message)):
        AdamW([{"params": [p], "convention": "keras"}], convention="torch")
    optimizer = AdamW([p])
    with pytest.raises(TypeError, match=r"max_grad_norm=1\.0.*has max_grad_norm=None"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "max_grad_norm": 1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_list_is_no_group(make):
    optimizer = make(weights())
    with pytest.raises(TypeError, match="must be a dict with the key 'params', got list"):
        optimizer.add_param_group([torch.nn.Parameter(torch.ones(2))])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("given", ["group by group", "a checkpoint of another tool"])
def test_an_option_of_the_whole_optimizer_in_a_checkpoint_stays_the_constructors(given):
    optimizer = AdamW(weights(), convention="torch")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(convention="keras", backend="triton")
    optimizer.load_state_dict(saved)
    assert optimizer.convention == "torch" and "convention" not in optimizer.param_groups[0]


# Rates that are tensors.


def two_groups():
    return [{"params": [torch.nn.Parameter(torch.zeros(3))]} for _ in range(2)]


RATES = {
    "AdamW": lambda lr: AdamW(two_groups(), lr=lr),
    "Adafactor": lambda lr: Adafactor(two_groups(), lr=lr, relative_step=False),
    "AdamWeightDecay": lambda lr: AdamWeightDecay(two_groups(), lr),
    "a view of it": lambda lr: AdamW(
        [{**group, "lr": lr.view(shape)} for group, shape in zip(two_groups(), [(), (1,)])]
    ),
}


@pytest.mark.parametrize("make", RATES.values(), ids=RATES)
def test_groups_that_were_given_one_tensor_have_rates_of_their_own(make):
    lr = torch.tensor(1.0)
    optimizer = make(lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 0.1**e])
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.1])
    lr.fill_(0.25)  # whoever made the tensor still moves the first group
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.25, 0.1])


def test_a_tensor_for_each_group_stays_what_it_is():
    rates = torch.tensor([0.1, 0.2])
    views = list(rates.unbind())
    optimizer = AdamW([{**group, "lr": lr} for group, lr in zip(two_groups(), views)])
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, views))


@pytest.mark.parametrize("after", ["load_state_dict", "deepcopy", "pickle"])
def test_rates_stay_apart_after(after):
    optimizer = AdamW(two_groups(), lr=torch.tensor(1.0))
    shared = torch.tensor(0.5)
    for group in optimizer.param_groups:
        group["lr"] = shared  # by hand, or by a checkpoint of torch's
    optimizer = AFTER[after](optimizer)
    optimizer.param_groups[0]["lr"].fill_(0.125)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.5]
