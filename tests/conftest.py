"""Where kernels run in the tests: on a GPU where there is one, elsewhere in Triton's interpreter, on CPU tensors."""

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


def pytest_collection_modifyitems(config, items):
    if GPU:
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
