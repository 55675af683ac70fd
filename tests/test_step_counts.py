"""Step counts: they are advanced where they lie, whoever else holds them, however many differ, and beyond 2^24."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from helpers.between_steps import MAKE, step, weight
from helpers.comparing import assert_near, assert_same
from helpers.optimizers import BACKENDS

from fusedopt import Adafactor, AdamW
from fusedopt.precision import COUNTS

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
    spread = torch.zeros(3 * len(steps), dtype=COUNTS)
    views = [spread[3 * i + 1] for i in reversed(range(len(steps)))]
    for view, count in zip(views, steps):
        view.copy_(count)
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
    parts = EagerAdamW.parts
    monkeypatch.setattr(
        EagerAdamW, "parts", lambda self, bucket: looked_at.extend(bucket.params) or parts(self, bucket)
    )
    params = [weight(1) for _ in range(50)]
    optimizer = AdamW(params)
    optimizer.init_state()
    for number, p in enumerate(params):
        optimizer.state[p]["step"].fill_(number)
    step(optimizer)
    assert list(map(id, looked_at)) == list(map(id, params))


# Beyond 2^24, where float32 stops counting.

LAST = float(1 << 24)


def counts_of(optimizer):
    return [state["step"].item() for state in optimizer.state.values()]


def at_count(optimizer, count):
    optimizer.init_state()
    for state in optimizer.state.values():
        state["step"].fill_(count)
    return optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_counts_go_on_beyond_what_float32_counts(name, backend):
    optimizer = at_count(MAKE[name]([weight(3, 2), weight(2)], backend=backend), LAST - 1)
    for number in range(1, 4):
        step(optimizer)
        assert counts_of(optimizer) == [LAST - 1 + number] * 2
    other = MAKE[name]([weight(3, 2), weight(2)], backend="eager")
    other.load_state_dict(optimizer.state_dict())
    again = pickle.loads(pickle.dumps(other))
    for each in (other, again):
        step(each)
        assert counts_of(each) == [LAST + 3] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rate_of_adafactor_falls_beyond_2_to_the_24(backend):
    p = weight(3, 2)
    optimizer = at_count(Adafactor([p], scale_parameter=False, backend=backend), 2 * LAST)
    before = p.detach().clone()
    step(optimizer)
    rate = 1.0 / (2 * LAST + 1) ** 0.5
    assert optimizer.effective_lr(p) == rate < 0.75 / LAST**0.5
    # The average of squares begins at 0 here, and the clipping brings the update down to a root mean square of 1.
    assert_near(before - p.detach(), torch.full((3, 2), rate), rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_rounding_draws_other_bits_beyond_2_to_the_24(backend):
    """With the same bits at every step, an element would be rounded the same way for ever."""
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    # A tenth of what is between 1 and the next smaller number of bfloat16.
    optimizer = at_count(
        AdamW([p], lr=2**-8 / 10, betas=(0.0, 0.0), eps=0.0, stochastic_rounding=True, backend=backend), LAST
    )
    moved = []
    for _ in range(4):
        with torch.no_grad():
            p.fill_(1.0)
        step(optimizer)
        moved.append(p.detach() != 1.0)
        assert 50 < moved[-1].sum() < 160
    assert all((one & other).sum() < 50 for one, other in pairwise(moved))


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_torch_goes_on_from_our_counts_and_we_from_those_of_torch(how):
    """Counts of float64 are what torch makes itself where that is the default dtype; its fused kernel has float32."""
    ours = AdamW([weight(5), weight(3)], lr=0.1, weight_decay=0.1, eps=1e-8, convention="torch", backend="eager")
    theirs = torch.optim.AdamW([weight(5), weight(3)], lr=0.1, weight_decay=0.1, **how)
    for optimizer in (ours, theirs):
        step(optimizer)
    went_on = torch.optim.AdamW([weight(5), weight(3)], **how)
    went_on.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch does not copy
    for q, p in zip(went_on.param_groups[0]["params"], ours.param_groups[0]["params"]):
        q.data.copy_(p.detach())
    for optimizer in (ours, theirs, went_on):
        step(optimizer)
    params = [[p.detach() for p in optimizer.param_groups[0]["params"]] for optimizer in (went_on, theirs, ours)]
    assert_near(params[0], params[1], rtol=1e-6, atol=0.0)
    assert_near(params[2], params[1], rtol=1e-6, atol=0.0)
    assert counts_of(went_on) == counts_of(theirs) == [2.0, 2.0]
    back = AdamW([weight(5), weight(3)], backend="eager")
    back.load_state_dict(went_on.state_dict())
    assert counts_of(back) == [2.0, 2.0]
    assert {state["step"].dtype for state in back.state.values()} == {COUNTS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_a_count_of_float32_is_one_of_float64_after_the_next_step(name, backend):
    """Older pickles have them, and whoever puts one into the state by hand."""
    optimizer = at_count(MAKE[name]([weight(3, 2), weight(2)], backend=backend), 6.0)
    older = copy.deepcopy(optimizer)
    for state in older.state.values():
        state["step"] = state["step"].float()
    for each in (optimizer, older):
        step(each)
        assert counts_of(each) == [7.0, 7.0]
        assert {state["step"].dtype for state in each.state.values()} == {COUNTS}
    assert_same(*[[p.detach() for p in each.param_groups[0]["params"]] for each in (optimizer, older)])


def test_a_distributed_checkpoint_with_float32_counts_loads(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dcp

    model = torch.nn.Linear(3, 2)
    optimizer = at_count(AdamW(model.parameters()), 5.0)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    for state in saved["state"].values():
        state["step"] = state["step"].float()
    checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    other = AdamW(model.parameters())
    into = {"optimizer": dcp.get_optimizer_state_dict(model, other)}
    checkpoint.load(into, checkpoint_id=tmp_path, no_dist=True)
    dcp.set_optimizer_state_dict(model, other, into["optimizer"])
    assert counts_of(other) == [5.0, 5.0]
    assert {state["step"].dtype for state in other.state.values()} == {COUNTS}
