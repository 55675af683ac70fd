"""The step in backward: the numbers of step(), without all gradients at once; refusals where it cannot be right."""

import copy

import pytest
import torch
from helpers.comparing import assert_same, same
from helpers.loops import Net, sharded, train, whole
from helpers.optimizers import ROWS, VARIANTS, scheduler_for
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion, register_step_in_backward


def run(name, backend, device, steps=6, in_backward=True, dtype=torch.float32):
    model = Net().to(device, dtype)
    optimizer = VARIANTS[name](model, backend=backend)
    scheduler = scheduler_for(name, optimizer)
    if in_backward:
        register_step_in_backward(optimizer, model)
    train(model, optimizer, steps, scheduler)
    return model, optimizer


@pytest.mark.parametrize("name, backend", ROWS)
def test_the_numbers_are_those_of_step(name, backend, device):
    """Rates, groups, names, decay, and the shared count of keras when a layer has no gradient included."""
    steps = 6 if backend == "eager" else 3
    plain_model, plain = run(name, backend, device, steps, in_backward=False)
    model, optimizer = run(name, backend, device, steps)
    assert_same(model, plain_model)
    assert_same(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "AdamWeightDecay-function", "Adafactor"])
def test_the_numbers_are_those_of_step_in_bfloat16(name):
    plain_model, _ = run(name, "eager", "cpu", in_backward=False, dtype=torch.bfloat16)
    model, _ = run(name, "eager", "cpu", dtype=torch.bfloat16)
    assert_same(model, plain_model)


class Gradients:
    """Bytes of `.grad` that exist when a parameter's gradient is complete."""

    def __init__(self, model):
        self.peak, self._params = 0, list(model.parameters())
        for p in self._params:
            p.register_post_accumulate_grad_hook(self._look)

    def _look(self, _):
        self.peak = max(self.peak, sum(p.grad.nbytes for p in self._params if p.grad is not None))


def test_never_more_than_one_gradient_exists():
    def peak(in_backward):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(10)))
        optimizer = AdamW(model.parameters())
        gradients = Gradients(model)
        if in_backward:
            register_step_in_backward(optimizer, model)
        model(torch.ones(2, 64)).sum().backward()
        assert all((p.grad is None) is in_backward for p in model.parameters())
        return gradients.peak

    one = 64 * 64 * 4
    assert peak(in_backward=False) == 10 * one
    assert peak(in_backward=True) == one


@pytest.mark.gpu
def test_peak_memory_on_the_gpu(device):
    def peak(in_backward):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))).to(device)
        optimizer = AdamW(model.parameters())
        optimizer.init_state()
        if in_backward:
            register_step_in_backward(optimizer, model)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(torch.ones(2, 1024, device=device)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated(device) - before

    one = 1024 * 1024 * 4
    assert peak(in_backward=False) > 15 * one
    assert peak(in_backward=True) < 4 * one


def test_the_loop_stays_as_it_is():
    """step() finds nothing to do, but schedulers, hooks and the number of calls go on."""
    model = Net()
    optimizer = AdamWeightDecay(model.named_parameters(), 0.01)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    register_step_in_backward(optimizer, model)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, 3, scheduler)
    assert optimizer.iterations == len(calls) == 3
    assert scheduler.get_last_lr() == [0.01 / 8]


def test_a_closure_runs_backward_inside_of_step():
    def loss(model, optimizer):
        optimizer.zero_grad()
        value = model(torch.ones(2, 5)).square().mean()
        value.backward()
        return value

    models = Net(), Net()
    for model, in_backward in zip(models, (False, True)):
        optimizer = AdamW(model.parameters(), lr=0.1)
        if in_backward:
            register_step_in_backward(optimizer, model)
        for _ in range(3):
            assert optimizer.step(lambda m=model, o=optimizer: loss(m, o)) > 0
    assert_same(*models)


def test_remove_gives_the_gradients_back():
    model = Net()
    optimizer = AdamW(model.parameters())
    handle = register_step_in_backward(optimizer, model)
    train(model, optimizer, 2)
    handle.remove()
    before = copy.deepcopy(model)
    model(torch.ones(2, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_same(model, before)
    optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("name", ["AdamW", "AdamW-keras", "AdamWeightDecay-function", "Adafactor"])
def test_resuming(name):
    """Also from a checkpoint in which a parameter has no state yet."""
    model = Net()
    model.sometimes.requires_grad_(False)
    optimizer = VARIANTS[name](model)
    train(model, optimizer, 2)
    model.sometimes.requires_grad_(True)
    other_model = copy.deepcopy(model)
    other = VARIANTS[name](other_model)
    register_step_in_backward(other, other_model)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, seed=2)
    train(other_model, other, 4, seed=2)
    assert_same(model, other_model)
    assert_same(other.state_dict(), optimizer.state_dict())


def test_distributed_checkpoint_sees_the_state():
    model = Net()
    optimizer = AdamW(model.parameters())
    register_step_in_backward(optimizer, model)
    before = copy.deepcopy(model)
    assert len(dcp.get_optimizer_state_dict(model, optimizer)["state"]) == 5
    train(model, optimizer, 2)
    assert not same(model, before)


def test_a_parameter_thawed_later_is_updated_by_step():
    models = Net(), Net()
    for model, in_backward in zip(models, (False, True)):
        model.sometimes.requires_grad_(False)
        optimizer = AdamW(model.parameters(), convention="keras", weight_decay=0.1)
        if in_backward:
            register_step_in_backward(optimizer, model)
        train(model, optimizer, 2)
        model.sometimes.requires_grad_(True)
        train(model, optimizer, 3)
    assert_same(*models)


def test_losses_with_parameters_of_their_own_may_each_go_backward():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    optimizer = AdamW(model.parameters())
    register_step_in_backward(optimizer, model)
    for layer in model:
        layer(torch.ones(2)).sum().backward()
    optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}


