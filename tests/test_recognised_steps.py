"""A step that has the tensors of the last one looks at nothing but addresses again: it does the same, only faster."""

import importlib

import pytest
import torch
from helpers.between_steps import weight
from helpers.comparing import assert_same
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS, VARIANTS, every_optimizer, scheduler_for

from fusedopt import AdamW
from fusedopt.backends import has_triton
from fusedopt.optimizer import looks
from fusedopt.optimizer.state_changes import States


def switch_off(monkeypatch):
    monkeypatch.setattr(looks, "_look_of", lambda tensors: None)


class Loop:
    """Takes steps with gradients of its own; `how` changes that of the first parameter."""

    def __init__(self, backend):
        self.params = self.p, self.q, self.r = [weight(4, 8), weight(5), weight(16, 2)]
        groups = [{"params": [self.p, self.q]}, {"params": [self.r], "lr": 0.02}]
        self.optimizer = AdamW(groups, lr=0.01, weight_decay=0.1, backend=backend)
        self.how = lambda g: g
        self.state = self.optimizer.state
        self.group = self.optimizer.param_groups[0]

    def step(self, number):
        given = [(torch.linspace(-number, 1.0, p.numel()).view(p.shape), p) for p in self.params]
        self.optimizer.apply_gradients([(self.how(g) if p is self.p else g, p) for g, p in given])


def data(make):
    return lambda loop: setattr(loop.p, "data", make(loop))


def state(name, make):
    return lambda loop: loop.state[loop.p].update({name: make(loop.state[loop.p])})


def state_data(name, make):
    return lambda loop: setattr(loop.state[loop.p][name], "data", make(loop.state[loop.p][name]))


def gradient(how):
    return lambda loop: setattr(loop, "how", how)


def option(name, value):
    return lambda loop: loop.group.update({name: value})


def swap_names(loop):
    own = loop.state[loop.p]
    m, v = own.pop("exp_avg"), own.pop("exp_avg_sq")
    own.update({"exp_avg_sq": m, "exp_avg": v})


def replace_count(loop):
    """Most likely by one that Python puts where the old one was."""
    loop.state[loop.p]["step"] = None
    loop.state[loop.p]["step"] = torch.tensor(-1.0, dtype=torch.float64)


def move_to_other_group(loop):
    loop.optimizer.param_groups[1]["params"].insert(0, loop.group["params"].pop())


def swap_states(loop):
    loop.state[loop.p], loop.state[loop.r] = loop.state[loop.r], loop.state[loop.p]


