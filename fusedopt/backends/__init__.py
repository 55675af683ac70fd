"""How a step runs: Triton kernels on a GPU, torch operations elsewhere. Chosen per device."""

import re
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from fusedopt.interface import ParamSet, StepArgs
from fusedopt.warn import warn_once

BACKENDS = ("auto", "triton", "eager")

Stepper = Callable[[Sequence[ParamSet], StepArgs], None]
"""One step of one optimizer for the parameters on one device. It keeps what it can reuse at the next step."""


def check(backend: str) -> None:
    """Raises ValueError for an unknown backend, RuntimeError for one that cannot work on this machine."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton" and not has_triton():
        raise RuntimeError(f"backend='triton' cannot work: {_what_is_missing()}")


OLDEST_TRITON = (3, 6)
"""The oldest version that the tests were run with."""


def triton_version() -> str | None:
    """The version of triton that is installed, None for none."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def has_triton() -> bool:
    """True if triton is installed, in a version that the kernels run on."""
    return release(triton_version() or "0.0") >= OLDEST_TRITON


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version, which compare as numbers: 3.10 is newer than 3.9.

    Example:
        >>> release("3.10.0+git1a2b") > release("3.9.1")
        True
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _what_is_missing() -> str:
    installed = triton_version()
    found = "no triton is installed" if installed is None else f"triton {installed} is installed"
    return (
        f"{found}, and the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer: "
        "pip install -U torch brings one on Linux, pip install 'fusedopt[triton]' one alone"
    )


def interpreting() -> bool:
    """True if triton runs its kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
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
        if device.type == "cuda" and not has_triton():
            warn_once(
                f"fusedopt updates parameters on {device} without its kernels, much slower than with them: "
                f"{_what_is_missing()}; backend='eager' says that this is meant"
            )
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