def test_a_weight_used_twice_is_updated_once():
    models = Net(), Net()
    for model, in_backward in zip(models, (False, True)):
        optimizer = AdamW(model.parameters())
        if in_backward:
            register_step_in_backward(optimizer, model)
        hidden = model.sometimes(model.sometimes(model.first(torch.ones(2, 5))))
        model.last(hidden).sum().backward()
        optimizer.step()
        assert {state["step"].item() for state in optimizer.state.values()} == {1.0}
    assert_same(*models)


@pytest.mark.parametrize("name", ["AdamW", "AdamWeightDecay", "Adafactor"])
def test_fsdp2_sums_the_gradients_before(name):
    plain, _ = run(name, "eager", "cpu", in_backward=False)
    with sharded(Net()) as model:
        optimizer = VARIANTS[name](model)
        register_step_in_backward(optimizer, model)
        train(model, optimizer, 6, scheduler_for(name, optimizer))
        assert_same(whole(model), whole(plain))


def refusal(error, sentence):
    return pytest.raises(error, match=sentence)


@pytest.mark.parametrize(
    "cls, option",
    [
        (AdamWeightDecay, {"global_clipnorm": 1.0}),
        (AdamW, {"max_grad_norm": 1.0}),
        (AdamW, {"skip_nonfinite": True}),
        (AdamW, {"skip_grad_norm_above": 1.0}),
        (Lion, {"skip_outliers": 3.0}),
        (Adafactor, {"max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_refuses_what_needs_all_gradients(cls, option):
    model = Net()
    optimizer = cls(model.parameters(), **option)
    ((name, value),) = option.items()
    with refusal(ValueError, f"{name}={value} needs all gradients at once"):
        register_step_in_backward(optimizer, model)
    assert not optimizer.state
    model(torch.ones(2, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refuses_a_second_gradient_before_the_step_and_has_not_applied_it():
    model = Net()
    optimizer = AdamW(model.parameters())
    register_step_in_backward(optimizer, model)
    x = torch.ones(2, 5)
    model(x).sum().backward()
    after_one = copy.deepcopy(model)
    with refusal(RuntimeError, r"last.weight got a second gradient before step\(\)"):
        model(x).sum().backward()
    assert_same(model, after_one)


def test_refuses_a_weight_that_two_checkpointed_parts_share():
    """Reentrant checkpointing goes backward through each part by itself, so the weight's gradient comes in two."""
    model = Net()
    optimizer = AdamW(model.parameters())
    register_step_in_backward(optimizer, model)
    hidden = model.first(torch.ones(2, 5))
    for _ in range(2):
        hidden = checkpoint(model.sometimes, hidden, use_reentrant=True)
    with refusal(RuntimeError, "sometimes.weight got a second gradient|sometimes.bias got a second gradient"):
        model.last(hidden).sum().backward()


def test_refuses_a_grad_scaler():
    model = Net()
    optimizer = AdamW(model.parameters())
    register_step_in_backward(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 5)).sum()).backward()
    with refusal(RuntimeError, "a GradScaler cannot unscale"):
        scaler.step(optimizer)


def test_refuses_what_it_cannot_serve():
    model = Net()
    with refusal(ValueError, "must be one of fusedopt's, got SGD"):
        register_step_in_backward(torch.optim.SGD(model.parameters(), lr=1.0), model)
    with refusal(ValueError, r"a parameter of shape \(8, 5\) of the optimizer is not in the model"):
        register_step_in_backward(Adafactor(model.parameters()), model.last)
    model(torch.ones(2, 5)).sum().backward()
    with refusal(ValueError, "first.weight has a gradient already"):
        register_step_in_backward(AdamW(model.parameters()), model)


def test_refuses_distributed_data_parallel():
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # the rest of a constructor needs processes
    wrapped.module = model
    with refusal(ValueError, "before DistributedDataParallel has summed the gradients"):
        register_step_in_backward(AdamW(model.parameters()), nn.Sequential(wrapped))
