"""What surrounds a step reaches neither into it nor beyond it: default devices and dtypes."""

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import assert_same
from helpers.surroundings import (
    DEVICE,
    MAKE,
    drawn,
    in_a_thread,
    outcome,
    parameters,
    step,
)
from torch import Tensor

import fusedopt
import fusedopt_kernels
from fusedopt import Adafactor, AdamW, GradientAccumulator
from fusedopt.in_backward import register_step_in_backward
from fusedopt.schedules import SchedulerType, example_arguments, get_scheduler

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