CHANGES = {
    "nothing": lambda loop: None,
    "other data": data(lambda loop: torch.full((4, 8), 2.0)),
    "data at an odd address": data(lambda loop: torch.ones(33)[1:].view(4, 8)),
    "data of another size": data(lambda loop: torch.ones(4, 9)),
    "data of another dtype": data(lambda loop: torch.ones(4, 8, dtype=torch.float64)),
    "data turned": data(lambda loop: torch.ones(8, 4).t()),
    "data with gaps": data(lambda loop: torch.ones(4, 9)[:, :8]),
    "data expanded": data(lambda loop: torch.ones(4, 1).expand(4, 8)),
    "data of another parameter": data(lambda loop: loop.r.data.view(4, 8)),
    "frozen": lambda loop: loop.p.requires_grad_(False),
    "a moment": state("exp_avg", lambda own: torch.ones(4, 8)),
    "a moment of another size": state("exp_avg", lambda own: torch.ones(4, 9)),
    "a moment turned": state("exp_avg", lambda own: torch.ones(8, 4).t()),
    "a moment of another dtype": state("exp_avg", lambda own: torch.ones(4, 8, dtype=torch.float64)),
    "a moment that is None": state("exp_avg", lambda own: None),
    "a moment that is another": state("exp_avg", lambda own: own["exp_avg_sq"]),
    "a moment's data": state_data("exp_avg", torch.ones_like),
    "a moment's data of another dtype": state_data("exp_avg", lambda t: t.to(torch.bfloat16)),
    "a moment's data expanded": state_data("exp_avg", lambda t: torch.ones(4, 1).expand(4, 8)),
    "a moment's data of another size": state_data("exp_avg", lambda t: torch.ones(9)),
    "a moment's data turned": state_data("exp_avg", lambda t: torch.ones(8, 4).t()),
    "a moment resized": lambda loop: loop.state[loop.p]["exp_avg"].resize_(3),
    "moments with each other's names": swap_names,
    "no moment": lambda loop: loop.state[loop.p].pop("exp_avg"),
    "one more tensor": state("mine", lambda own: torch.ones(3)),
    "a count below 0": replace_count,
    "a count of float32": state("step", lambda own: torch.tensor(4.0)),
    "a count's data of float32": state_data("step", lambda t: t.float()),
    "no state": lambda loop: loop.state.pop(loop.p),
    "an empty state": lambda loop: loop.state[loop.p].clear(),
    "states of each other": swap_states,
    "states in another order": lambda loop: loop.state.update({loop.p: loop.state.pop(loop.p)}),
    "no gradient": gradient(lambda g: None),
    "a gradient of another dtype": gradient(lambda g: g.to(torch.bfloat16)),
    "a gradient of integers": gradient(lambda g: g.to(torch.int64)),
    "a gradient of another size": gradient(lambda g: torch.ones(4, 9)),
    "a gradient turned": gradient(lambda g: g.t().contiguous().t()),
    "a gradient expanded": gradient(lambda g: g[:, :1].expand(4, 8)),
    "a gradient at an odd address": gradient(lambda g: torch.cat([g.new_ones(1), g.flatten()])[1:].view(4, 8)),
    "a gradient with the negative bit": gradient(torch._neg_view),
    "a sparse gradient": gradient(torch.Tensor.to_sparse),
    "a gradient on meta": gradient(lambda g: g.to("meta")),
    "a gradient that is a parameter": gradient(torch.nn.Parameter),
    "a rate": option("lr", 0.1),
    "a rate that is NaN": option("lr", float("nan")),
    "a rate that is a tensor": option("lr", torch.tensor(0.1)),
    "amsgrad": option("amsgrad", True),
    "amsgrad that is 1": option("amsgrad", 1),
    "master weights": option("master_weights", True),
    "a dtype of states": option("state_dtype", torch.bfloat16),
    "betas": option("betas", (0.5, 0.6)),
    "a parameter less": lambda loop: loop.group["params"].pop(),
    "a parameter twice": lambda loop: loop.group["params"].append(loop.p),
    "a parameter in the other group": move_to_other_group,
    "parameters in another order": lambda loop: loop.group["params"].reverse(),
    "one more group": lambda loop: loop.optimizer.add_param_group({"params": [weight(3)]}),
    "a checkpoint": lambda loop: loop.optimizer.load_state_dict(loop.optimizer.state_dict()),
}


def outcome(change, backend, steps=range(8)):
    """All errors, and all that there is after some steps, of which `change` comes before the fifth."""
    loop, errors = Loop(backend), []
    for number in steps:
        if number == 4:
            change(loop)
        try:
            loop.step(number)
        except Exception as error:
            errors.append(f"{number}: {type(error).__name__}: {error}")
    states = [dict(loop.state[p]) if p in loop.state else {} for p in loop.params]
    return errors, [p.detach() for p in loop.params], states


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGES)
def test_any_change_is_seen_as_if_everything_were_looked_at(name, backend, monkeypatch):
    found = hits(monkeypatch)
    fast = outcome(CHANGES[name], backend)
    assert found[3] and not any(found[:3])  # what is changed had been recognised
    switch_off(monkeypatch)
    slow = outcome(CHANGES[name], backend)
    assert fast[0] == slow[0]
    assert_same(fast[1:], slow[1:], equal_nan=True)


