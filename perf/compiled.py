"""What a step launches, compiled for GPUs that need not be here: registers, spills, widths of memory accesses.

`python -m perf.compiled` prints it for AdamW and Adafactor. Works without any GPU, and without Triton's interpreter.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from fusedopt import Adafactor, AdamW
from fusedopt.backends.triton.adafactor import TritonAdafactor
from fusedopt.batch import Batch, Control, Split

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, MI300."""


class Launch(NamedTuple):
    """One kernel launch that would have happened.

    Attributes:
        kernel: name of the kernel.
        programs: size of the grid.
        constants: constexpr arguments by name.
        code: what Triton compiled; launches of the same code share the object.
    """

    kernel: str
    programs: int
    constants: dict[str, Any]
    code: Any


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: per thread.
        spilled: bytes per thread in local memory, where registers did not suffice.
        shared: bytes of shared memory.
        reads: width in bits to number of instructions that read global memory.
        writes: the same for writing.
    """

    registers: int
    spilled: int
    shared: int
    reads: dict[int, int]
    writes: dict[int, int]


class _Driver:
    """Stands in for a GPU's driver; a device number per target keeps Triton's kernel caches apart."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._name)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def standing_in(target: str) -> Iterator[list[Launch]]:
    """Inside, kernels are compiled for `target`, and tensors on the CPU stand for tensors on that GPU.

    Yields:
        The launches, none of which happens, in order.
    """
    launches: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            code = kernel.warmup(*args, grid=grid, **kwargs)
            given = {**dict(zip(kernel.arg_names, args)), **kwargs}
            constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
            launches.append(Launch(kernel.fn.__name__, grid[0], constants, code))

        return compile_only

    with (
        mock.patch.object(driver, "_active", _Driver(target)),
        mock.patch.object(KernelInterface, "__getitem__", launch),
        mock.patch.object(torch.version, "hip", "stand-in" if TARGETS[target].backend == "hip" else None),
        mock.patch("fusedopt.backends.interpreting", lambda: True),
    ):
        yield launches


class InPlace(NamedTuple):
    """Elements that a kernel writes where it has read them.

    Attributes:
        elements: that a program has in hand at once.
        behind_barrier: whether all threads have read theirs before one writes.
    """

    elements: int
    behind_barrier: bool


def in_place(code: Any) -> list[InPlace]:
    """What compiled code writes where it has read, from Triton's own representation before layouts are chosen."""
    lines = code.asm["ttir"].splitlines()
    read: dict[str, int] = {}
    found = []
    for number, line in enumerate(lines):
        if load := re.search(r"tt\.load (%[\w#]+)", line):
            read[load[1]] = number
        elif (store := re.search(r"tt\.store (%[\w#]+),.* : (?:tensor<((?:\d+x)+))?!tt\.ptr", line)) and store[
            1
        ] in read:
            elements = prod(int(size) for size in (store[2] or "").split("x") if size)
            found.append(InPlace(elements, any("barrier" in between for between in lines[read[store[1]] : number])))
    return found


def resources(code: Any) -> Resources:
    """What compiled code takes, read from its assembly."""
    if "cubin" in code.asm:
        return _of_nvidia(code)
    assembly = code.asm["amdgcn"]
    figures = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M)}
    sizes = {"byte": 8, "short": 16, "dword": 32}
    accesses = re.findall(r"\b(?:global|flat|buffer)_(load|store)_([a-z]+?)(?:_d16(?:_hi)?)?(x\d)?\b", assembly)
    widths = Counter(
        (kind, sizes[unit[unit[0] in "us" and unit != "short" :]] * int(times[1:] or 1))
        for kind, unit, times in accesses
    )
    return Resources(
        registers=figures["vgpr_count"],
        spilled=figures["private_segment_fixed_size"],
        shared=code.metadata.shared,
        reads={width: n for (kind, width), n in sorted(widths.items()) if kind == "load"},
        writes={width: n for (kind, width), n in sorted(widths.items()) if kind == "store"},
    )


def _of_nvidia(code: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = re.findall(r"\b(ld|st)\.(?:\w+\.)?global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", code.asm["ptx"])
    widths = Counter((kind, int(times or 1) * int(bits)) for kind, times, bits in accesses)
    return Resources(
        registers=figures["REG"],
        spilled=figures["STACK"] + figures["LOCAL"],
        shared=code.metadata.shared,
        reads={width: n for (kind, width), n in sorted(widths.items()) if kind == "ld"},
        writes={width: n for (kind, width), n in sorted(widths.items()) if kind == "st"},
    )


# Dtypes of parameter, gradient and moments that occur in training.
DTYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64, torch.float64),
    "bfloat16, gradient and moments float32": (torch.bfloat16, torch.float32, torch.float32),
    "float32, gradient bfloat16": (torch.float32, torch.bfloat16, torch.float32),
}
AMSGRAD = ("float32", "bfloat16")


