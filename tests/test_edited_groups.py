"""Param groups that are edited between two steps: it takes effect, or an error says what is wrong.

A step that raises has changed nothing: no weight, no state, no count, no group.
"""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from helpers.between_steps import MAKE, refuses, step, weight
from helpers.comparing import assert_same
from helpers.loops import Net, train
from helpers.optimizers import BACKENDS, OPTIMIZERS, every_optimizer

from fusedopt import AdamW, AdamWeightDecay, register_step_in_backward

# Options that are written into a group.

BAD = [
    ("AdamW", "lr", None),
    ("AdamW", "lr", math.nan),
    ("AdamW", "lr", -1.0),
    ("AdamW", "lr", torch.ones(2)),
    ("AdamW", "lr", torch.tensor(math.nan)),
    ("AdamW", "lr", torch.tensor(1)),
    ("AdamW", "lr", torch.tensor(0.1, device="meta")),
    ("AdamW", "lr", 10**400),
    ("AdamW", "eps", None),
    ("AdamW", "eps", -1.0),
    ("AdamW", "weight_decay", None),
    ("AdamW", "weight_decay", math.nan),
    ("AdamW", "weight_decay", torch.tensor([0.1, 0.1])),
    ("AdamW", "betas", (0.9, 1.0)),
    ("AdamW", "betas", None),
    ("AdamW", "betas", (0.9,)),
    ("AdamW", "amsgrad", None),
    ("AdamW", "correct_bias", 0),
    ("AdamWeightDecay", "weight_decay", None),
    ("AdamWeightDecay", "lr", torch.ones(2)),
    ("Adafactor", "lr", None),
    ("Adafactor", "lr", torch.ones(2)),
    ("Adafactor", "eps", (1e-30, None)),
    ("Adafactor", "clip_threshold", None),
    ("Adafactor", "decay_rate", None),
    ("Adafactor", "beta1", 1.0),
    ("Adafactor", "weight_decay", None),
    ("Adafactor", "weight_decay", Fraction(1, 3)),
    ("Adafactor", "clip_threshold", Fraction(1, 3)),
    ("Adafactor", "lr", Fraction(1, 3)),
    ("Adafactor", "relative_step", None),
    ("Adafactor", "warmup_init", True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "option", "value"), BAD, ids=str)
def test_an_option_that_is_written_into_a_group_is_looked_at(name, option, value, backend):
    params = [weight(3), weight(2)]
    optimizer = OPTIMIZERS[name].at(0.1, [{"params": [p]} for p in params], backend=backend)
    optimizer.init_state()
    good, optimizer.param_groups[1][option] = optimizer.param_groups[1][option], value
    weights = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=option):
        step(optimizer)
    assert_same([p.detach() for p in params], weights)
    assert all(state["step"] == 0.0 for state in optimizer.state.values())
    optimizer.param_groups[1][option] = good
    step(optimizer)
    assert all(state["step"] == 1.0 for state in optimizer.state.values())


def test_an_option_that_is_edited_in_place_is_looked_at():
    p = weight(3)
    optimizer = AdamW([p], betas=[0.9, 0.999])
    step(optimizer)
    optimizer.param_groups[0]["betas"][1] = 1.0
    refuses(optimizer, p, error=ValueError, match=r"betas\[1\] must be in \[0, 1\), got 1.0")


def test_a_rate_that_rounding_brought_below_zero_is_taken():
    """As formulas leave it whose last rate is 0."""
    p = weight(3)
    optimizer = AdamW([p], lr=0.1)
    for rate in (-1e-19, torch.tensor(-1e-19)):
        optimizer.param_groups[0]["lr"] = rate
        step(optimizer)
    assert_same(p.detach(), torch.ones(3))


def test_a_step_in_backward_looks_at_options_too():
    model = torch.nn.Linear(3, 4, bias=False)
    optimizer = AdamW(model.parameters())
    register_step_in_backward(optimizer, model)
    optimizer.param_groups[0]["eps"] = None
    with pytest.raises(ValueError, match="eps must be a number, got None"):
        model(torch.ones(1, 3)).sum().backward()
    assert not optimizer.state


# Groups that are edited.


