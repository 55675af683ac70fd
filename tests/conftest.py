"""Where kernels run in the tests: on a GPU where there is one, elsewhere in Triton's interpreter, on CPU tensors."""

import dataclasses
import importlib.util
import os

# Before torch is imported, here and in every process that a test starts: tests run side by side, one per core, and
# threads that wait for each other by spinning make that many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

GPU = torch.cuda.is_available()

if not GPU:
    # Before anything imports triton. Compile-only tests run in processes of their own, without it.
    os.environ["TRITON_INTERPRET"] = "1"


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


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels under test run."""
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


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


def pytest_collection_modifyitems(config, items):
    if GPU:
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
