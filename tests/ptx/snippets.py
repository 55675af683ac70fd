"""Kernels of a few lines, on arrays."""

import numpy as np

from ptx.machine import Run, Schedule
from ptx.memory import Registry, Span
from ptx.reader import read
from ptx.translator import translate

THREADS = 64
IN_ORDER = Schedule()


def kernel_text(body: str, params: int) -> str:
    """A kernel around a body that knows %rd1, %rd2 ... as addresses of arrays, and %r1 as the number of the thread."""
    names = [f"test_param_{k}" for k in range(params)]
    loads = "\n".join(f"ld.param.b64 %rd{k + 1}, [{name}];" for k, name in enumerate(names))
    declared = ",\n".join(f".param .u64 .ptr .global .align 1 {name}" for name in names)
    return (
        f".visible .entry test(\n{declared}\n)\n.reqntid {THREADS}\n{{\n$L__func_begin0:\n{loads}\n"
        f"mov.u32 %r1, %tid.x;\n{body}\nret;\n$L__func_end0:\n}}"
    )


def execute(body: str, *arrays: np.ndarray, blocks: int = 1, shared: int = 0, schedule: Schedule = IN_ORDER) -> Run:
    """Runs a kernel on arrays, all of which it may touch."""
    spans = [Span(a.ctypes.data, a.ctypes.data + a.nbytes, f"array {k}") for k, a in enumerate(arrays)]
    pointers = [a.ctypes.data for a in arrays]
    kernel = translate(read(kernel_text(body, len(arrays))))
    run = Run(kernel, blocks, shared, pointers, Registry(spans), schedule, most_steps=1000)
    run()
    return run