@every_optimizer
def test_the_same_parameter_twice_is_refused(name):
    cls = OPTIMIZERS[name].cls
    p = weight(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch only warns
        with pytest.raises(ValueError, match=r"a parameter of shape \(2,\) comes twice"):
            cls([p, p])
        optimizer = cls([p])
        with pytest.raises(ValueError, match="comes twice"):
            optimizer.add_param_group({"params": [q := weight(3), q]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [0, 1], ids=["its own group", "another group"])
@pytest.mark.parametrize("name", MAKE)
def test_a_parameter_that_is_put_into_a_group_a_second_time_is_refused(name, group, backend):
    p, q = weight(2), weight(3)
    optimizer = MAKE[name]([{"params": [p]}, {"params": [q]}], backend=backend)
    step(optimizer)
    optimizer.param_groups[group]["params"].append(p)
    with pytest.raises(ValueError, match=r"a parameter of shape \(2,\) comes twice"):
        step(optimizer)
    optimizer.param_groups[group]["params"].pop()
    step(optimizer)
    assert optimizer.state[p]["step"] == optimizer.state[q]["step"] == 2.0


def swapped(optimizer, model):
    optimizer.param_groups.reverse()


def emptied(optimizer, model):
    optimizer.param_groups[0]["params"].clear()


def deleted(optimizer, model):
    del optimizer.param_groups[0]


def moved(optimizer, model):
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())


def copied(optimizer, model):
    optimizer.param_groups[:] = [dict(group, lr=2 * group["lr"]) for group in optimizer.param_groups]


def grown(optimizer, model):
    optimizer.param_groups[0]["params"].clear()
    optimizer.add_param_group({"params": [model.last.weight], "lr": 0.5})


@every_optimizer
@pytest.mark.parametrize("edit", [swapped, emptied, deleted, moved, copied, grown])
def test_a_step_in_backward_takes_the_rate_of_the_group_that_a_parameter_is_in(edit, name):
    models = Net(), Net()
    for model, in_backward in zip(models, (False, True)):
        last = [model.last.weight]
        others = [p for p in model.parameters() if p is not model.last.weight]
        groups = [{"params": last, "lr": 1e-3}, {"params": others, "lr": 0.1}]
        optimizer = OPTIMIZERS[name].at(0.1, groups)
        if in_backward:
            register_step_in_backward(optimizer, model)
        train(model, optimizer, 2)
        edit(optimizer, model)
        train(model, optimizer, 3, seed=2)
    assert_same(list(models[0].parameters()), list(models[1].parameters()))


def test_a_parameter_that_no_group_has_any_more_keeps_its_gradient():
    model = Net()
    optimizer = AdamW(model.parameters())
    register_step_in_backward(optimizer, model)
    assert optimizer.param_groups[0]["params"].pop() is model.last.weight
    before = model.last.weight.detach().clone()
    for _ in range(2):
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
    assert model.last.weight.grad is not None
    assert_same(model.last.weight.detach(), before)
    assert model.first.weight.grad is None and optimizer.state[model.first.weight]["step"] == 2.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_count_that_begins_late_is_not_that_of_a_parameter_that_has_left(backend):
    gone, here, new = weight(3), weight(3), weight(3)
    optimizer = AdamW([gone, here], convention="keras", backend=backend)
    step(optimizer)
    assert optimizer.param_groups[0]["params"].pop(0) is gone
    step(optimizer)
    optimizer.add_param_group({"params": [new]})
    step(optimizer)
    assert [float(optimizer.state[p]["step"]) for p in (gone, here, new)] == [1.0, 3.0, 3.0]


def test_names_go_with_their_parameters_when_groups_are_swapped():
    def decayed(swap):
        params = {"kernel": weight(2), "bias": weight(2), "scale": weight(2)}
        named = list(params.items())
        optimizer = AdamWeightDecay(
            [{"params": named[:1]}, {"params": named[1:]}],
            0.1,
            weight_decay_rate=0.5,
            exclude_from_weight_decay=["bias"],
        )
        optimizer.apply_gradients([(torch.zeros(2), p) for p in params.values()])
        if swap:
            optimizer.param_groups.reverse()
        optimizer.apply_gradients([(torch.zeros(2), p) for p in params.values()])
        return [p.detach() for p in params.values()]

    assert_same(decayed(True), decayed(False))
