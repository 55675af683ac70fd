"""A stand-in for a GPU: what Triton compiles for sm_90 runs in `machine`, on the CPU tensors of this process."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from ptx.machine import Run, Schedule
from ptx.memory import Findings, Registry, Span
from ptx.reader import Listing, UnknownInstructionError, read
from ptx.translator import Kernel, translate


class FindingsError(AssertionError):
    """Kernels did what they must not do."""


TARGET = GPUTarget("cuda", 90, 32)
DEVICE = 90
"""The number of the device, which no GPU of this machine has: Triton keeps what it compiled by device."""

_listings: dict[str, Listing] = {}
_kernels: dict[str, Kernel] = {}


def listing_of(text: str) -> Listing:
    """The kernel of a PTX file; read once."""
    if text not in _listings:
        _listings[text] = read(text)
    return _listings[text]


class StandIn:
    """What ran in place of a GPU, and what was found.

    Attributes:
        schedule: of the launches.
        findings: of all launches.
        launches: names of their kernels.
        executed: by the PTX of a kernel, what `Run.executed` has.
        spoilt: kernels to run in the place of those with this PTX.
    """

    def __init__(self, schedule: Schedule, spoilt: dict[str, Kernel] | None = None) -> None:
        self.schedule = schedule
        self.findings = Findings()
        self.launches: list[str] = []
        self.executed: dict[str, set[int]] = {}
        self.spoilt = spoilt or {}

    def launch(self, jit: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        code = jit.warmup(*args, grid=grid, **kwargs)
        given = {**dict(zip(jit.arg_names, args)), **kwargs}
        tensors = [given[p.name] for p in jit.params if not p.is_constexpr and given[p.name] is not None]
        text = code.asm["ptx"]
        if text not in _kernels:
            _kernels[text] = translate(listing_of(text))
        kernel = self.spoilt.get(text, _kernels[text])
        if not all(isinstance(t, torch.Tensor) for t in tensors) or len(grid) != 1:
            raise UnknownInstructionError(f"a launch of {kernel.listing.name} on {grid} with {tensors}")
        pointers = [t.data_ptr() for t in tensors] + [0, 0]  # two for scratch memory, which no kernel asks for
        seed = self.schedule.seed
        schedule = Schedule(
            None if seed is None else seed + len(self.launches),
            *(getattr(self.schedule, name) for name in ("batch", "inexact", "watched")),
        )
        run = Run(kernel, grid[0], code.metadata.shared, pointers, Registry(live_memory()), schedule)
        run()
        self.findings.merge(run.findings)
        self.launches.append(jit.fn.__name__)
        self.executed.setdefault(text, set()).update(run.executed)


_known: dict[int, "weakref.ref[torch.Tensor]"] = {}
_calls = 0


def live_memory() -> Iterator[Span]:
    """Yields the memory of every tensor that somebody holds."""
    global _calls
    _calls += 1
    if _calls % 500 == 0:  # what is frozen is never collected
        gc.unfreeze()
        gc.collect()
    for o in gc.get_objects():
        if issubclass(type(o), torch.Tensor):
            _known[id(o)] = weakref.ref(o)
    gc.freeze()  # the next call sees only what came since
    for key, reference in list(_known.items()):
        t = reference()
        if t is None:
            del _known[key]
        elif t.device.type == "cpu" and t.layout is torch.strided and t.numel() and t.data_ptr():
            elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
            yield Span(t.data_ptr(), t.data_ptr() + elements * t.element_size(), f"{tuple(t.shape)} of {t.dtype}")


@contextmanager
def standing_in(schedule: Schedule | None = None, spoilt: dict[str, Kernel] | None = None) -> Iterator[StandIn]:
    """Inside, tensors on the CPU stand for tensors on a GPU, on which kernels run.

    Args:
        schedule: of the launches; everything at once if None.
        spoilt: as in `StandIn`.

    Raises:
        FindingsError: at the end, with what was found.
    """
    gpu = StandIn(schedule or Schedule(), spoilt)

    def launcher(jit: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: gpu.launch(jit, grid, args, kwargs)

    stand_in_driver = mock.Mock(
        get_current_target=lambda: TARGET, get_current_device=lambda: DEVICE, get_current_stream=lambda device: 0
    )
    with ExitStack() as stack:
        for patched in (
            mock.patch.object(driver, "_active", stand_in_driver),
            mock.patch.object(KernelInterface, "__getitem__", launcher),
            mock.patch.object(CUDABackend, "make_cubin", lambda self, *args: b""),  # which nothing here would run
            mock.patch.object(torch.version, "hip", None),
            mock.patch("fusedopt.backends.interpreting", lambda: True),
        ):
            stack.enter_context(patched)
        yield gpu
    if gpu.findings.counts:
        raise FindingsError(str(gpu.findings))