class Variant(NamedTuple):
    """A kernel of a step.

    Attributes:
        name: for AdamW dtypes, alignment, amsgrad; for Adafactor phase and dtypes.
        launch: of its code.
        bytes: that it reads and that it writes, per element; 0 for kernels that read no gradients.
    """

    name: str
    launch: Launch
    bytes: tuple[int, int]


def adamw_variants(target: str) -> list[Variant]:
    """The prologue, and the update for `DTYPES`, aligned and not, with amsgrad for some."""
    variants: list[Variant] = []
    for name, dtypes in DTYPES.items():
        for amsgrad in (False, True)[: 1 + (name in AMSGRAD)]:
            read = sum(dtype.itemsize for dtype in (*dtypes, *dtypes[2:] * (1 + amsgrad)))
            for alignment, size in (("aligned", 4096), ("unaligned", 4095)):
                with standing_in(target) as launches:
                    _adamw_step(dtypes, size, amsgrad)
                if not variants:
                    variants.append(Variant("prologue", launches[0], (0, 0)))
                what = f"{name}, {alignment}" + ", amsgrad" * amsgrad
                variants.append(Variant(what, launches[1], (read, read - dtypes[1].itemsize)))
    return variants


def _adamw_step(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], size: int, amsgrad: bool) -> None:
    dtype, grad_dtype, moment_dtype = dtypes
    p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    optimizer = AdamW([p], amsgrad=amsgrad, backend="triton")
    optimizer.init_state()
    state = optimizer.state[p]
    state.update({name: value.to(moment_dtype) for name, value in state.items() if name != "step"})
    optimizer.apply_gradients([(torch.zeros(size, dtype=grad_dtype), p)])


# Of a parameter and its gradient.
ADAFACTOR_DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
}
ADAFACTOR_PHASES = ("prologue", "sums", "averages", "squares", "finish", "apply")
"""In the order of their launches."""

SHARD_PHASES = (
    *("prologue", "sums", "totals of tiles", "averages of shards", "means of shards"),
    *("squares", "totals of squares", "finish", "apply"),
)
"""The same where all tensors are shards."""

ADAFACTOR_SHAPES = ((64, 64), (256,), (63, 63), (255,), (8, 4, 3, 3))
"""One of each kind; all of them share the launches."""


def adafactor_variants(target: str) -> list[Variant]:
    """All phases for `ADAFACTOR_DTYPES`, with an average of updates; of whole tensors and of shards."""
    variants: list[Variant] = []
    for name, (dtype, grad_dtype) in ADAFACTOR_DTYPES.items():
        p_size, g_size = dtype.itemsize, grad_dtype.itemsize
        m_size = torch.promote_types(dtype, torch.float32).itemsize
        sizes = {
            "sums": (p_size + g_size, 0),
            "squares": (g_size, 0),
            "apply": (p_size + g_size + m_size, p_size + m_size),
        }
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ADAFACTOR_SHAPES]
        optimizer = Adafactor(params, beta1=0.9, backend="triton")
        grads = [torch.zeros(p.shape, dtype=grad_dtype) for p in params]
        with standing_in(target) as launches:
            optimizer.apply_gradients(zip(grads, params))
            shard_step(optimizer, params, grads)
        for phase, launch in zip((*ADAFACTOR_PHASES, *SHARD_PHASES), launches, strict=True):
            if all(launch.code is not variant.launch.code for variant in variants):
                variants.append(Variant(f"{phase}, {name}", launch, sizes.get(phase, (0, 0))))
    return variants


def shard_step(optimizer: Adafactor, params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    """A step of the first group's parameters as shards, of processes that do not exist."""
    states = [optimizer.state[p] for p in params]
    shards: list[Split | None] = [Split(p.shape, (), (), ()) for p in params]
    batch = Batch(optimizer.rule, optimizer.hyper(optimizer.param_groups[0]), list(params), list(grads), states, shards)
    TritonAdafactor(params[0].device)([batch], Control())


def _print_table() -> None:
    head = ("kernel", "registers", "spilled", "reads (bits x number)", "writes (bits x number)", "bytes per element")
    for target in TARGETS:
        print(f"\n{target}: {' | '.join(head)}")
        for name, launch, (read, written) in (*adamw_variants(target), *adafactor_variants(target)):
            of = resources(launch.code)
            widths = [", ".join(f"{width}x{n}" for width, n in kinds.items()) for kinds in (of.reads, of.writes)]
            print(f"{name} | {of.registers} | {of.spilled} | {widths[0]} | {widths[1]} | {read + written}")


if __name__ == "__main__":
    _print_table()
