"""What is done to parameters, states and groups between two steps: it takes effect, or an error says what is wrong.

A step that raises has changed nothing: no weight, no state, no count, no group.
"""

import copy
import math
import warnings
from fractions import Fraction
from functools import partial

import pytest
import torch
from helpers.comparing import assert_same
from helpers.loops import Net, sharded, train
from helpers.optimizers import BACKENDS, OPTIMIZERS, VARIANTS, every_optimizer

from fusedopt import Adafactor, AdamW, AdamWeightDecay, register_step_in_backward

GUARD = {"max_grad_norm": 0.1, "skip_nonfinite": True}
MAKE = {
    **OPTIMIZERS,
    "AdamW-guarded": partial(OPTIMIZERS["AdamW"], **GUARD),
    **{name: VARIANTS[name] for name in ("AdamWeightDecay-clipnorm", "Adafactor-lr-beta1")},
}


def weight(*shape, value=1.0):
    return torch.nn.Parameter(torch.full(shape, value))


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def everything(optimizer, *params):
    """All that a step could change."""
    counted = getattr(optimizer, "skipped_steps", None), getattr(optimizer, "grad_norm", None)
    return copy.deepcopy([optimizer.state_dict(), [p.detach() for p in params], counted])


def refuses(optimizer, *params, error=RuntimeError, match):
    before = everything(optimizer, *params)
    with pytest.raises(error, match=match):
        step(optimizer)
    assert_same(everything(optimizer, *params), before)


# Parameters of another size.

SIZES = {"larger": (40, 16), "far larger": (4000, 16), "smaller": (24, 16), "turned": (16, 32), "flat": (512,)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MAKE)
def test_a_parameter_that_was_given_another_size_is_refused_with_both_shapes(name, size, backend):
    p, q = weight(32, 16), weight(3)
    optimizer = MAKE[name]([q, p], backend=backend)
    step(optimizer)
    old = p.data
    p.data = torch.ones(SIZES[size])
    shapes = rf"shape \({str(SIZES[size])[1:-1]}\) now, .* made for one of \(32, 16\).*delete optimizer.state"
    refuses(optimizer, p, q, match=shapes)
    p.data = old
    step(optimizer)
    assert optimizer.state[p]["step"] == optimizer.state[q]["step"] == 2.0


