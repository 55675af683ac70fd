"""The kernels as compilers see them, without a GPU: what they take, how wide they read, how often they are launched."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.processes import run_without_interpreter

from fusedopt import backends

ROOT = Path(__file__).parent.parent


ADAMW, ADAFACTOR = "compiled_steps.py", "compiled_adafactor.py"


compiled = cache(run_without_interpreter)


def found(script, word):
    """What that script finds out about the variants of a word, launches or changes; the fast run in one process."""
    together = ("sm_90 few", "launches", "changes")
    return compiled(script, *together if word in together else (word,))[word]


of_adamw, of_adafactor = (pytest.mark.xdist_group(script) for script in (ADAMW, ADAFACTOR))  # in one worker


def every_variant(group):
    """Words of `helpers.compiled`: a few for sm_90 with what else is found out for it, and all others."""
    slow = [pytest.param(word, marks=pytest.mark.slow) for word in ("sm_90 others", "sm_80", "sm_100", "gfx942")]
    return pytest.mark.parametrize("word", [pytest.param("sm_90 few", marks=group), *slow])


TRITON = backends.release(backends.triton_version())
ALWAYS = ((0, 0), (1000, 0))
NVIDIA = ("sm_80", "sm_90", "sm_100")


class Exemption(NamedTuple):
    """What kernels may take more than the others, with some versions of triton, whose compilers differ."""

    kernels: str | tuple[str, ...]  # how their names begin
    targets: tuple[str, ...]
    tritons: tuple[tuple[int, int], tuple[int, int]]  # the first and the last
    registers: int
    spilled: int
    reason: str


PHASES = ("sums", "averages", "shard_averages", "squares", "apply")
EXEMPTIONS = (
    Exemption("apply, bfloat16", ("sm_100",), ALWAYS, 88, 0, "two programs to a multiprocessor instead of three"),
    Exemption(
        "apply, bfloat16, stochastic_rounding, beta1, track_statistics",
        NVIDIA,
        ALWAYS,
        registers=0,
        spilled=24,
        reason="up to six numbers spilled make room for two programs",
    ),
    Exemption(
        "apply, bfloat16, stochastic_rounding, beta1, track_statistics", NVIDIA, ((3, 6), (3, 6)), 0, 40, "ten numbers"
    ),
    Exemption(
        ("finish, float32, aligned, track_statistics", "finish, bfloat16, aligned, track_statistics"),
        ("sm_80",),
        ((3, 6), (3, 6)),
        registers=0,
        spilled=8,
        reason="once per tensor",
    ),
    Exemption(PHASES, NVIDIA, ((3, 6), (3, 6)), 0, 16, "up to four numbers spilled make room for one more program"),
    Exemption(PHASES, NVIDIA, ((3, 8), (3, 8)), 0, 8, "as in 3.6, two numbers: 64 registers, four programs"),
    Exemption(
        "update, float32, unaligned", NVIDIA, ((3, 9), (3, 9)), 96, 0, "two programs, for tensors of odd sizes alone"
    ),
)


def limits(kernel, target, registers):
    """How many registers a kernel may take, and how many bytes it may spill, given what the others may."""
    exempt = [
        e
        for e in EXEMPTIONS
        if kernel.startswith(e.kernels) and target in e.targets and e.tritons[0] <= TRITON <= e.tritons[1]
    ]
    return max([registers, *(e.registers for e in exempt)]), max([0, *(e.spilled for e in exempt)])


@pytest.mark.slow
@every_variant(of_adamw)
def test_every_variant(word):
    variants, target = found(ADAMW, word), word.split()[0]
    least, most = {"sm_90 few": (12, 12), "sm_90 others": (52, 70)}.get(word, (64, 80))
    assert least <= len(variants) <= most
    for kernel in variants:
        what = f"{kernel['name']} on {target}: {kernel}"
        # 65,536 registers to a multiprocessor: half of its 2,048 threads fit, to keep enough reads in flight.
        usual = 128 if "float64" in what else 64 if ", aligned" in what else 80
        if kernel["random"]:  # Three programs of 256 threads; two, for tensors of odd sizes alone.
            usual = 80 if ", aligned" in what else 112
        elif kernel["low_precision"]:
            usual = max(usual, 80)
        registers, spilled = limits(kernel["name"], target, usual)
        assert kernel["registers"] <= registers and kernel["spilled"] <= spilled, what
        assert kernel["fusion"] is False, what  # Or the numbers would not be those of the interpreter and of numpy.
        assert not kernel["drops_nan"], what
        assert_no_race(kernel, what, in_place=True)
        assert kernel["shared"] == 0, what  # Each thread keeps its elements from the reads to the writes.
        if kernel["name"].startswith("prologue"):
            continue
        assert kernel["threads"] == 256, what
        # Offsets are int64 before the first multiplication; random words take five, of 32 bits on purpose.
        assert kernel["multiplications_in_32_bits"] == (5 if kernel["random"] else 0), what
        if ", aligned" in kernel["name"]:
            reads_and_writes_128_bits_at_a_time(kernel, what)
            issues_few_instructions(kernel, what)


def issues_few_instructions(kernel, what):
    """At copy bandwidth an H200 has time for more; shards of float16 take the most."""
    if kernel["low_precision"] and kernel["share"] is not None:
        assert kernel["share"] < (0.9 if "float16" in kernel["name"] and "shards" in kernel["name"] else 0.85), what


def assert_no_race(kernel, what, in_place):
    """Where a kernel writes what it reads, no two threads have a copy of one number each, or a barrier is between."""
    assert in_place == bool(kernel["in_place"]), what
    for elements, behind_barrier in kernel["in_place"]:
        assert elements >= kernel["threads"] or behind_barrier, what


def reads_and_writes_128_bits_at_a_time(kernel, what):
    """Where dtypes are mixed: the widest one, and as many elements of the others at a time."""
    narrowest = 128 * int(kernel["itemsizes"][0]) // int(kernel["itemsizes"][-1])
    for kind, size in kernel["bytes"].items():
        widths = {int(width): number for width, number in kernel[kind].items()}
        assert 128 in widths, what
        assert sum(width * number for width, number in widths.items() if width >= narrowest) >= 8 * size, what
        if kind == "writes":
            assert min(widths) >= narrowest, what


@pytest.mark.slow
@of_adamw
def test_launches_per_step():
    once, twice = ["prologue", "update"], ["prologue", "update", "update"]
    assert found(ADAMW, "launches") == {
        "one aligned": [once, once],
        "one odd": [once, once],
        "1,000 aligned": [once, once],
        "1,000 aligned in 3 groups": [once, once],
        "1,000 in 3 groups, odd ones among them": [twice, twice],
    }


@pytest.mark.slow
@of_adamw
def test_nothing_is_compiled_twice():
    changes = found(ADAMW, "changes")
    assert len(changes) == 11
    assert not any(changes.values()), changes


IN_PLACE = ("prologue", "sums", "averages", "shard_averages", "apply")
"""The phases that write where they read."""


@pytest.mark.slow
@every_variant(of_adafactor)
def test_every_variant_of_adafactor(word):
    variants, target = found(ADAFACTOR, word), word.split()[0]
    others = sum(not kernel["low_precision"] for kernel in variants)
    assert others == 20 or (others >= 6 and " " in word)  # of three dtypes; 7 for shards alone
    for kernel in variants:
        what = f"{kernel['name']} on {target}: {kernel}"
        # 65,536 registers to a multiprocessor: three programs of 256 threads fit.
        usual = 168 if "float64" in what else 128 if kernel["low_precision"] else 80
        registers, spilled = limits(kernel["name"], target, usual)
        assert kernel["spilled"] <= spilled, what
        assert kernel["fusion"] is False, what
        assert not kernel["drops_nan"], what
        assert_no_race(kernel, what, in_place=kernel["name"].startswith(IN_PLACE))
        assert kernel["shared"] <= 16384, what
        if not kernel["per_element"]["reads"]:
            continue
        assert kernel["threads"] == 256, what
        assert kernel["registers"] <= registers, what
        # Kernels for all alignments in one: as many wide accesses as an aligned tile takes, 8 elements to a thread.
        for kind, size in kernel["per_element"].items():
            wide = sum(int(width) * number for width, number in kernel[kind].items() if int(width) >= 128)
            assert wide >= 8 * 8 * size, what
        if not kernel["name"].startswith("squares"):  # which reads gradients alone, as it does without the options
            issues_few_instructions(kernel, what)


@pytest.mark.slow
@of_adafactor
def test_launches_of_adafactor_per_step():
    six = ["prologue", "sums", "averages", "squares", "finish", "apply"]
    nine = ["prologue", "sums", "sums", "averages", "squares", "squares", "finish", "apply", "apply"]
    assert found(ADAFACTOR, "launches") == {
        "one matrix": [six, six],
        "one of each kind": [six, six],
        "1,000 of all kinds in 3 groups": [six, six],
        "two dtypes": [nine, nine],
        "one of each kind, as shards": [
            *([*six[:2], "shard_totals", "shard_averages", "row_means", "squares", "square_totals", *six[4:]],) * 2
        ],
    }


@pytest.mark.slow
@of_adafactor
def test_nothing_of_adafactor_is_compiled_twice():
    changes = found(ADAFACTOR, "changes")
    assert len(changes) == 11
    assert not any(changes.values()), changes


@pytest.mark.slow
def test_every_kernel_compiles_under_a_hook_that_serializes_its_constants():
    root = ROOT / "kernels"
    kernels = [
        f"{'.'.join(path.relative_to(root).with_suffix('').parts)}.{name}"
        for path in (root / "fusedopt_kernels").rglob("*.py")
        for name in re.findall(r"^@triton\.jit\ndef (\w+)", path.read_text(), re.M)
    ]
    serialized = run_without_interpreter("compiled_hooked.py")
    assert sorted(serialized) == sorted(kernels)
    assert all(serialized.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_that_leave_statistics(target):
    """Nothing is spilled for them, and aligned tensors are written 128 bits at a time."""
    found = compiled("compiled_statistics.py", target)
    names = [kernel["name"] for kernel in found]
    for phase in ("update, bfloat16, aligned, stochastic_rounding", "apply, float32", "finish, float32, aligned"):
        assert any(name.startswith(phase) and name.endswith("track_statistics") for name in names), (phase, names)
    for kernel in found:
        what = f"{kernel['name']} on {target}: {kernel}"
        _, spilled = limits(kernel["name"], target, 0)
        assert kernel["spilled"] <= spilled and kernel["fusion"] is False, what
        assert kernel["registers"] <= 256 and kernel["shared"] <= 16384, what
        assert_no_race(kernel, what, in_place=bool(kernel["in_place"]))
        if kernel["name"].startswith("update") and ", aligned" in kernel["name"]:
            assert set(kernel["writes"]) <= {"64", "128"} and kernel["writes"]["64"] == 1 + 4 * ("master" in what), what


def test_lion_takes_two_launches_and_reads_and_writes_128_bits_at_a_time():
    """Per element it reads a parameter, a gradient and an average, and writes two of them; 8 elements per thread."""
    found = compiled("compiled_lion.py")
    for name, size in (("float32", 4), ("bfloat16", 2)):
        kernel = found[name]["update"]
        assert found[name]["launches"] == ["prologue", "update"]
        assert kernel["spilled"] == kernel["shared"] == 0 and kernel["registers"] <= 64, kernel
        assert kernel["reads"]["128"] == 3 * 8 * size // 16 and kernel["writes"] == {"128": 2 * 8 * size // 16}, kernel
        assert found[name]["fusion"] is False
    assert found["compilations"] == 3  # the prologue once
