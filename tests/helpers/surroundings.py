"""Every optimizer with small parameters and gradients, for tests of what surrounds a step."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.optimizers import OPTIMIZERS, VARIANTS

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
