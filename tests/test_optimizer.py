"""What every torch optimizer does, as ours do it: groups, closures, hooks, copies, checkpoints, given gradients."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.optimizers import BACKENDS, OPTIMIZERS, every_optimizer

from fusedopt import AdamW
from fusedopt.reference import ReferenceAdamW


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).to(dtype)


def train(m, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(m.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        m(torch.randn(16, 4, generator=generator).to(dtype)).float().square().mean().backward()
        optimizer.step()


def test_groups_have_their_own_options_and_later_ones_join():
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = AdamW([{"params": [a], "lr": 0.1}, {"params": [b]}], lr=0.01)
    optimizer.add_param_group({"params": [c], "lr": 0.2})
    for p in (a, b, c):
        p.grad = torch.ones(3)
    optimizer.step()
    for p, lr in ((a, 0.1), (b, 0.01), (c, 0.2)):
        assert_near(p.detach(), torch.full((3,), 1 - lr), rtol=1e-4, atol=0)


def test_named_parameters():
    m = model()
    optimizer = AdamW(m.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in m.named_parameters()]
    train(m, optimizer, 2)
    AdamW(m.named_parameters()).load_state_dict(optimizer.state_dict())


def test_closure_runs_once_with_gradients_and_before_the_update():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([p], lr=0.1)
    seen = []

    def closure():
        seen.append((p.item(), torch.is_grad_enabled()))
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert seen == [(2.0, True)]
    assert p.item() == pytest.approx(1.9, abs=1e-5)


def test_step_without_closure_returns_none_and_without_gradients_does_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], weight_decay=0.5)
    assert optimizer.step() is None
    assert_same(p.detach(), torch.ones(2))
    assert not optimizer.state and not optimizer.state_dict()["state"]


def test_a_parameter_without_gradient_keeps_its_own_step_count():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdamW([a, b], lr=0.1)
    for step in range(3):
        a.grad, b.grad = torch.ones(2), torch.ones(2) if step == 1 else None
        optimizer.step()
    assert optimizer.state[a]["step"] == 3 and optimizer.state[b]["step"] == 1


def test_learning_rate_as_a_tensor_stays_that_tensor_and_is_read_every_step():
    lr = torch.tensor(0.1)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([p], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for expected in (-0.1, -0.15, -0.175):
        p.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        assert p.item() == pytest.approx(expected, abs=1e-5)
    assert optimizer.param_groups[0]["lr"] is lr


def test_hooks_and_schedulers_see_every_step_also_from_apply_gradients():
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = AdamW([p])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.apply_gradients([(torch.ones(1), p)])
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_like_the_original(duplicate):
    m = model()
    optimizer = AdamW(m.parameters(), lr=0.01, convention="keras", backend="eager", amsgrad=True)
    train(m, optimizer, 3)
    other_model, other = duplicate((m, optimizer)) if duplicate is not copy.deepcopy else copy.deepcopy((m, optimizer))
    assert other.convention == "keras" and other.backend == "eager"
    train(m, optimizer, 2, seed=2)
    train(other_model, other, 2, seed=2)
    assert_same(m, other_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("convention", ["transformers", "torch", "keras"])
def test_resuming_from_a_file_is_bit_for_bit_the_uninterrupted_run(convention, dtype):
    m = model(dtype)
    optimizer = AdamW(m.parameters(), lr=0.01, weight_decay=0.1, convention=convention)
    train(m, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": m.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model(dtype, seed=9)
    resumed.load_state_dict(saved["model"])
    other = AdamW(resumed.parameters(), lr=0.5, convention=convention)
    other.load_state_dict(saved["optimizer"])
    train(m, optimizer, 3, seed=2)
    train(resumed, other, 3, seed=2)
    assert_same(m, resumed)


def test_saved_step_counts_are_tensors_of_their_own():
    m = model()
    optimizer = AdamW(m.parameters())
    train(m, optimizer, 2)
    saved = optimizer.state_dict()
    steps = [state["step"] for state in saved["state"].values()]
    assert all(step.ndim == 0 and step.untyped_storage().nbytes() == 8 for step in steps)
    train(m, optimizer, 1)
    assert [step.item() for step in steps] == [2.0] * 4


@pytest.mark.parametrize(
    "theirs",
    [
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, eps=1e-6, foreach=False, amsgrad=True),
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, eps=1e-6, fused=True),
        lambda params: torch.optim.Adam(params, lr=0.01, eps=1e-6),
    ],
    ids=["AdamW", "AdamW-fused", "Adam"],
)
def test_goes_on_from_torch_and_back(theirs):
    m = model(torch.float64)
    reference = theirs(m.parameters())
    train(m, reference, 3)
    ours_model = copy.deepcopy(m)
    ours = AdamW(ours_model.parameters(), convention="torch")
    ours.load_state_dict(reference.state_dict())
    assert not {"fused", "foreach", "capturable", "differentiable"} & set(ours.param_groups[0])
    assert ours.param_groups[0]["correct_bias"] is True
    train(m, reference, 3, seed=2)
    train(ours_model, ours, 3, seed=2)
    assert_near(m, ours_model, rtol=1e-11, atol=1e-13)
    back = theirs(m.parameters())
    back.load_state_dict(ours.state_dict())
    train(m, back, 1, seed=3)


def test_goes_on_from_transformers():
    """Its state has Python integers for steps, its groups lack amsgrad and maximize."""
    m = model(torch.float64)
    theirs = ReferenceAdamW(m.parameters(), lr=0.01, weight_decay=0.1)
    train(m, theirs, 3)
    saved = theirs.state_dict()
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        group.pop("amsgrad", None), group.pop("maximize", None)
    ours_model = copy.deepcopy(m)
    ours = AdamW(ours_model.parameters())
    ours.load_state_dict(saved)
    train(m, theirs, 3, seed=2)
    train(ours_model, ours, 3, seed=2)
    assert_near(m, ours_model, rtol=1e-11, atol=1e-13)


def test_loaded_moments_keep_their_dtype_and_take_the_parameters_layout():
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    p.grad = torch.randn_like(p)
    optimizer = AdamW([p])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].float().contiguous()
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_counts_of_another_convention_become_one_shared_count():
    m = model()
    theirs = AdamW(m.parameters(), convention="torch")
    train(m, theirs, 2)
    saved = theirs.state_dict()
    saved["state"][0]["step"] = torch.tensor(7.0)
    ours = AdamW(m.parameters(), convention="keras")
    ours.load_state_dict(saved)
    train(m, ours, 1)
    assert all(s["step"] == 8 for s in ours.state.values())


def test_a_rate_below_zero_comes_back():
    """A polynomial schedule may end below 0."""
    m = model()
    optimizer = AdamW(m.parameters())
    optimizer.param_groups[0]["lr"] = -0.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == -0.5


def test_amsgrad_switched_on_later_starts_from_zero():
    m = model()
    optimizer = AdamW(m.parameters())
    train(m, optimizer, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    train(m, optimizer, 1)
    assert all((s["max_exp_avg_sq"] == s["exp_avg_sq"]).all() for s in optimizer.state.values())


def test_numpy_numbers_are_numbers():
    assert AdamW(model().parameters(), lr=np.float32(0.5), eps=np.float64(1e-6)).param_groups[0]["lr"] == 0.5


def test_a_checkpoint_keeps_the_convention_of_the_constructor():
    m = model()
    ours = AdamW(m.parameters(), convention="torch")
    ours.load_state_dict(AdamW(m.parameters(), convention="keras").state_dict())
    assert ours.convention == "torch"


def test_init_state_changes_no_parameter_and_is_what_the_first_step_starts_from():
    a, b = model(), model()
    early, late = AdamW(a.parameters(), lr=0.1), AdamW(b.parameters(), lr=0.1)
    early.init_state()
    assert_same(a, b)
    assert all(s["step"] == 0 for s in early.state.values())
    train(a, early, 2)
    train(b, late, 2)
    assert_same(a, b)


def test_apply_gradients_equals_a_step_and_leaves_grad_alone():
    a, b = model(), model()
    ours, theirs = AdamW(a.parameters(), lr=0.1), AdamW(b.parameters(), lr=0.1)
    grads = [torch.randn_like(p) for p in a.parameters()]
    for p, g in zip(b.parameters(), grads):
        p.grad = g
    theirs.step()
    given = [g.clone() for g in grads]
    ours.apply_gradients(zip(given, a.parameters()))
    assert_same(a, b)
    assert all(p.grad is None for p in a.parameters())
    assert_same(given, grads)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_apply_gradients_scales_on_the_way(scale):
    a, b = model(torch.float64), model(torch.float64)
    ours, theirs = AdamW(a.parameters(), lr=0.1), AdamW(b.parameters(), lr=0.1)
    for _ in range(2):
        grads = [torch.randn_like(p) for p in a.parameters()]
        ours.apply_gradients(zip(grads, a.parameters()), scale=scale)
        theirs.apply_gradients(zip([0.5 * g for g in grads], b.parameters()))
    assert_near(a, b, rtol=1e-12, atol=0)


def test_apply_gradients_takes_another_dtype_and_skips_none():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    AdamW([p, q], lr=0.1).apply_gradients([(torch.ones(3, dtype=torch.bfloat16), p), (None, q)])
    assert p.detach().tolist() == pytest.approx([0.9] * 3, abs=1e-5)
    assert_same(q.detach(), torch.ones(3))


def test_parameters_swapped_for_others_are_noticed():
    p = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = AdamW([p], lr=0.1)
    p.grad = torch.ones(4, 6)
    optimizer.step()
    p.data = torch.zeros(6, 4).T  # same shape, another place, another layout
    optimizer.step()
    assert_near(p.detach(), torch.full((4, 6), -0.1), rtol=1e-4, atol=0)


def test_a_model_moved_to_another_dtype_goes_on():
    m = model()
    optimizer = AdamW(m.parameters(), lr=0.01)
    train(m, optimizer, 2)
    m.to(torch.float64)
    before = [p.clone() for p in m.parameters()]
    train(m, optimizer, 1)
    assert all(p.dtype == torch.float64 and not torch.equal(p, q) for p, q in zip(m.parameters(), before))
    assert all(s["step"] == 3 for s in optimizer.state.values())


def test_training_bumps_version_counters():
    """autograd must notice that a weight it saved has changed."""
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    AdamW([p]).apply_gradients([(torch.ones(3), p)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repr_shows_the_options():
    text = repr(AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.25))
    assert text.startswith("AdamW") and "lr: 0.25" in text


@pytest.mark.parametrize("backend", BACKENDS)
@every_optimizer
def test_a_step_makes_the_states_that_an_optimizer_says_and_no_others(name, backend, device):
    row = OPTIMIZERS[name]
    p = torch.nn.Parameter(torch.ones(40, 3, device=device))
    optimizer = row([p], backend=backend)
    optimizer.apply_gradients([(torch.ones_like(p), p)])
    assert optimizer.state[p].keys() == row.states and type(optimizer) is row.cls
    assert (p < 1).all()
