"""Parameters without data: lazy ones, on meta, fake; and those beside them."""

import pytest
import torch
from helpers.comparing import assert_same
from helpers.surroundings import DEVICE, MAKE, SHAPES, both_backends, drawn, every_optimizer, outcome, parameters, step
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedopt import AdamW, backends


@every_optimizer
@both_backends
def test_lazy_layers_train_from_their_first_forward_pass_on_and_are_left_alone_before(name, backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(5, 2)).to(DEVICE)
    optimizer = MAKE[name](model.parameters(), backend=backend)
    with pytest.raises(RuntimeError, match="forward pass"):
        optimizer.init_state()
    lazy, other = model[0], model[1]
    before = other.weight.detach().clone()
    other(drawn(0, (2, 5))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, other.weight) and torch.nn.parameter.is_lazy(lazy.weight)
    lazy(drawn(1, (2, 5))).square().sum().backward()
    before = lazy.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, lazy.weight)
    assert optimizer.state[lazy.weight]["step"].item() >= 1.0


def test_a_checkpoint_for_a_lazy_layer_is_refused_until_its_shape_is_known():
    saved = AdamW(torch.nn.Linear(5, 3).parameters())
    saved.init_state()
    model = torch.nn.LazyLinear(3)
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match="forward pass"):
        optimizer.load_state_dict(saved.state_dict())
    model(torch.ones(1, 5))
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state[model.weight]["exp_avg"].shape == (3, 5)


@every_optimizer
@both_backends
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_step_without_data_makes_the_state_and_nothing_else(name, backend, kind):
    options = {"device": "meta"} if kind == "meta" else {}
    expected = MAKE[name](torch.nn.Linear(4, 3).parameters(), backend=backend)
    expected.init_state()
    shapes = [{k: (t.shape, t.dtype) for k, t in state.items()} for state in expected.state.values()]
    with FakeTensorMode() if kind == "fake" else torch.device("cpu"):
        model = torch.nn.Linear(4, 3, **options)
        optimizer = MAKE[name](model.parameters(), backend=backend)
        for _ in range(2):
            model(torch.ones(2, 4, **options)).sum().backward()
            optimizer.step()
        assert [{k: (t.shape, t.dtype) for k, t in s.items()} for s in optimizer.state.values()] == shapes
    step(expected, 1)


@every_optimizer
def test_kernels_are_not_asked_for_where_there_is_no_data(name, monkeypatch):
    """Outside of the interpreter there are none for the meta device."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    model = torch.nn.Linear(4, 3, device="meta")
    optimizer = MAKE[name](model.parameters(), backend="triton")
    for _ in range(2):
        model(torch.ones(2, 4, device="meta")).sum().backward()
        optimizer.step()
    assert all(optimizer.state[p] for p in model.parameters())


@every_optimizer
@both_backends
def test_parameters_beside_one_on_meta_are_updated(name, backend):
    beside = torch.nn.Parameter(torch.empty(3, 4, device="meta"))
    optimizer = MAKE[name]([beside, *parameters(backend)], backend=backend)
    expected = MAKE[name](parameters(backend), backend=backend)
    for number in (1, 2):
        for seed, (p, q) in enumerate(zip(optimizer.param_groups[0]["params"][1:], expected.param_groups[0]["params"])):
            p.grad, q.grad = drawn(seed + number, tuple(p.shape)), drawn(seed + number, tuple(p.shape))
        beside.grad = torch.empty_like(beside)
        optimizer.step()
        expected.step()
    assert_same(
        [p.detach() for p in optimizer.param_groups[0]["params"][1:]], outcome(expected)[: len(SHAPES[backend])]
    )
    assert optimizer.state[beside]["step"].is_meta
