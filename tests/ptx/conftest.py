"""These tests run compiled kernels: in a session of their own, without Triton's interpreter."""

import os

# Before anything imports the kernels; tests/conftest.py may have turned it on.
os.environ.pop("TRITON_INTERPRET", None)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedopt.backends import has_triton

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if not has_triton():
        pytest.exit("tests/ptx is skipped: there is no triton that could compile its kernels", returncode=0)
    elsewhere = [a for a in config.args if HERE not in (path := Path(a.split("::")[0]).resolve(), *path.parents)]
    if elsewhere:
        raise pytest.UsageError(
            f"{elsewhere[0]} belongs to another session than {HERE}, whose kernels are compiled and not interpreted: "
            "run `make test-ptx` or `pytest tests/ptx` alone"
        )


@pytest.fixture(autouse=True)
def memory_is_not_initialised() -> Iterator[None]:
    """`torch.empty` gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
