"""Out of memory at any allocation: the error arrives as it is, and nothing has changed, or the next step goes on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.comparing import assert_same
from helpers.loops import Net
from helpers.memory import Allocations
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS, VARIANTS
from torch import Tensor, nn

from fusedopt import GradientAccumulator, register_step_in_backward

# An optimizer, more options, and the dtype of its parameters.
KINDS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    **{name: (name, {}, torch.float32) for name in VARIANTS},
    "AdamW-16 bits": ("AdamW", {}, torch.bfloat16),
    **{
        f"{name}-{option}": (name, {option: True}, torch.bfloat16)
        for name in ("AdamW", "Adafactor-lr-beta1", "Lion")
        for option in ("master_weights", "stochastic_rounding")
    },
    "AdamW-float16": ("AdamW", {"master_weights": True}, torch.float16),
    "AdamW-state_dtype": ("AdamW", {"state_dtype": torch.bfloat16}, torch.float32),
    "AdamW-skips": ("AdamW", {"skip_outliers": 3.0, "max_grad_norm": 0.1}, torch.float32),
    "Lion-clipped": ("Lion", {"max_grad_norm": 0.1}, torch.bfloat16),
    "AdamWeightDecay-measured": ("AdamWeightDecay-clipnorm", {"track_statistics": True}, torch.float32),
    "AdamW-measured": ("AdamW", {"track_statistics": True}, torch.bfloat16),
}

QUICK = ("AdamW", "AdamW-master_weights", "Lion", "AdamW-skips")
ROWS = [
    pytest.param(kind, backend, id=f"{kind}-{backend}", marks=marks)
    for kind in KINDS
    for backend, needed in (("eager", []), ("triton", [NEEDS_TRITON]))
    if backend == "eager" or kind in (*QUICK, "AdamW-measured", "Adafactor-lr-beta1-stochastic_rounding")
    for marks in [[*needed, *([] if kind in QUICK and backend == "eager" else [pytest.mark.slow])]]
]


class Odd(nn.Module):
    """Parameters that take every way through the eager backend: large, strided, a vector of many elements."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.large = nn.Parameter(torch.randn(200, 300, generator=generator))
        self.long = nn.Parameter(torch.randn(40_000, generator=generator))
        self.turned = nn.Parameter(torch.randn(4, 6, generator=generator).T)
        self.small = nn.Parameter(torch.randn(3, 5, generator=generator))


def made(kind: str, backend: str, model: nn.Module | None = None, steps: int = 1) -> tuple[nn.Module, Any]:
    name, options, dtype = KINDS[kind]
    model = (Net() if model is None else model).to(dtype)
    optimizer = VARIANTS[name](model, **{"backend": backend, **options})
    for number in range(steps):
        give_gradients(model, number)
        optimizer.step()
    give_gradients(model, steps)
    return model, optimizer


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def outcome(model: nn.Module, optimizer: Any) -> Any:
    """All that a step changes."""
    saved = copy.deepcopy(optimizer.state_dict())
    return [p.detach().clone() for p in model.parameters()], saved, norm_of(optimizer), skipped_of(optimizer)


def norm_of(optimizer: Any) -> Tensor | None:
    return None if optimizer.grad_norm is None else optimizer.grad_norm.clone()


def skipped_of(optimizer: Any) -> Any:
    return None if optimizer.skipped_steps is None else optimizer.skipped_steps.tensor.clone()


def fail_everywhere(prepare: Callable[[], tuple[Any, Callable[[], object]]], check: Callable[..., None]) -> int:
    """Lets an operation run out of memory at its first allocation, its second one, and so on; returns how many it has.

    Args:
        prepare: returns what is operated on, and the operation.
        check: gets both, and the error, after each failure.
    """
    number = 0
    while True:
        subject, operation = prepare()
        with Allocations(number) as allocations:
            try:
                operation()
            except torch.OutOfMemoryError as error:
                caught = error
            else:
                assert allocations.number <= number
                return number
        try:
            check(subject, operation, caught)
        except Exception as error:
            error.add_note(f"the failing allocation: number {number}, {caught}")
            raise
        number += 1


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize(("kind", "backend"), ROWS)
def test_a_step(kind, backend, first):
    check_steps(kind, backend, Net, steps=0 if first else 1)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_a_step_of_parameters_that_are_updated_in_pieces(kind):
    check_steps(kind, "eager", Odd, steps=1)