@NEEDS_TRITON
def test_rows_that_follow_are_those_that_are_looked_at():
    from fusedopt.backends.triton.rows import Rows

    memory = torch.zeros(256)
    params, states = [weight(16), weight(5), weight(2, 16)], [torch.zeros(16), torch.zeros(5), torch.zeros(2, 16)]
    rows = Rows()
    rows.refresh(params, list(map(torch.zeros_like, params)), states)
    for start in (0, 1, 16, 3):
        grads = [memory[start + 64 * i :][: p.numel()].view(p.shape) for i, p in enumerate(params)]
        params[0].data = torch.ones(17)[start % 2 :][:16]
        anew = Rows()
        anew.refresh(params, grads, states)
        assert rows.follow(grads)
        for column in ("addresses", "keys", "numel"):
            assert getattr(rows, column).tolist() == getattr(anew, column).tolist()
        keys = rows.keys
        assert rows.follow(grads) and rows.keys is keys


@NEEDS_TRITON
def test_memory_that_was_freed_is_refused():
    def free(loop):
        loop.p.untyped_storage().resize_(0)

    (first, *_), *_ = outcome(free, "triton", range(5))
    assert "a Parameter of shape (4, 8) has no memory that a kernel could reach" in first


# That steps do take the short way.


def hits(monkeypatch):
    """Whether each step from now on is recognised."""
    found = []
    recognised = States.recognised

    def spy(*args):
        states = recognised(*args)
        found.append(states is not None)
        return states

    monkeypatch.setattr(States, "recognised", spy)
    return found


OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "skipping": {"skip_nonfinite": True},
    "statistics": {"track_statistics": True},
    "random": {"stochastic_rounding": True},
    "master": {"master_weights": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@every_optimizer
def test_a_plain_loop_is_recognised(name, options, backend, monkeypatch):
    found, followed = hits(monkeypatch), followed_rows(monkeypatch)
    dtype = torch.bfloat16 if options in ("random", "master") else torch.float32
    model = torch.nn.Linear(4, 3, dtype=dtype)
    optimizer = OPTIMIZERS[name](model, backend=backend, **OPTIONS[options])
    scheduler = scheduler_for(name, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert found == [False] * 3 + [True] * 3
    assert followed == ([True] * 3 if backend == "triton" else [])


@pytest.mark.parametrize("name", ["AdamW", "Adafactor-lr-beta1"])
def test_a_frozen_half_is_recognised(name, monkeypatch):
    found = hits(monkeypatch)
    model = torch.nn.Linear(4, 3)
    optimizer = VARIANTS[name](model)
    model.bias.requires_grad_(False)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert found == [False] * 3 + [True] * 3


def times_gathered(how, monkeypatch):
    """At how many of 100 steps everything was gathered to learn or to compare it."""
    gathered = []
    everything = States._all_of
    monkeypatch.setattr(States, "_all_of", lambda *args: gathered.append(1) or everything(*args))
    p, q = weight(3), weight(3)
    if how == "a subclass":
        p.__class__ = type("Other", (torch.nn.Parameter,), {})
    optimizer = AdamW([p, q])
    for step in range(100):
        g = torch.ones(3, dtype=torch.bfloat16 if how == "alternate" and step % 2 else torch.float32)
        optimizer.apply_gradients([(g, p), (g if how == "shared" else g.clone(), q)])
    return len(gathered)


@pytest.mark.parametrize("how", ["alternate", "shared"])
def test_a_loop_that_is_never_recognised_seldom_gathers_what_there_is(how, monkeypatch):
    assert 0 < times_gathered(how, monkeypatch) <= 16


def test_a_parameter_of_another_class_is_told_once(monkeypatch):
    """So a step of a sharded model always makes the same calls."""
    assert times_gathered("a subclass", monkeypatch) == 0


def followed_rows(monkeypatch):
    found = []
    if not has_triton():
        return found
    rows = importlib.import_module("fusedopt.backends.triton.rows").Rows
    follow = rows.follow

    def spy(self, grads):
        found.append(follow(self, grads))
        return found[-1]

    monkeypatch.setattr(rows, "follow", spy)
    return found
