"""torch.compile around a model, a step, or both: the numbers of the plain run, or one sentence that says why not."""

import inspect
import pickle

import pytest
import torch
from helpers.comparing import assert_same
from helpers.loops import Net, train
from helpers.optimizers import BACKENDS, VARIANTS

from fusedopt import AdamW, register_step_in_backward
from fusedopt.optimizer import compile

# Traces and checks everything that inductor gets, without the minute that a C++ compiler needs.
COMPILER = "aot_eager"


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain(name, backend, device, steps=3):
    model = Net().to(device)
    optimizer = VARIANTS[name](model, backend=backend)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "AdamWeightDecay-function", "Adafactor"])
def test_a_compiled_model(name):
    model, _ = plain(name, "eager", "cpu")
    compiled = torch.compile(Net(), backend=COMPILER)
    other = VARIANTS[name](compiled, backend="eager")
    train(compiled, other, 3)
    assert_same(model, compiled)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW-tensor_lr", "AdamWeightDecay-function", "Adafactor"])
def test_a_compiled_training_step(name, backend, device):
    """Rates and step counts change from step to step; nothing of them may be frozen into a graph."""
    model, optimizer = plain(name, backend, device)
    other_model = Net().to(device)
    other = VARIANTS[name](other_model, backend=backend)

    @torch.compile(backend=COMPILER)
    def step(x, skip):
        other_model(x, skip=skip).float().square().mean().backward()
        other.step()
        other.zero_grad()

    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        step(torch.randn(4, 5, generator=generator).to(device), skip=number % 3 == 2)
    assert_same(model, other_model)
    assert_same(optimizer.state_dict(), other.state_dict())


def test_a_compiled_step_method_and_a_scheduler():
    models = Net(), Net()
    for model, compiled in zip(models, (False, True)):
        optimizer = AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        step = torch.compile(optimizer.step, backend=COMPILER) if compiled else optimizer.step
        for _ in range(3):
            model(torch.ones(2, 5)).square().sum().backward()
            step()
            scheduler.step()
            optimizer.zero_grad()
    assert_same(*models)


def test_a_closure_in_a_compiled_step():
    models = Net(), Net()
    for model, compiled in zip(models, (False, True)):
        optimizer = AdamW(model.parameters(), lr=0.1)
        inner = torch.compile(model, backend=COMPILER) if compiled else model

        def closure(inner=inner, optimizer=optimizer):
            optimizer.zero_grad()
            loss = inner(torch.ones(2, 5)).square().sum()
            loss.backward()
            return loss

        step = torch.compile(optimizer.step, backend=COMPILER) if compiled else optimizer.step
        losses = [step(closure).item() for _ in range(3)]
        assert losses[2] < losses[0]
    assert_same(*models)


def test_given_gradients_in_a_compiled_function():
    models = Net(), Net()
    for model, compiled in zip(models, (False, True)):
        optimizer = AdamW(model.parameters(), lr=0.1)

        def step(scale, model=model, optimizer=optimizer):
            optimizer.apply_gradients([(torch.ones_like(p) * scale, p) for p in model.parameters()])

        for scale in (1.0, -2.0, 3.0):
            (torch.compile(step, backend=COMPILER) if compiled else step)(torch.tensor(scale))
    assert_same(*models)


def test_a_whole_graph_is_refused_with_the_reason_and_nothing_is_changed():
    model = Net()
    optimizer = AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    @torch.compile(backend=COMPILER, fullgraph=True)
    def step():
        optimizer.step()

    with pytest.raises(torch._dynamo.exc.Unsupported) as refusal:
        step()
    if "reason" in inspect.signature(torch.compiler.disable).parameters:  # torch 2.7 has none
        assert "a fusedopt step is fused already" in str(refusal.value) and "without fullgraph" in str(refusal.value)
    assert_same(model, Net())
    assert not optimizer.state


def test_copies_stay_out_of_graphs_too(monkeypatch):
    """Where an optimizer was unpickled, in a process that made no other, no constructor ran."""
    optimizer = AdamW(Net().parameters())
    kept = []
    monkeypatch.setattr(compile, "exclude_step", kept.append)
    pickle.loads(pickle.dumps(optimizer))
    assert kept == [AdamW]


def test_hooks_stay_out_of_graphs_too():
    model = Net()
    optimizer = AdamW(model.parameters())
    compiling = []
    optimizer.register_step_pre_hook(lambda *_: compiling.append(torch.compiler.is_compiling()))
    torch.compile(optimizer.step, backend=COMPILER)()
    assert compiling == [False]


@pytest.mark.slow
@pytest.mark.parametrize("autograd", [False, True], ids=["compiled_model", "compiled_backward"])
def test_a_step_in_the_backward_of_a_compiled_model(autograd):
    model, _ = plain("AdamW", "eager", "cpu")
    other_model = Net()
    other = VARIANTS["AdamW"](other_model, backend="eager")
    register_step_in_backward(other, other_model)
    with torch._dynamo.config.patch(compiled_autograd=autograd):
        compiled = torch.compile(other_model, backend=COMPILER)
        train(compiled, other, 3)
    assert_same(model, other_model)
