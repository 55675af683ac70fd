"""What surrounds a step reaches neither into it nor beyond it: defaults, modes, parameters without data."""

import ast
import copy
import gc
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import assert_same
from helpers.optimizers import OPTIMIZERS, VARIANTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedopt
import fusedopt_kernels
from fusedopt import Adafactor, AdamW, GradientAccumulator
from fusedopt.backends import scratch
from fusedopt.backends.triton import capture
from fusedopt.in_backward import register_step_in_backward
from fusedopt.schedules import SchedulerType, example_arguments, get_scheduler
from fusedopt.schedules.metric import ReduceLROnPlateau

GUARD = {"max_grad_norm": 0.5, "skip_nonfinite": True, "skip_grad_norm_above": 1e6, "skip_outliers": 6.0}
MAKE: dict[str, Callable[..., Any]] = {
    **OPTIMIZERS,
    "AdamW guarded": partial(OPTIMIZERS["AdamW"], amsgrad=True, **GUARD),
    "Adafactor guarded": partial(OPTIMIZERS["Adafactor"], **GUARD),
    **{name: VARIANTS[name] for name in ("AdamWeightDecay-clipnorm", "Adafactor-lr-beta1")},
}
every_optimizer = pytest.mark.parametrize("name", MAKE)
both_backends = pytest.mark.parametrize("backend", ["eager", "triton"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    backend: ((4, 3), (7,), large, (2, 3, 5), (), (0, 3))
    # Eagerly, what is larger than 2^15 elements goes another way; the interpreter takes as long as there are elements.
    for backend, large in {"eager": (190, 200), "triton": (40, 30)}.items()
}


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(DEVICE, dtype)


def parameters(backend: str = "eager", dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(drawn(seed, shape, dtype)) for seed, shape in enumerate(SHAPES[backend])]


def step(optimizer: Any, number: int, dtype: torch.dtype = torch.float32) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed, p in enumerate(params):
        p.grad = drawn(100 * number + seed, tuple(p.shape), dtype)
    optimizer.step()


def outcome(optimizer: Any) -> list[Tensor]:
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return params + [t for state in optimizer.state.values() for t in state.values()]


def in_a_thread(work: Callable[[], Any]) -> Any:
    """The result of `work` in a new thread, whose scratch memory is new."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


# Default device and default dtype.

# What takes a device and a dtype from torch's defaults, unless it is told. `torch.frombuffer` takes no device.
FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
)
MODULES = ("Embedding", "LayerNorm", "Linear")


def factory_calls(source: Path) -> Iterator[ast.Call]:
    wanted = {*(f"torch.{name}" for name in FACTORIES), *(f"nn.{name}" for name in MODULES)}
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in wanted:
            yield node


def test_every_tensor_that_is_made_from_numbers_says_its_device_and_its_dtype():
    """By name in the call, or by `**`. Calls such as `zeros_like` and `new_zeros` inherit both, and are not asked."""
    found = 0
    for package in (fusedopt, fusedopt_kernels):
        for source in Path(str(package.__file__)).parent.rglob("*.py"):
            for call in factory_calls(source):
                found += 1
                said = {keyword.arg for keyword in call.keywords}
                assert said >= {"device", "dtype"} or None in said, f"{source}:{call.lineno}: {ast.unparse(call)}"
    assert found > 15


@contextmanager
def foreign(default: str | torch.dtype) -> Iterator[None]:
    """Defaults that are not those of any tensor here; on "meta" tensors vanish."""
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


DEFAULTS = ("meta", torch.float64, torch.bfloat16, torch.float16)


def steps_and_checkpoint(name: str, backend: str) -> list[Any]:
    optimizer = MAKE[name](parameters(backend), backend=backend)
    step(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    resumed = MAKE[name](parameters(backend), backend=backend)
    resumed.load_state_dict(saved)
    (group,) = optimizer.param_groups
    optimizer.apply_gradients([(drawn(9, tuple(p.shape)), p) for p in group["params"]], scale=0.5)
    norm = [] if optimizer.grad_norm is None else [optimizer.grad_norm, optimizer.skipped_steps]
    rate = [optimizer.effective_lr(group["params"][0])] if isinstance(optimizer, Adafactor) else []
    return [*outcome(optimizer), *outcome(resumed), *norm, *rate]


def sums_of_gradients(backend: str) -> list[Any]:
    accumulator = GradientAccumulator(torch.float32, backend=backend)
    for seed, weight in ((1, 1.0), (2, 3.0)):
        accumulator([drawn(seed, (5, 3), torch.bfloat16), None], weight)
    return [accumulator.gradients[0], accumulator.scale]


def steps_in_backward(name: str, backend: str) -> list[Any]:
    model = torch.nn.Linear(6, 4, dtype=torch.float32, device=DEVICE)
    with torch.no_grad():
        model.weight.copy_(drawn(0, (4, 6)))
        model.bias.copy_(drawn(1, (4,)))
    optimizer = MAKE[name](model.parameters(), backend=backend)
    register_step_in_backward(optimizer, model)
    for seed in (2, 3):
        model(drawn(seed, (3, 6))).square().sum().backward()
        optimizer.step()
    return outcome(optimizer)


def rates_of_schedules() -> list[Any]:
    rates: list[Any] = []
    for kind in SchedulerType:
        for lr in (0.5, torch.tensor(0.5, dtype=torch.float64, device="cpu")):
            optimizer = AdamW([torch.nn.Parameter(drawn(0, (2,)))], lr=lr)
            scheduler = get_scheduler(kind, optimizer, 2, 10, example_arguments(kind, 10, 0.5))
            recorder = fusedopt.LRRecorder(optimizer)
            for number in range(4):
                step(optimizer, number)
                scheduler.step(*([1.0] if kind.value in ("greedy", "reduce_lr_on_plateau") else []))
            rates += [*recorder.rates.ravel().tolist(), float(optimizer.param_groups[0]["lr"])]
            schedule = getattr(scheduler, "lr_lambdas", [None])[0]
            if schedule is not None:
                rates.append(schedule(torch.arange(12, dtype=torch.int64, device="cpu")))
                rates.append(fusedopt.verify_schedule(recorder, schedule).finding)
    return rates


def references() -> list[Any]:
    from fusedopt import reference

    made: list[Any] = []
    for cls in (reference.ReferenceAdamW, reference.ReferenceAdafactor):
        optimizer = cls(parameters()[:4])
        for number in (1, 2):
            step(optimizer, number)
        made += [p.detach() for p in optimizer.param_groups[0]["params"]]
    return made


def demo_model_and_text() -> list[Any]:
    from fusedopt.demo.model import GPT
    from fusedopt.demo.text import Text

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(layers=1, width=8, context=16)
    text = Text(bytes(range(256)) * 4, context=16)
    batch = text.batch(3, torch.Generator("cpu").manual_seed(1))
    loss = model.loss(*batch)
    loss.backward()
    return [loss.detach(), *batch, *text.held_out(2), *(p.grad for p in model.parameters())]


def pictures() -> list[Any]:
    pytest.importorskip("matplotlib")
    from fusedopt.schedules.plotting import plot_schedule

    axes = plot_schedule(["linear", "greedy", "reduce_lr_on_plateau"], 20, num_warmup_steps=2, num_training_steps=20)
    axes = getattr(axes, "axes", axes)
    lines = [line for ax in (axes if isinstance(axes, (list, tuple)) else [axes]) for line in ax.get_lines()]
    return [number for line in lines for number in map(float, line.get_ydata())]


ENTRIES: dict[str, Callable[[], list[Any]]] = {
    **{f"{n}, {b}": lambda n=n, b=b: steps_and_checkpoint(n, b) for n in MAKE for b in ("eager", "triton")},
    **{
        f"{n} in backward, {b}": lambda n=n, b=b: steps_in_backward(n, b)
        for n in ("AdamW", "Adafactor")
        for b in ("eager", "triton")
    },
    "accumulator, eager": lambda: sums_of_gradients("eager"),
    "accumulator, triton": lambda: sums_of_gradients("triton"),
    "schedules": rates_of_schedules,
    "references": references,
    "demo": demo_model_and_text,
    "plots": pictures,
}


@cache
def usual(entry: str) -> list[Any]:
    return in_a_thread(ENTRIES[entry])


def is_slow(entry: str, default: str | torch.dtype) -> bool:
    """True but for a device and a dtype; where the interpreter runs, but for the device."""
    return default != "meta" and (default is not torch.bfloat16 or entry.endswith("triton"))


@pytest.mark.parametrize(
    "entry, default",
    [
        pytest.param(
            entry,
            default,
            id=f"{entry}-{str(default).removeprefix('torch.')}",
            marks=[pytest.mark.slow] * is_slow(entry, default),
        )
        for entry in ENTRIES
        for default in DEFAULTS
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_another_default_device_or_dtype_changes_no_bit(entry, default):
    def under_it() -> list[Any]:
        with foreign(default):
            return ENTRIES[entry]()

    assert_same(in_a_thread(under_it), usual(entry))


def test_pinned_memory_is_asked_for_on_the_host_whatever_the_default_device(monkeypatch):
    asked = []
    empty = torch.empty

    def noted(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append((pin_memory, options["device"]))
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", noted)
    from fusedopt_kernels.memory import lasting

    lasting((3,), torch.int64, "cpu", pinned=True)
    with pytest.raises((RuntimeError, AssertionError)) if not torch.cuda.is_available() else foreign("meta"):
        fusedopt_kernels.table.upload(fusedopt_kernels.table.np.zeros(3, "int64"), torch.device("cuda"))
    assert asked[:2] == [(True, "cpu"), (True, "cpu")]


# Modes.


def reachable(*roots: Any) -> list[Tensor]:
    """All tensors that are kept by these objects."""
    seen: set[int] = set()
    found, todo = [], list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (types.ModuleType, type, types.FunctionType)):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
        else:
            todo.extend(gc.get_referents(one))
    return found


@every_optimizer
@both_backends
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_steps_in_inference_mode_and_outside_of_it_follow_each_other(name, backend, dtype):
    def run(modes: list[bool]) -> list[Tensor]:
        optimizer = MAKE[name](parameters(backend, dtype), backend=backend)
        for number, mode in enumerate(modes):
            with torch.inference_mode(mode):
                step(optimizer, number, dtype)
        if modes[0]:
            optimizer.zero_grad()
            kept = reachable(optimizer.__dict__, scratch.scratch._flat, capture._reserves)
            assert kept and not any(t.is_inference() for t in kept)
        return outcome(optimizer)

    assert_same(in_a_thread(lambda: run([True, False, True, False])), in_a_thread(lambda: run([False] * 4)))


@both_backends
def test_sums_that_began_in_inference_mode_go_on_outside_of_it(backend):
    accumulator = GradientAccumulator(backend=backend)
    for mode in (True, False):
        with torch.inference_mode(mode):
            accumulator([torch.ones(3, device=DEVICE)])
    assert accumulator.gradients[0].tolist() == [2.0] * 3


@both_backends
def test_a_state_loaded_in_inference_mode_can_be_updated_outside_of_it(backend):
    optimizer = AdamW(parameters(backend), backend=backend)
    step(optimizer, 1)
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, 2)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@every_optimizer
@both_backends
def test_parameters_made_in_inference_mode_are_updated_there_and_refused_elsewhere(name, backend):
    with torch.inference_mode():
        optimizer = MAKE[name](parameters(backend), backend=backend)
        step(optimizer, 1)
    expected = MAKE[name](parameters(backend), backend=backend)
    step(expected, 1)
    assert_same(outcome(optimizer), outcome(expected))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was made in torch"):
            step(optimizer, 2)
    assert_same(outcome(optimizer), outcome(expected))


def test_scratch_memory_made_under_a_mode_of_fake_tensors_is_not_kept():
    def work() -> list[Tensor]:
        with FakeTensorMode():
            scratch.scratch.like(torch.empty(3, dtype=torch.float32, device="cpu"), "gradient", torch.float32)
        assert not scratch.scratch._flat
        optimizer = AdamW(parameters(dtype=torch.bfloat16), lr=0.1, max_grad_norm=0.1, backend="eager")
        step(optimizer, 1, torch.bfloat16)
        return outcome(optimizer)

    expected = AdamW(parameters(dtype=torch.bfloat16), lr=0.1, max_grad_norm=0.1, backend="eager")
    step(expected, 1, torch.bfloat16)
    assert_same(in_a_thread(work), outcome(expected))


def test_a_launch_table_that_could_not_be_copied_is_copied_at_the_next_step():
    from fusedopt_kernels.table import LaunchTable, np, upload

    failing = [True]

    def copied(host: Any, device: torch.device) -> Tensor:
        if failing.pop():
            raise torch.OutOfMemoryError("no memory")
        return upload(host, device)

    failing = [False, True]
    table = LaunchTable(torch.device(DEVICE), copied)
    rows, hyper = np.ones((1, 2), np.int64), np.full((1, 2), 7, np.int64)
    with pytest.raises(torch.OutOfMemoryError):
        table.update(rows, hyper)
    table.update(rows, hyper)
    assert table.hyper.tolist() == [[7, 7]]


# Parameters without data.


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


# Numbers that are tensors.

LR_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", LR_DTYPES, ids=str)
@both_backends
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_in_a_tensor_is_the_number_that_it_holds_whatever_its_dtype(name, backend, dtype):
    lr = torch.tensor(3e-3, dtype=dtype)
    row = OPTIMIZERS[name]
    options = {"relative_step": False} if row.cls is Adafactor else {}
    updated = []
    for rate in (lr, lr.item()):
        optimizer = row(parameters(backend), **{row.rate: rate}, backend=backend, **options)
        for number in range(3):
            step(optimizer, number)
        shown = [optimizer.effective_lr(p) for p in optimizer.param_groups[0]["params"]] if options else []
        updated.append([*outcome(optimizer), *shown])
    assert_same(*updated)


@pytest.mark.parametrize("dtype", LR_DTYPES, ids=str)
def test_a_plateau_reduces_a_rate_in_a_tensor_as_it_would_the_number(dtype):
    lr = torch.tensor(0.3, dtype=dtype)
    rates = []
    for rate in (lr, lr.item()):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.7, patience=0, min_lr=1e-4)
        for loss in (2.0, 2.0):
            scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0].dtype is dtype
    assert rates[0].item() == torch.tensor(rates[1], dtype=torch.float64).to(dtype).item()
