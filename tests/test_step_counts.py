"""Step counts: they are advanced where they lie, whoever else holds them and however many differ."""

import pytest
import torch
from helpers.between_steps import MAKE, step, weight
from helpers.comparing import assert_same
from helpers.optimizers import BACKENDS

from fusedopt import AdamW

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
    update = EagerAdamW.update
    monkeypatch.setattr(EagerAdamW, "update", lambda self, part: looked_at.extend(part.params) or update(self, part))
    params = [weight(1) for _ in range(50)]
    optimizer = AdamW(params)
    optimizer.init_state()
    for number, p in enumerate(params):
        optimizer.state[p]["step"].fill_(number)
    step(optimizer)
    assert list(map(id, looked_at)) == list(map(id, params))
