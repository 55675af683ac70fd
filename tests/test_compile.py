"""The kernels as compilers see them, without a GPU: what they take, how wide they read, how often they are launched."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@cache
def compiled(what):
    """Output of compiled_steps.py for a target, or for "launches"."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "compiled_steps.py"), what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_variant(target):
    variants = compiled(target)
    assert len(variants) <= 24
    for kernel in variants:
        what = f"{kernel['name']} on {target}: {kernel}"
        assert kernel["spilled"] == 0, what
        assert kernel["fusion"] is False, what  # Or the numbers would not be those of the interpreter and of numpy.
        assert not kernel["drops_nan"], what
        assert kernel["shared"] == 0, what  # Each thread keeps its elements from the reads to the writes.
        if kernel["name"] == "prologue":
            continue
        assert kernel["threads"] == 256, what
        # 65,536 registers to a multiprocessor: half of its 2,048 threads fit, to keep enough reads in flight.
        assert kernel["registers"] <= (128 if "float64" in what else 64 if ", aligned" in what else 80), what
        # Offsets are int64 before the first multiplication.
        assert kernel["multiplications_in_32_bits"] == 0, what


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_aligned_tensors_are_read_and_written_128_bits_at_a_time(target):
    """Where dtypes are mixed: the widest one, and as many elements of the others at a time."""
    aligned = [kernel for kernel in compiled(target) if ", aligned" in kernel["name"]]
    assert len(aligned) == 8
    for kernel in aligned:
        for kind, size in kernel["bytes"].items():
            widths = {int(width): number for width, number in kernel[kind].items()}
            narrowest = 64 if "gradient" in kernel["name"] else 128
            what = f"{kind} of {kernel['name']} on {target}: {kernel}"
            assert 128 in widths, what
            assert sum(width * number for width, number in widths.items() if width >= narrowest) >= 8 * size, what
            if kind == "writes":
                assert min(widths) >= narrowest, what


@pytest.mark.parametrize(
    ("tensors", "updates"),
    [
        ("one aligned", 1),
        ("1,000 aligned", 1),
        ("1,000 aligned in 3 groups", 1),
        ("one odd", 1),
        ("1,000 in 3 groups, odd ones among them", 2),
    ],
)
def test_launches_per_step(tensors, updates):
    assert compiled("launches")[tensors] == [["prologue"] + ["update"] * updates] * 2


def test_nothing_is_compiled_twice():
    compilations = compiled("launches")["compilations"]
    assert len(compilations) == 11
    assert not any(compilations.values()), compilations
