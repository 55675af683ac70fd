"""What a step launches, compiled for GPUs that need not be here: registers, spills, widths of memory accesses.

Works without any GPU, and without Triton's interpreter. `python -m perf.static_report` prints it.
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

import fusedopt
from fusedopt import Adafactor
from fusedopt.backends.triton.adafactor import TritonAdafactor
from fusedopt.interface import ParamSet, ShardInfo, StepArgs
from perf.providers import RULES

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
    """What a compiled kernel takes."""

    registers: int  # per thread
    spilled: int  # bytes per thread in local memory, where registers did not suffice
    shared: int  # bytes of shared memory
    reads: dict[int, int]  # width in bits to number of instructions that read global memory
    writes: dict[int, int]


def resources(code: Any) -> Resources:
    """Returns what compiled code takes, read from its assembly."""
    if "cubin" in code.asm:
        figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cubin_usage(code))}
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


def _cubin_usage(code: Any) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Variant(NamedTuple):
    """A kernel of a step."""

    name: str  # for AdamW dtypes, alignment, amsgrad; for Adafactor phase and dtype
    launch: Launch  # one of its code
    bytes: tuple[int, int]  # read and written per element; 0 for kernels that read no gradients


DTYPES = {
    **{str(d).removeprefix("torch."): (d,) * 3 for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)},
    "bfloat16, gradient and moments float32": (torch.bfloat16, torch.float32, torch.float32),
    "float32, gradient bfloat16": (torch.float32, torch.bfloat16, torch.float32),
}
"""Dtypes of parameter, gradient and moments that occur in training."""
AMSGRAD = ("float32", "bfloat16")
ADAFACTOR_DTYPES = ("float32", "bfloat16", "float64")

ADAFACTOR_PHASES = ("prologue", "sums", "averages", "squares", "finish", "apply")
"""In the order of their launches."""

SHARD_PHASES = (
    *("prologue", "sums", "totals of tiles", "averages of shards", "means of shards"),
    *("squares", "totals of squares", "finish", "apply"),
)
"""The same where all tensors are shards."""

ADAFACTOR_SHAPES = ((64, 64), (256,), (63, 63), (255,), (8, 4, 3, 3))
"""One of each kind; all of them share the launches."""


def variants(target: str, names: Sequence[str] | None = None) -> list[Variant]:
    """Returns all kernels of all our optimizers, for all of `DTYPES` or those named."""
    found: list[Variant] = []
    for ours in dict.fromkeys(rule.ours for rule in RULES.values()):
        of_it = adafactor_variants(target, names) if ours == "Adafactor" else elementwise_variants(target, names, ours)
        found += [variant._replace(name=f"{ours}, {variant.name}") for variant in of_it]
    for name in ("float32", "bfloat16"):
        for alignment, size in (("aligned", 4096), ("unaligned", 4095)):
            if names is None or name in names:
                launches, _ = _elementwise_step(target, "AdamW", name, size, max_grad_norm=1.0)
                norm = next(launch for launch in launches if launch.kernel == "sum_of_squares")
                found.append(Variant(f"norm, {name}, {alignment}", norm, (0, 0)))
    return found


def elementwise_variants(target: str, names: Sequence[str] | None = None, ours: str = "AdamW") -> list[Variant]:
    """Returns the prologue, and the update for dtypes, aligned and not, with amsgrad for some."""
    found: list[Variant] = []
    for name in DTYPES if names is None else [name for name in DTYPES if name in names]:
        for options in ({}, {"amsgrad": True})[: 1 + (ours == "AdamW" and name in AMSGRAD)]:
            for alignment, size in (("aligned", 4096), ("unaligned", 4095)):
                (prologue, update), moved = _elementwise_step(target, ours, name, size, **options)
                found += [Variant("prologue", prologue, (0, 0))] * (not found)
                found.append(Variant(", ".join([name, alignment, *options]), update, moved))
    return found


def _elementwise_step(
    target: str, ours: str, name: str, size: int, **options: Any
) -> tuple[list[Launch], tuple[int, int]]:
    """Returns the launches of a step on one parameter, and the bytes per element that it must read and write."""
    dtype, grad_dtype, moment_dtype = DTYPES[name]
    p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    optimizer = getattr(fusedopt, ours)([p], **options, backend="triton")
    optimizer.init_state()
    moments = {name: value.to(moment_dtype) for name, value in optimizer.state[p].items() if name != "step"}
    optimizer.state[p].update(moments)
    with fake_gpu(target) as launches:
        optimizer.apply_gradients([(torch.zeros(size, dtype=grad_dtype), p)])
    written = dtype.itemsize + len(moments) * moment_dtype.itemsize
    return launches, (written + grad_dtype.itemsize, written)


def adafactor_variants(target: str, names: Sequence[str] | None = None) -> list[Variant]:
    """Returns all phases for `ADAFACTOR_DTYPES`, with an average of updates; of whole tensors and of shards."""
    found: list[Variant] = []
    for name in ADAFACTOR_DTYPES if names is None else [name for name in ADAFACTOR_DTYPES if name in names]:
        dtype: torch.dtype = getattr(torch, name)
        size, m_size = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
        sizes = {"sums": (2 * size, 0), "squares": (size, 0), "apply": (2 * size + m_size, size + m_size)}
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ADAFACTOR_SHAPES]
        optimizer = Adafactor(params, beta1=0.9, backend="triton")
        grads = [torch.zeros_like(p) for p in params]
        with fake_gpu(target) as launches:
            optimizer.apply_gradients(zip(grads, params))
            shard_step(optimizer, params, grads)
        for phase, launch in zip((*ADAFACTOR_PHASES, *SHARD_PHASES), launches, strict=True):
            if all(launch.code is not variant.launch.code for variant in found):
                found.append(Variant(f"{phase}, {name}", launch, sizes.get(phase, (0, 0))))
    return found


def shard_step(optimizer: Adafactor, params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    """Takes a step of the first group's parameters as shards, of processes that do not exist."""
    states = [optimizer.state[p] for p in params]
    shards: list[ShardInfo | None] = [ShardInfo(p.shape, (), (), ()) for p in params]
    batch = ParamSet(
        optimizer.rule, optimizer.hyper(optimizer.param_groups[0]), list(params), list(grads), states, shards
    )
    TritonAdafactor(params[0].device)([batch], StepArgs())
