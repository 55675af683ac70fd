"""Parameters and states that something is done to between two steps: it takes effect, or an error says what is wrong.

A step that raises has changed nothing: no weight, no state, no count, no group.
"""

import copy
import math

import pytest
import torch
from helpers.between_steps import MAKE, everything, refuses, step, weight
from helpers.comparing import assert_same
from helpers.loops import Net, sharded, train
from helpers.optimizers import BACKENDS, VARIANTS, every_optimizer
from torch.multiprocessing.reductions import StorageWeakRef

from fusedopt import Adafactor, AdamW, register_step_in_backward

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
    "a moment without data": (broken("exp_avg", torch.zeros(3, device="meta")), "on meta, expected one on (cpu|cuda)"),
    "a number": (broken("exp_avg", 0.0), "the state exp_avg .* is 0.0, expected one of shape"),
    "no count": (lambda state: state.pop("step"), "the state step .* is missing: it must be a 0-d float64"),
    "a count that is an int": (broken("step", 3), "the state step .* is 3: it must be a 0-d float64"),
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
@pytest.mark.parametrize("state", ["step", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"])
def test_a_state_with_data_of_another_dtype_is_as_good_as_another_tensor(state, backend):
    """What a step goes on with has the dtype that it reads."""
    p, q = weight(3, 2), weight(3, 2)
    given, replaced = Adafactor([p], backend=backend), Adafactor([q], backend=backend)
    for _ in range(2):
        step(given), step(replaced)
    dtype = torch.float32 if state == "step" else torch.bfloat16
    given.state[p][state].data = given.state[p][state].to(dtype)
    replaced.state[q][state] = replaced.state[q][state].to(dtype)
    step(given), step(replaced)
    assert_same([p, given.state[p]], [q, replaced.state[q]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "state"), [("AdamW", "exp_avg"), ("Adafactor", "exp_avg_sq_row")])
def test_a_state_whose_data_was_expanded_is_refused(name, state, backend):
    p = weight(3, 2)
    optimizer = MAKE[name]([p], backend=backend)
    step(optimizer), step(optimizer)
    t = optimizer.state[p][state]
    t.data = t[:1].clone().expand_as(t)
    refuses(optimizer, p, match=f"the state {state} .* without two elements in one place of memory")


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}], ids=["nearest", "stochastic"])
def test_a_model_may_swap_its_parameters_for_others_of_another_dtype(options, backend, monkeypatch):
    """As `model.to` does for wrapped tensors: it takes no parameter with weak references."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = AdamW(model.parameters(), backend=backend, **options)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(4):
            step(optimizer)
        optimizer.zero_grad()
        model.to(dtype)
    assert model.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_in_the_place_of_one_that_is_gone_is_updated(backend):
    """It may have its id: Python gives the memory of what is gone to what comes next."""
    given = torch.full((8,), 2.0)
    for _ in range(20):
        optimizer = AdamW([weight(8)], backend=backend)
        for _ in range(4):
            step(optimizer)
        (params,) = (group["params"] for group in optimizer.param_groups)
        state = optimizer.state.pop(params[0])
        params[0].grad = None
        params.clear()
        params.append(torch.nn.Parameter(given.clone()))
        optimizer.state[params[0]] = state
        step(optimizer)
        assert (params[0] < given).all() and state["step"] == 5.0


def test_users_may_keep_things_of_their_own_beside_a_state():
    p = weight(3)
    optimizer = AdamW([p])
    for number in range(3):
        step(optimizer)
        optimizer.state[p].update(seen=number, ema=torch.zeros(7))
    assert optimizer.state[p]["step"] == 3.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_memory_of_gradients_and_states_is_free_as_soon_as_they_are_dropped(name, dtype, backend):
    """Not after the next step: states are moved to the host, for instance, while a GPU does other work."""
    model = torch.nn.Linear(6, 5, dtype=dtype)
    optimizer = VARIANTS[name](model, backend=backend)
    for _ in range(3):
        step(optimizer)
    dropped = [p.grad for p in model.parameters()]
    dropped += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    memory = [StorageWeakRef(t.untyped_storage()) for t in dropped]
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state.update({name: t.clone() for name, t in state.items() if isinstance(t, torch.Tensor)})
    del dropped, state
    assert all(storage.expired() for storage in memory)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_changes_its_dtype_goes_on_with_its_state(name, dtype):
    model = Net()
    optimizer = MAKE[name](model.named_parameters())
    train(model, optimizer, 2)
    model.to(dtype)
    train(model, optimizer, 2)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


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
    dtypes = {value.dtype for state in optimizer.state.values() for name, value in state.items() if name != "step"}
    assert dtypes == {torch.float32}
