"""What looks the same and what does not, and when it is worth while to learn it."""

import weakref

import pytest
import torch

from fusedopt.optimizer.looks import Looks


def learnt(*tensors):
    known = Looks()
    assert known.learn(tensors)
    return known


OTHERS = {
    "dtype": lambda: torch.zeros(4, 4, dtype=torch.bfloat16),
    "device": lambda: torch.zeros(4, 4, device="meta"),
    "size": lambda: torch.zeros(4, 3),
    "dimensions": lambda: torch.zeros(16),
    "strides": lambda: torch.zeros(4, 4).t(),
    "expanded": lambda: torch.zeros(4, 1).expand(4, 4),
    "with gaps": lambda: torch.zeros(4, 8)[:, :4],
    "sparse": lambda: torch.zeros(4, 4).to_sparse(),
    "compressed": lambda: torch.zeros(4, 4).to_sparse_csr(),
    "negative bit": lambda: torch._neg_view(torch.zeros(4, 4)),
    "requires_grad": lambda: torch.zeros(4, 4, requires_grad=True),
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False),
    "a lazy parameter": torch.nn.UninitializedParameter,
    "a subclass": lambda: torch.zeros(4, 4).as_subclass(type("Other", (torch.Tensor,), {})),
    "made in inference mode": lambda: torch.inference_mode()(torch.zeros)(4, 4),
    "none": lambda: None,
    "a number": lambda: 0.0,
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_looks_different(other):
    known = learnt(torch.zeros(4, 4), torch.zeros(3))
    assert known.same([torch.ones(4, 4), torch.ones(3)])
    assert known.same([torch.ones(17)[1:].view(4, 4), torch.ones(3)])  # elsewhere
    assert not known.same([OTHERS[other](), torch.ones(3)])


def test_no_tensor_comes_twice():
    t = torch.zeros(3)
    assert not learnt(torch.zeros(3), torch.zeros(3)).same([t, t])
    assert not Looks().learn([t, t])


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_was_learnt_in_another_mode_is_not_used(mode):
    known = learnt(torch.zeros(3))
    with mode():
        assert not known.same([torch.zeros(3)])
    assert known.same([torch.zeros(3)])


@pytest.mark.parametrize("other", ["a subclass", "a lazy parameter", "none"])
def test_what_is_not_learnt(other):
    assert not Looks().learn([OTHERS[other]()])


def test_no_tensor_is_kept_alive():
    t = torch.zeros(3)
    here, known = weakref.ref(t), learnt(t)
    del t
    assert here() is None and known


def test_a_torch_that_cannot_compare_is_not_asked(monkeypatch):
    for other in (lambda *tensors: None, lambda *tensors, **options: None):  # other arguments, no `check`
        monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", other)
        assert not Looks().learn([torch.zeros(3)])
    monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    assert not Looks().learn([torch.zeros(3)])


SELDOM = [0, 1, 3, 7, 15, 31, 63, 127, 191, 255]


def tries(known, tensors, hits=0):
    """At which of 300 tries it learns something, if it misses after so many hits each time."""
    found = []
    for number in range(300):
        if known.due():
            found.append(number)
            if known.learn(tensors):
                assert all(known.same(tensors) for _ in range(hits))
                known.miss()
    return found


def test_what_changes_too_often_is_seldom_learnt():
    known = Looks()
    assert tries(known, [torch.zeros(3)]) == SELDOM
    while not known.due():
        pass
    assert known.learn([torch.zeros(3)])
    assert all(known.same([torch.zeros(3)]) for _ in range(4))
    known.miss()
    assert known.due()


@pytest.mark.parametrize("hits", [1, 3])
def test_what_changes_before_learning_has_paid_is_seldom_learnt(hits):
    assert tries(Looks(), [torch.zeros(3)], hits) == SELDOM
    assert tries(Looks(), [torch.zeros(3)], 4) == list(range(300))


@pytest.mark.parametrize("other", ["a subclass", "the same"])
def test_what_cannot_be_learnt_is_seldom_tried(other):
    t = torch.zeros(3)
    assert tries(Looks(), [t, t] if other == "the same" else [OTHERS[other]()]) == SELDOM
