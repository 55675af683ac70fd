"""The kernels as compilers see them, without a GPU: what they take, how wide they read, how often they are launched."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def compiled(what, script="compiled_steps.py"):
    """Output of that script. One test each, so that tests in parallel do not compile the same."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / script), what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_variant(target):
    variants = compiled(target)
    assert 16 < len(variants) <= 24
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
        if ", aligned" in kernel["name"]:
            reads_and_writes_128_bits_at_a_time(kernel, what)


def reads_and_writes_128_bits_at_a_time(kernel, what):
    """Where dtypes are mixed: the widest one, and as many elements of the others at a time."""
    narrowest = 64 if "gradient" in kernel["name"] else 128
    for kind, size in kernel["bytes"].items():
        widths = {int(width): number for width, number in kernel[kind].items()}
        assert 128 in widths, what
        assert sum(width * number for width, number in widths.items() if width >= narrowest) >= 8 * size, what
        if kind == "writes":
            assert min(widths) >= narrowest, what


def test_launches_per_step():
    once, twice = ["prologue", "update"], ["prologue", "update", "update"]
    assert compiled("launches") == {
        "one aligned": [once, once],
        "one odd": [once, once],
        "1,000 aligned": [once, once],
        "1,000 aligned in 3 groups": [once, once],
        "1,000 in 3 groups, odd ones among them": [twice, twice],
    }


def test_nothing_is_compiled_twice():
    changes = compiled("changes")
    assert len(changes) == 11
    assert not any(changes.values()), changes


ADAFACTOR = "compiled_adafactor.py"

# The ptxas of triton 3.6 spills up to four numbers where that makes room for a fourth program per multiprocessor.
SPILLED = 0 if version("triton") >= "3.7" else 16


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_variant_of_adafactor(target):
    variants = compiled(target, ADAFACTOR)
    assert len(variants) == 20  # of three dtypes, where what reads no gradient serves several; 7 for shards alone
    for kernel in variants:
        what = f"{kernel['name']} on {target}: {kernel}"
        assert kernel["spilled"] <= SPILLED, what
        assert kernel["fusion"] is False, what
        assert not kernel["drops_nan"], what
        assert kernel["shared"] <= 16384, what
        if not kernel["per_element"]["reads"]:
            continue
        assert kernel["threads"] == 256, what
        # 65,536 registers to a multiprocessor: three programs of 256 threads fit, or two of the one exception.
        exception = kernel["name"] == "apply, bfloat16" and target == "sm_100"
        assert kernel["registers"] <= (168 if "float64" in what else 88 if exception else 80), what
        # Kernels for all alignments in one: as many wide accesses as an aligned tile takes, 8 elements to a thread.
        for kind, size in kernel["per_element"].items():
            wide = sum(int(width) * number for width, number in kernel[kind].items() if int(width) >= 128)
            assert wide >= 8 * 8 * size, what


def test_launches_of_adafactor_per_step():
    six = ["prologue", "sums", "averages", "squares", "finish", "apply"]
    nine = ["prologue", "sums", "sums", "averages", "squares", "squares", "finish", "apply", "apply"]
    assert compiled("launches", ADAFACTOR) == {
        "one matrix": [six, six],
        "one of each kind": [six, six],
        "1,000 of all kinds in 3 groups": [six, six],
        "two dtypes": [nine, nine],
        "one of each kind, as shards": [
            *([*six[:2], "shard_totals", "shard_averages", "row_means", "squares", "square_totals", *six[4:]],) * 2
        ],
    }


def test_nothing_of_adafactor_is_compiled_twice():
    changes = compiled("changes", ADAFACTOR)
    assert len(changes) == 11
    assert not any(changes.values()), changes
