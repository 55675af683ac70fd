"""Kernels of a step, compiled for GPUs that need not be present: registers, spills, widths of memory accesses.

Works without a GPU, and only where Triton's interpreter is off. `python -m perf.static_report` prints it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from fusedopt import Adafactor, backends
from fusedopt.interface import ParamSet, ShardInfo, ShardPosition, StepArgs
from fusedopt.precision import Precision
from perf.cases import DTYPES, Case
from perf.providers import RULES
from perf.workloads import Shape

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, MI300."""


class Launch(NamedTuple):
    """One kernel launch that would have happened."""

    kernel: str
    constants: dict[str, Any]  # constexpr arguments by name
    code: Any  # what Triton compiled; launches of the same code share the object


@contextmanager
def fake_gpu(target: str) -> Iterator[list[Launch]]:
    """Inside, kernels are compiled for `target`, and tensors on the CPU pass for tensors on that GPU.

    Yields:
        The launches, none of which happens, in order.
    """
    launches: list[Launch] = []
    fake_driver = mock.Mock(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: list(TARGETS).index(target),  # which keeps Triton's kernel caches apart
        get_current_stream=lambda device: 0,
    )

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            code = kernel.warmup(*args, grid=grid, **kwargs)
            given = {**dict(zip(kernel.arg_names, args)), **kwargs}
            constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
            launches.append(Launch(kernel.fn.__name__, constants, code))

        return compile_only

    with (
        mock.patch.object(driver, "_active", fake_driver),
        mock.patch.object(KernelInterface, "__getitem__", launch),
        mock.patch.object(torch.version, "hip", "fake" if TARGETS[target].backend == "hip" else None),
        mock.patch("fusedopt.backends.interpreting", lambda: True),
    ):
        yield launches


class Resources(NamedTuple):
    """Resources of a compiled kernel. `perf.report.TABLES` makes columns of them."""

    registers: int  # per thread
    spilled: int  # bytes per thread in local memory, where registers did not suffice
    shared: int  # bytes of shared memory
    reads: dict[int, int]  # width in bits to number of instructions that read global memory
    writes: dict[int, int]


def resources(code: Any) -> Resources:
    """Returns the resources of compiled code, read from its assembly."""
    if "cubin" in code.asm:
        usage = cubin_text(code, "cuobjdump", "--dump-resource-usage")
        figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        registers, spilled = figures["REG"], figures["STACK"] + figures["LOCAL"]
        found = re.findall(r"\b(ld|st)\.(?:\w+\.)?global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", code.asm["ptx"])
        widths = Counter((kind, int(times or 1) * int(bits)) for kind, times, bits in found)
    else:
        assembly = code.asm["amdgcn"]
        figures = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M)}
        registers, spilled = figures["vgpr_count"], figures["private_segment_fixed_size"]
        pattern = r"\b(?:global|flat|buffer)_(load|store)_[us]?(byte|short|dword)(?:_d16(?:_hi)?)?(?:x(\d))?\b"
        sizes = {"byte": 8, "short": 16, "dword": 32}
        found = re.findall(pattern, assembly)
        widths = Counter((kind[:2].replace("lo", "ld"), sizes[unit] * int(times or 1)) for kind, unit, times in found)
    reads, writes = ({w: n for (k, w), n in sorted(widths.items()) if k == kind} for kind in ("ld", "st"))
    return Resources(registers, spilled, code.metadata.shared, reads, writes)


def cubin_text(code: Any, tool: str, *options: str) -> str:
    """Returns what a tool of Triton's toolkit prints of compiled code for NVIDIA."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


ADAFACTOR_SHAPES = ((64, 64), (256,), (63, 63), (255,), (8, 4, 3, 3))
"""One of each kind; all of them share the launches."""

ELEMENTWISE_SHAPES = {"aligned": ((4096,),), "unaligned": ((4095,),)}


class Kernel(NamedTuple):
    """A compiled kernel of a case."""

    case: Case
    name: str  # with dtypes, alignment and options
    launch: Launch  # the first of its code


def kernels(target: str, cases: Sequence[Case]) -> list[Kernel]:
    """Returns the kernels of cases; code that several of them share comes once."""
    found: list[Kernel] = []
    for case in cases:
        adafactor = RULES[case.rule].ours == "Adafactor"
        for alignment, shapes in {"": ADAFACTOR_SHAPES}.items() if adafactor else ELEMENTWISE_SHAPES.items():
            name = ", ".join(filter(None, [case.dtypes, alignment, *case.options]))
            for launch in step(target, case, shapes):
                if all(launch.code is not kernel.launch.code for kernel in found):
                    sharded = getattr(launch.constants.get("A"), "sharded", False)
                    found.append(Kernel(case, f"{launch.kernel}, {name}" + ", shards" * sharded, launch))
    return found


def step(target: str, case: Case, shapes: Sequence[Shape]) -> list[Launch]:
    """Returns the launches of a step; where shards make a difference, those of the same parameters as shards too."""
    param_dtype, grad_dtype, moment_dtype = DTYPES[case.dtypes]
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=param_dtype)) for shape in shapes]
    grads = [torch.zeros(shape, dtype=grad_dtype) for shape in shapes]
    optimizer: Any = case.make(params)
    if moment_dtype != param_dtype:
        optimizer.init_state()
        for state in optimizer.state.values():
            state.update({name: t.to(moment_dtype) for name, t in state.items() if name != "step"})
    with fake_gpu(target) as launches:
        optimizer.apply_gradients(zip(grads, params))
        if isinstance(optimizer, Adafactor) or "number" in optimizer.state[params[0]]:
            shard_step(optimizer, params, grads)
    return launches


def shard_step(optimizer: Any, params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    """Takes a step of the first group's parameters as shards, of processes that do not exist."""
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] for p in params]
    shards: list[ShardInfo | None] = [ShardInfo(p.shape, (), (), (), ShardPosition(p.numel(), 0, 0)) for p in params]
    precision = Precision.of(group, optimizer.seed)
    measurement, places = None, None
    if optimizer.tracker:
        measurement = optimizer.tracker.open(optimizer, params, StepArgs())
        places = optimizer.tracker.places(params)
    hyper = optimizer.hyper(group)
    batch = ParamSet(optimizer.rule, hyper, list(params), list(grads), states, shards, precision, places)
    backends.create(optimizer.rule, params[0].device, "triton")([batch], StepArgs(measurement=measurement))