@pytest.mark.parametrize("name", MAKE)
def test_after_its_state_is_deleted_a_parameter_of_another_size_goes_on(name):
    p = weight(32, 16)
    optimizer = MAKE[name]([p])
    step(optimizer)
    p.data = torch.ones(40, 16)
    del optimizer.state[p]
    step(optimizer)
    assert optimizer.state[p]["step"] == 1.0 and (p != 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_parameter_may_have_another_size_than_its_state(backend):
    """It is left alone; it is refused when it gets a gradient."""
    p, q = weight(4, 3), weight(3)
    optimizer = AdamW([p, q], backend=backend)
    step(optimizer)
    p.data, p.grad = torch.ones(5, 3), None
    for _ in range(2):
        q.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.state[q]["step"] == 3.0 and optimizer.state[p]["step"] == 1.0
    refuses(optimizer, p, q, match=r"made for one of \(4, 3\)")


@every_optimizer
def test_a_step_in_backward_refuses_a_parameter_of_another_size(name):
    model = torch.nn.Linear(3, 4, bias=False)
    optimizer = MAKE[name](model.parameters())
    register_step_in_backward(optimizer, model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.weight.data = torch.ones(5, 3)
    before = everything(optimizer, model.weight)
    with pytest.raises(RuntimeError, match=r"shape \(5, 3\) now, and its state was made for one of \(4, 3\)"):
        model(torch.ones(1, 3)).sum().backward()
    assert_same(everything(optimizer, model.weight), before)


def counts_and_weights(saved, p):
    return [state["step"] for state in saved["state"].values()], p.full_tensor()


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_a_sharded_parameter_whose_state_is_of_another_size_is_refused(name):
    with sharded(Net()) as model:
        optimizer = MAKE[name](model.parameters())
        train(model, optimizer, 1)
        first, last = model.first.weight, model.last.weight
        optimizer.state[first] = optimizer.state[last]
        before = copy.deepcopy([optimizer.state_dict(), first.detach()])
        with pytest.raises(RuntimeError, match=r"shape \(8, 5\) now, and its state was made for one of \(3, 8\)"):
            train(model, optimizer, 1)
        assert_same(*(counts_and_weights(*pair) for pair in ([optimizer.state_dict(), first.detach()], before)))


# States that were edited.


def broken(name, tensor):
    return lambda state: state.update({name: tensor})


EDITS = {
    "another shape": (broken("exp_avg_sq", torch.zeros(4)), r"made for one of \(4,\)"),
    "a moment is missing": (lambda state: state.pop("exp_avg"), "the state exp_avg .* is missing, expected one"),
    "a moment of another shape": (broken("exp_avg", torch.zeros(2)), r"the state exp_avg .* is of shape \(2,\)"),
    "a moment of integers": (broken("exp_avg", torch.zeros(3, dtype=torch.int64)), "torch.int64"),
    "a moment without data": (broken("exp_avg", torch.zeros(3, device="meta")), "on meta, expected one on cpu"),
    "a number": (broken("exp_avg", 0.0), "the state exp_avg .* is 0.0, expected one of shape"),
    "no count": (lambda state: state.pop("step"), "the state step .* is missing: it must be a 0-d float32"),
    "a count that is an int": (broken("step", 3), "the state step .* is 3: it must be a 0-d float32"),
    "a count of integers": (broken("step", torch.tensor(3)), "the state step .* torch.int64"),
    "a count without data": (broken("step", torch.tensor(3.0, device="meta")), "the state step .* on meta"),
    "a count of one dimension": (broken("step", torch.ones(1)), r"the state step .* shape \(1,\)"),
    "a count below 0": (broken("step", torch.tensor(-1.0)), r"the state step .* is -1.0: a count must be >= 0"),
    "a count that is no number": (broken("step", torch.tensor(math.nan)), "the state step .* is nan"),
    "None where a tensor was freed": (broken("exp_avg", None), "the state exp_avg .* is missing"),
    "an expanded moment": (broken("exp_avg", torch.zeros(1).expand(3)), "in one place of memory; its strides are"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_state_that_was_broken_by_hand_is_refused(edit, backend):
    p, q = weight(3), weight(2)
    optimizer = AdamW([q, p], backend=backend, max_grad_norm=1.0)
    step(optimizer)
    change, match = EDITS[edit]
    change(optimizer.state[p])
    with pytest.raises(RuntimeError, match=match):
        step(optimizer)
    assert optimizer.state[q]["step"] == 1.0
    optimizer.state[p].clear()
    step(optimizer)
    assert optimizer.state[p]["step"] == 1.0 and optimizer.state[q]["step"] == 2.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lost", ["exp_avg_sq_row", "exp_avg_sq_col", "RMS"])
def test_a_state_of_adafactor_that_lost_a_part_is_refused(lost, backend):
    p = weight(3, 2)
    optimizer = Adafactor([p], backend=backend)
    step(optimizer)
    del optimizer.state[p][lost]
    refuses(optimizer, p, match=f"the state {lost} .* is missing")


def test_a_state_whose_memory_was_exchanged_is_looked_at_again():
    p = weight(64)
    optimizer = AdamW([p])
    step(optimizer)
    optimizer.state[p]["exp_avg"].data = torch.zeros(8)
    refuses(optimizer, p, match=r"the state exp_avg .* is of shape \(8,\)")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_a_parameter_that_was_expanded_between_steps_is_refused(name, backend):
    p, q = weight(3), weight(2)
    optimizer = MAKE[name]([q, p], backend=backend)
    for _ in range(2):
        step(optimizer)
        own, p.data = p.data, torch.zeros(1).expand(3)
        refuses(optimizer, p, q, match=r"with strides \(0,\) has several elements in one place of memory")
        p.data = own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_a_state_that_came_back_in_inference_mode_goes_on_outside_of_it(name, backend):
    p, q = weight(3), weight(3)
    away, stayed = (MAKE[name]([t], backend=backend) for t in (p, q))
    for _ in range(2):
        step(away), step(stayed)
        with torch.inference_mode():
            away.state[p] = {key: t.cpu().clone() for key, t in away.state[p].items()}
            step(away)
        step(stayed)
    step(away), step(stayed)
    assert_same([p, away.state[p]], [q, stayed.state[q]])


def test_users_may_keep_things_of_their_own_beside_a_state():
    p = weight(3)
    optimizer = AdamW([p])
    for number in range(3):
        step(optimizer)
        optimizer.state[p].update(seen=number, ema=torch.zeros(7))
    assert optimizer.state[p]["step"] == 3.0


def test_a_deleted_state_is_not_kept_alive():
    p = weight(1000)
    optimizer = AdamW([p])
    step(optimizer)
    moments = torch.multiprocessing.reductions.StorageWeakRef(optimizer.state[p]["exp_avg"].untyped_storage())
    del optimizer.state[p]
    assert moments.expired()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_changes_its_dtype_goes_on_with_its_state(name, dtype):
    model = Net()
    optimizer = MAKE[name](model.named_parameters())
    train(model, optimizer, 2)
    model.to(dtype)
    train(model, optimizer, 2)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


# Counts.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_whoever_holds_a_step_count_sees_it_go_on(name, backend):
    params = [weight(3, 2), weight(2), weight(4)]
    optimizer = MAKE[name](params, backend=backend)
    optimizer.init_state()
    held = [optimizer.state[p]["step"] for p in params]
    for number in range(1, 4):
        step(optimizer)
        assert [count.item() for count in held] == [number] * 3
    assert all(optimizer.state[p]["step"] is count for p, count in zip(params, held))


def of_their_own(steps):
    return [step.clone() for step in steps]


def in_two_storages(steps):
    half = len(steps) // 2
    return [*torch.stack(steps[:half]).unbind(), *torch.stack(steps[half:]).unbind()]


def scattered(steps):
    spread = torch.zeros(3 * len(steps))
    views = [spread[3 * i + 1] for i in reversed(range(len(steps)))]
    for view, step in zip(views, steps):
        view.copy_(step)
    return views


def some_of_their_own(steps):
    return [step.clone() if i % 3 else step for i, step in enumerate(steps)]


@pytest.mark.parametrize("place", [list, of_their_own, in_two_storages, scattered, some_of_their_own])
def test_counts_are_advanced_wherever_they_lie(place):
    """Those of parameters that have a gradient, and no others."""
    params = [weight(2, value=float(i)) for i in range(12)]
    optimizer = AdamW(params)
    optimizer.init_state()
    for number, (p, count) in enumerate(zip(params, place([optimizer.state[p]["step"] for p in params]))):
        count.fill_(number)
        optimizer.state[p]["step"] = count
    held = [optimizer.state[p]["step"] for p in params]
    expected = [float(number) for number in range(12)]
    for which in (range(12), range(0, 12, 2), [7], range(3, 9)):
        optimizer.zero_grad()
        for i in which:
            params[i].grad = torch.ones(2)
            expected[i] += 1
        optimizer.step()
        assert [count.item() for count in held] == expected


def test_parameters_with_counts_of_their_own_are_updated_as_if_alone():
    """Many different counts in one optimizer, each of which has a bias correction of its own."""
    counts = [0, 3, 3, 10, 0, 1000, 3]

    def updated(params, counts):
        optimizer = AdamW(params, lr=0.1, weight_decay=0.1)
        optimizer.init_state()
        for p, count in zip(params, counts):
            optimizer.state[p]["step"].fill_(count)
            optimizer.state[p]["exp_avg_sq"].fill_(0.5)
        step(optimizer)
        return [p.detach() for p in params]

    values = [float(i + 1) for i in range(len(counts))]
    together = updated([weight(5, value=v) for v in values], counts)
    alone = [updated([weight(5, value=v)], [count])[0] for v, count in zip(values, counts)]
    assert_same(together, alone)


def test_the_work_for_different_counts_does_not_grow_with_their_square(monkeypatch):
    from fusedopt.backends.eager.adamw import EagerAdamW

    looked_at = []
    update = EagerAdamW.update
    monkeypatch.setattr(EagerAdamW, "update", lambda self, part: looked_at.extend(part.params) or update(self, part))
    params = [weight(1) for _ in range(50)]
    optimizer = AdamW(params)
    optimizer.init_state()
    for number, p in enumerate(params):
        optimizer.state[p]["step"].fill_(number)
    step(optimizer)
    assert list(map(id, looked_at)) == list(map(id, params))


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_adafactor_put_there_in_another_dtype_are_brought_to_that_of_the_update(backend, device):
    """bfloat16 by hand, to save memory, or float64 after `model.float()`."""
    device = device if backend == "triton" else torch.device("cpu")
    params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in [(4, 6), (5,)]]
    optimizer = Adafactor(params, lr=0.1, beta1=0.9, relative_step=False, backend=backend)
    step(optimizer)
    for state, dtype in zip(optimizer.state.values(), (torch.float64, torch.bfloat16)):
        state.update({name: value.to(dtype) for name, value in state.items() if name != "step"})
    step(optimizer)
    dtypes = {value.dtype for state in optimizer.state.values() for value in state.values()}
    assert dtypes == {torch.float32}
