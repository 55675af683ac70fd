"""A stand-in for a GPU: what Triton compiles for sm_90 runs in `machine`, on the CPU tensors of this process."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from ptx.agreement import Launch, disagreement
from ptx.arithmetic import Array
from ptx.interpreter import interpreted
from ptx.machine import Run, Schedule
from ptx.memory import Findings, Registry, Span, Written
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


def kernel_of(text: str) -> Kernel:
    """The same, ready to run."""
    if text not in _kernels:
        _kernels[text] = translate(listing_of(text))
    return _kernels[text]


COMPARED = 150
"""Programs of each kernel that a run compares with the interpreter, which takes about as long as the machine."""


class Replay(NamedTuple):
    """A launch that can be run again.

    Attributes:
        launch: what it should do.
        text: PTX of its kernel.
        blocks, shared_bytes, pointers: as in `Run`.
        before: what was in the memory that it touches.
        after: what it wrote.
        executed: as in `Run`.
        tensors: in that memory, which lives as long as they do.
    """

    launch: Launch
    text: str
    blocks: int
    shared_bytes: int
    pointers: list[int]
    before: list[tuple[Span, Array]]
    after: Written
    executed: set[int]
    tensors: list[torch.Tensor]

    def run(self, kernel: Kernel, schedule: Schedule) -> Run:
        """Runs another kernel on the same memory, with what was in it."""
        for span, content in self.before:
            span.memory()[:] = content
        run = Run(kernel, self.blocks, self.shared_bytes, self.pointers, self.launch.registry, schedule)
        run()
        return run


class StandIn:
    """What ran in place of a GPU, and what was found.

    Attributes:
        schedule: of the launches.
        compared: whether launches are compared with the interpreter's.
        watch: called with each launch that is.
        findings: of all launches.
        launches: names of their kernels.
    """

    def __init__(self, schedule: Schedule, compared: bool, watch: Callable[[Replay], None] | None) -> None:
        self.schedule = schedule
        self.compared = compared
        self.watch = watch
        self.findings = Findings()
        self.launches: list[str] = []
        self._programs: Counter[str] = Counter()

    def launch(self, jit: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        code = jit.warmup(*args, grid=grid, **kwargs)
        given = {**dict(zip(jit.arg_names, args)), **kwargs}
        tensors = [given[p.name] for p in jit.params if not p.is_constexpr and given[p.name] is not None]
        text, shared_bytes = code.asm["ptx"], code.metadata.shared
        kernel = kernel_of(text)
        if not all(isinstance(t, torch.Tensor) for t in tensors) or len(grid) != 1:
            raise UnknownInstructionError(f"a launch of {kernel.listing.name} on {grid} with {tensors}")
        pointers = [t.data_ptr() for t in tensors] + [0, 0]  # two for scratch memory, which no kernel asks for
        seed = self.schedule.seed
        schedule = replace(self.schedule, seed=None if seed is None else seed + len(self.launches))
        registry = Registry(live_memory())
        launch = None
        if self.compared and self._programs[text] + grid[0] <= COMPARED:
            self._programs[text] += grid[0]
            name = f"{jit.fn.__module__.split('.')[-1]}.{jit.fn.__name__}"
            compute = next((a.compute for a in args if hasattr(a, "compute")), "")
            launch = Launch(name, compute, *interpreted(jit, grid, args, kwargs, registry))
            registry = launch.registry
        before = registry.contents() if launch and self.watch else []
        run = Run(kernel, grid[0], shared_bytes, pointers, registry, schedule)
        run()
        self.findings.merge(run.findings)
        self.launches.append(jit.fn.__name__)
        if launch is None:
            return
        if message := disagreement(launch, run.journal):
            self.findings.add("not what the interpreter writes", launch.kernel, message)
        if self.watch:
            alive = [t for t in _alive() if registry.contains(np.array([t.data_ptr()], np.uint64), 1)[0]]
            after = run.journal.written()
            self.watch(Replay(launch, text, grid[0], shared_bytes, pointers, before, after, run.executed, alive))


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
    for t in _alive():
        elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
        name, dtype = f"{tuple(t.shape)} of {t.dtype}", str(t.dtype).removeprefix("torch.")
        yield Span(t.data_ptr(), t.data_ptr() + elements * t.element_size(), name, dtype)


def _alive() -> Iterator[torch.Tensor]:
    """Yields the tensors with memory, of those that were found."""
    for key, reference in list(_known.items()):
        t = reference()
        if t is None:
            del _known[key]
        elif t.device.type == "cpu" and t.layout is torch.strided and t.numel() and t.data_ptr():
            yield t


@contextmanager
def standing_in(
    schedule: Schedule | None = None, compared: bool = False, watch: Callable[[Replay], None] | None = None
) -> Iterator[StandIn]:
    """Inside, tensors on the CPU stand for tensors on a GPU, on which kernels run.

    Args:
        schedule: of the launches; everything at once if None.
        compared, watch: as in `StandIn`.

    Raises:
        FindingsError: at the end, with what was found.
    """
    gpu = StandIn(schedule or Schedule(), compared, watch)

    def launcher(jit: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: gpu.launch(jit, grid, args, kwargs)

    stand_in_driver = mock.Mock(
        get_current_target=lambda: TARGET, get_current_device=lambda: DEVICE, get_current_stream=lambda device: 0
    )
    with ExitStack() as stack:
        for patched in (
            mock.patch.object(driver, "_active", stand_in_driver),
            mock.patch.object(KernelInterface, "__getitem__", launcher),
            # No machine code, which nothing here would run; and a place of its own in Triton's cache for what lacks it.
            mock.patch.object(CUDABackend, "make_cubin", lambda self, *args: b""),
            mock.patch.object(
                CUDABackend, "hash", lambda self, of=CUDABackend.hash: f"{of(self)}, without machine code"
            ),
            mock.patch.object(torch.version, "hip", None),
            mock.patch("fusedopt.backends.interpreting", lambda: True),
        ):
            stack.enter_context(patched)
        yield gpu
    if gpu.findings.counts:
        raise FindingsError(str(gpu.findings))