def check_steps(kind: str, backend: str, make_model: Callable[[], nn.Module], steps: int) -> None:
    straight, of_straight = made(kind, backend, make_model(), steps)
    before = outcome(straight, of_straight)
    of_straight.step()
    after = outcome(straight, of_straight)
    give_gradients(straight, 9)
    of_straight.step()
    later = outcome(straight, of_straight)
    counts = {"as before": 0, "unfinished": 0}

    def prepare() -> tuple[Any, Callable[[], object]]:
        model, optimizer = made(kind, backend, make_model(), steps)
        return (model, optimizer), optimizer.step

    def check(subject: Any, step: Callable[[], object], error: Exception) -> None:
        model, optimizer = subject
        if optimizer._engine.unfinished is None:
            counts["as before"] += 1
            assert not hasattr(error, "__notes__")
            if kind != "AdamWeightDecay-function":  # Its rate is that of the coming step.
                assert_same(outcome(model, optimizer), before)
        else:
            counts["unfinished"] += 1
            assert "Call step() again" in error.__notes__[0]
        # A retried step, or one with other gradients, which then is one of its own.
        if (counts["as before"] + counts["unfinished"]) % 2 or optimizer._engine.unfinished is None:
            step()
            assert_same(outcome(model, optimizer), after)
            give_gradients(model, 9)
        else:
            give_gradients(model, 9)
        step()
        assert_same(outcome(model, optimizer), later)

    number = fail_everywhere(prepare, check)
    assert number == sum(counts.values())
    if backend == "triton":
        assert counts["unfinished"] == 0 and number > 0
    print(kind, backend, make_model.__name__, steps, number, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_load(kind):
    saved = copy.deepcopy(made(kind, "eager", steps=2)[1].state_dict())

    def prepare() -> tuple[Any, Callable[[], object]]:
        model, optimizer = made(kind, "eager", steps=1)
        parts = outcome(model, optimizer), list(optimizer.param_groups), dict(optimizer.state)
        return (model, optimizer, *parts), lambda: optimizer.load_state_dict(saved)

    def check(subject: Any, load: Callable[[], object], error: Exception) -> None:
        model, optimizer, before, groups, states = subject
        assert_same(outcome(model, optimizer), before)
        assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
        assert optimizer.state == states or all(optimizer.state[p] is state for p, state in states.items())
        load()
        if not optimizer.guard.skip_outliers:  # Its skipped steps are those of this process.
            assert_same(optimizer.state_dict(), saved)

    assert fail_everywhere(prepare, check) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint(kind):
    def prepare() -> tuple[Any, Callable[[], object]]:
        model, optimizer = made(kind, "eager")
        return (model, optimizer, outcome(model, optimizer)), optimizer.state_dict

    def check(subject: Any, save: Callable[[], object], error: Exception) -> None:
        model, optimizer, before = subject
        assert_same(outcome(model, optimizer), before)

    assert fail_everywhere(prepare, check) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_that_are_made_before_the_first_step(name):
    options = {"stochastic_rounding": True}

    def prepare() -> tuple[Any, Callable[[], object]]:
        optimizer = OPTIMIZERS[name](Net().bfloat16(), **options)
        return optimizer, optimizer.init_state

    def check(optimizer: Any, init: Callable[[], object], error: Exception) -> None:
        assert not optimizer.state
        init()
        reference = OPTIMIZERS[name](Net().bfloat16(), **options)
        reference.init_state()
        assert_same(optimizer.state_dict(), reference.state_dict())

    assert fail_everywhere(prepare, check) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_that_is_added(name):
    def prepare() -> tuple[Any, Callable[[], object]]:
        rate = torch.tensor(0.01) if name != "Adafactor" else None
        options = {} if rate is None else {OPTIMIZERS[name].rate: rate}
        optimizer = OPTIMIZERS[name](Net(), **options)
        group = {"params": [nn.Parameter(torch.ones(2, 3))]}
        if OPTIMIZERS[name].of_names:
            group = {"params": [("new", group["params"][0])]}
        return (optimizer, len(optimizer.param_groups)), lambda: optimizer.add_param_group(group)

    def check(subject: Any, add: Callable[[], object], error: Exception) -> None:
        optimizer, groups = subject
        assert len(optimizer.param_groups) == groups
        add()
        assert len(optimizer.param_groups) == groups + 1

    fail_everywhere(prepare, check)


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_capture(name, device, capture):
    def prepare() -> tuple[Any, Callable[[], object]]:
        model, optimizer = made(name, "triton")

        def captured() -> None:
            with capture():
                optimizer.step()

        return (model, optimizer, outcome(model, optimizer)), captured

    def check(subject: Any, captured: Callable[[], object], error: Exception) -> None:
        model, optimizer, before = subject
        assert_same(outcome(model, optimizer), before)
        captured()

    assert fail_everywhere(prepare, check) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_accumulator(backend):
    def prepare() -> tuple[Any, Callable[[], object]]:
        accumulator = GradientAccumulator(backend=backend)
        params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
        for p in params:
            p.grad = torch.full_like(p, 2.0)
        accumulator.accumulate(params)
        for p in params:
            p.grad = torch.full_like(p, 3.0)
        return (accumulator, params), lambda: accumulator.accumulate(params, weight=2.0)

    def check(subject: Any, accumulate: Callable[[], object], error: Exception) -> None:
        accumulator, _ = subject
        assert accumulator.step == 1 and accumulator.weight == 1.0
        assert [g.flatten()[0].item() for g in accumulator.gradients] == [2.0, 2.0]
        accumulate()
        assert [g.flatten()[0].item() for g in accumulator.gradients] == [8.0, 8.0]

    fail_everywhere(prepare, check)


@pytest.mark.parametrize("params_known", [False, True], ids=["by calls", "of parameters"])
def test_a_step_of_accumulated_gradients_is_tried_again(monkeypatch, params_known):
    """The accumulator shows the same tensors again, also where no gradient came: that step, not another one."""

    def taken(fails: bool) -> tuple[Tensor, ...]:
        params = [nn.Parameter(torch.ones(1 << 10, 1 << 12)), nn.Parameter(torch.ones(3))]
        optimizer = VARIANTS["AdamW"](params, backend="eager", max_grad_norm=0.1)
        accumulator = GradientAccumulator(backend="eager")

        def give(grads: list[Tensor | None]) -> None:
            if not params_known:
                accumulator(grads)
                return
            for p, g in zip(params, grads):
                p.grad = g
            accumulator.accumulate(params)

        def step() -> None:
            optimizer.apply_gradients(zip(accumulator.gradients, params), scale=accumulator.scale)

        give([torch.ones_like(p) for p in params])
        step()
        accumulator.reset()
        give([torch.full_like(params[0], 2.0), None])
        if fails:
            with monkeypatch.context() as patch:
                Fails(patch, torch.OutOfMemoryError("planted"), written=False)
                with pytest.raises(torch.OutOfMemoryError):
                    step()
            assert optimizer._engine.unfinished is not None
        step()
        return (*[p.detach() for p in params], *[state["step"] for state in optimizer.state.values()])

    assert_same(taken(fails=True), taken(fails=False))


@NEEDS_TRITON
@pytest.mark.parametrize("measured", [False, True], ids=["plain", "measured"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_launches_take_no_memory(monkeypatch, name, measured):
    """All that they need is there when the first one is queued."""
    from fusedopt.backends.triton.stepper import TritonStepper

    launch, taken = TritonStepper._launch, []

    def counted(*args: Any) -> None:
        with Allocations() as allocations:
            launch(*args)
        taken.append(allocations.number)

    monkeypatch.setattr(TritonStepper, "_launch", counted)
    model = Net()
    optimizer = OPTIMIZERS[name](model, backend="triton", track_statistics=measured)
    for number in range(2):
        give_gradients(model, number)
        optimizer.step()
    assert taken == [0, 0]


def test_a_checkpoint_drops_a_step_that_was_not_finished():
    model, optimizer = made("AdamW-master_weights", "eager")
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in model.parameters()]
    number = 0
    while optimizer._engine.unfinished is None:
        with Allocations(number), pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        number += 1
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, before in zip(model.parameters(), weights):
            p.copy_(before)
    optimizer.step()
    straight, of_straight = made("AdamW-master_weights", "eager")
    of_straight.step()
    assert_same(outcome(model, optimizer)[:2], outcome(straight, of_straight)[:2])


def test_the_helper_sees_what_takes_memory_and_what_does_not():
    t = torch.ones(4)
    with Allocations() as allocations:
        t.add_(1).view(2, 2)[0].mul_(2)
        torch.add(t, 1, out=t)
        torch.empty(0)
    assert allocations.number == 0
    with Allocations() as allocations:
        (t + 1).clone().to(torch.float64)
    assert allocations.number == 3


class Fails:
    """Lets torch's fused kernel end its second call of a step with an error, before or after it has written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, written: bool) -> None:
        real, self.calls = torch._fused_adamw_, 0

        def kernel(*args: Any, **options: Any) -> None:
            self.calls += 1
            if self.calls == 2 and not written:
                raise error
            real(*args, **options)
            if self.calls == 2:
                raise error

        monkeypatch.setattr(torch, "_fused_adamw_", kernel)


def halfway(monkeypatch: pytest.MonkeyPatch, error: BaseException, written: bool) -> tuple[nn.Module, Any]:
    """An optimizer whose second step has ended after a part of the first parameter."""
    model = nn.Linear(1 << 11, 1 << 11, bias=False)
    optimizer = VARIANTS["AdamW"](model, backend="eager", max_grad_norm=0.1)
    give_gradients(model, 0)
    optimizer.step()
    give_gradients(model, 1)
    with monkeypatch.context() as patch:
        Fails(patch, error, written)
        with pytest.raises(type(error)) as caught:
            optimizer.step()
    assert caught.value.__notes__
    return model, optimizer


def replace_state(model: Any, optimizer: Any) -> None:
    optimizer.state[model.weight]["exp_avg"] = optimizer.state[model.weight]["exp_avg"].clone()


def replace_all_states(model: Any, optimizer: Any) -> None:
    optimizer.state[model.weight] = {name: t.clone() for name, t in optimizer.state[model.weight].items()}


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "gradient": lambda model, _: model.weight.grad.mul_(2.0),
    "gradient elsewhere": lambda model, _: setattr(model.weight.grad, "data", model.weight.grad.clone()),
    "parameter": lambda model, _: model.weight.detach().mul_(2.0),
    "parameter elsewhere": lambda model, _: setattr(model.weight, "data", model.weight.data.clone()),
    "state": lambda model, optimizer: optimizer.state[model.weight]["exp_avg_sq"].zero_(),
    "state elsewhere": replace_state,
    "all states elsewhere": replace_all_states,
    "no state": lambda model, optimizer: optimizer.state.clear(),
}
"""What may be done between an error and another try."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_whose_tensors_have_changed_is_not_gone_on_with(monkeypatch, change):
    model, optimizer = halfway(monkeypatch, torch.OutOfMemoryError("planted"), written=False)
    CHANGES[change](model, optimizer)
    before = model.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match="ran out of memory halfway, its gradients, parameters or states have changed"
    ):
        optimizer.step()
    assert_same(model.weight, before)


def test_ctrl_c_between_two_parts_does_none_of_them_twice(monkeypatch):
    """It may come when a part has written: the rest is left undone, and the note says so."""
    model, optimizer = halfway(monkeypatch, KeyboardInterrupt(), written=True)
    assert optimizer._engine.unfinished is None
    before = model.weight.detach().clone()
    model.weight.grad.zero_()
    optimizer.step()
    assert (model.weight - before).abs().max() < 2 * 0.1


def test_a_step_in_backward_is_not_gone_on_with(monkeypatch):
    """Its hooks have no call that could: a load begins anew."""
    model = nn.Linear(1 << 11, 1 << 11, bias=False)
    optimizer = VARIANTS["AdamW"](model, backend="eager", master_weights=False)
    saved, weight = copy.deepcopy(optimizer.state_dict()), model.weight.detach().clone()
    handle = register_step_in_backward(optimizer, model)
    with monkeypatch.context() as patch:
        Fails(patch, torch.OutOfMemoryError("planted"), written=True).calls = 1
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            model(torch.ones(1 << 11)).sum().backward()
    assert all(engine.unfinished is None for engine in handle._engines.values())
    with torch.no_grad():
        model.weight.copy_(weight)
    model.weight.grad = None
    optimizer.load_state_dict(saved)
    model(torch.ones(1 << 11)).sum().backward()
    optimizer.step()
    moved = (model.weight - weight).abs()
    assert moved.max() < 1.5 * moved.min()
