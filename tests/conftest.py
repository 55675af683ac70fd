"""Where kernels run in the tests: on a GPU where there is one, elsewhere in Triton's interpreter, on CPU tensors."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, here and in every process that a test starts: tests run side by side, one per core, and
# threads that wait for each other by spinning make that many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.overrides import TorchFunctionMode

GPU = torch.cuda.is_available()

if not GPU:
    # Before anything imports triton. Compile-only tests run in processes of their own, without it.
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore = ["ptx"]  # a session of its own, without the interpreter: `make test-ptx`

if GPU:
    collect_ignore += ["test_fuzz.py", "test_sharding.py"]  # models on the CPU, and processes in the interpreter

if importlib.util.find_spec("triton") is None:  # as on macOS and Windows
    collect_ignore_glob = [
        "compiled_*.py",
        "helpers/kernels.py",
        "test_kernels*.py",
        "test_triton*.py",
        "test_capture.py",
        "test_compile.py",
        "test_gpu.py",
    ]

if importlib.util.find_spec("hypothesis"):  # GPU tests run without it, too
    from hypothesis import HealthCheck, settings

    # The same examples in every run, however slow the machine; other ones are for `make fuzz`.
    settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels under test run."""
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def where_kernels_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, a test of the Triton backend makes its tensors there, unless it says itself where they are."""
    if GPU and "triton" in re.split(r"\W+", request.node.name) and "device" not in request.fixturenames:
        with torch.device("cuda"), DrawnOnTheCpu():
            yield
    else:
        yield


class DrawnOnTheCpu(TorchFunctionMode):
    """Random tensors of a generator of the CPU are made there, and moved to the default device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if generator is None or generator.device.type != "cpu" or "device" in kwargs:
            return func(*args, **(kwargs or {}))
        made = func(*args, **kwargs) if isinstance(args[0], torch.Tensor) else func(*args, **kwargs, device="cpu")
        return made.to(torch.get_default_device())


@pytest.fixture(scope="session", autouse=True)
def no_checks_for_overflow() -> None:
    """The interpreter without its checks for integers that overflow, which take as long as the rest of a kernel."""
    if not GPU and importlib.util.find_spec("triton") is not None:
        from triton.runtime.interpreter import interpreter_builder

        interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)


@pytest.fixture
def checks_for_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter with those checks, in the tests that take all kernels across every border."""
    if not GPU:
        from triton.runtime.interpreter import interpreter_builder

        checked = dataclasses.replace(interpreter_builder.options, sanitize_overflow=True)
        monkeypatch.setattr(interpreter_builder, "options", checked)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch):
    """CUDA graphs without a GPU: a context manager like `torch.cuda.graph`; see `helpers.kernels.captures`."""
    from helpers.kernels import captures

    return captures(monkeypatch)


@pytest.fixture
def one_thread():
    """In the demo's small models threads only wait for each other, the longer the more tests run at the same time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path):
    """Settings of a demo that takes a tenth of a second, with its own text."""
    from helpers.demo import TINY

    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"%d green bottles hanging on the wall; " % (n % 7) for n in range(100)))
    return dataclasses.replace(TINY, text=str(text), out=str(tmp_path / "out"))


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example script by name; files that it writes by default stay in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")

    def load(name, package):
        pytest.importorskip(package, reason=f"{package} is not installed")
        return importlib.import_module(name)

    return load


def takes_long(item: pytest.Item) -> bool:
    """True for what four processes do, and for kernels where the quick half has others like them: those of Adafactor
    and, again, of AdamW for AdamWeightDecay in what is tested for every optimizer, and recorded runs of both backends;
    `test_kernels_adamw.py` and `test_kernels_adafactor.py` have runs of their own.

    Without a GPU the processes share the cores that there are, and the interpreter is slow.
    """
    words = item.callspec.id if hasattr(item, "callspec") else ""
    again = any(name in words for name in ("Adafactor", "AdamWeightDecay")) or item.name.startswith("test_golden[")
    return "of_four_processes" in item.fixturenames or ("triton" in words and again)


def pytest_collection_modifyitems(config, items):
    if GPU:
        return
    for item in filter(takes_long, items):
        item.add_marker(pytest.mark.slow)
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
