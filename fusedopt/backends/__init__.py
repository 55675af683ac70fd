"""How a step runs: Triton kernels on a GPU, torch operations elsewhere. Chosen per device."""

import importlib.util
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch

from fusedopt.batch import Batch, Control

BACKENDS = ("auto", "triton", "eager")

Stepper = Callable[[Sequence[Batch], Control], None]
"""One step of one optimizer for the parameters on one device. It keeps what it can reuse at the next step."""


def check(backend: str) -> None:
    """Raises ValueError for a name that is no backend, RuntimeError for one that cannot work on this machine."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton" and not has_triton():
        raise RuntimeError(
            "backend='triton' needs triton 3.4 or newer, which is not installed: pip install 'fusedopt[triton]'"
        )


def has_triton() -> bool:
    """Whether triton is installed, in a version that the kernels run on (older ones than 3.4 have no knobs)."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and bool(spec.origin) and Path(str(spec.origin)).with_name("knobs.py").exists()


def interpreting() -> bool:
    """Whether triton runs its kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose(device: torch.device, backend: str = "auto") -> str:
    """The backend that serves tensors on `device`: "triton" or "eager".

    Raises:
        ValueError: no such backend.
        RuntimeError: "triton" was asked for where it cannot run.

    Example:
        >>> import torch
        >>> from fusedopt import backends
        >>> backends.choose(torch.device("cpu"))
        'eager'
    """
    check(backend)
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton() else "eager"
    if backend == "triton" and device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"backend='triton' cannot update parameters on {device}: it needs CUDA or ROCm tensors; use backend='auto'"
        )
    return backend


def create(rule: str, device: torch.device, backend: str) -> Stepper:
    """A stepper for the parameters of one optimizer on one device."""
    module = import_module(f"fusedopt.backends.{choose(device, backend)}")
    stepper: Stepper = module.STEPPERS[rule](device)
    return stepper
