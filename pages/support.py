"""The support matrix: each cell is made from the tests that show it. A cell that no test shows says "not run"."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from perf import results

ROOT = Path(__file__).parent.parent
OPTIMIZERS = ("AdamW", "AdamWeightDecay", "Adafactor", "Lion")
NOT_RUN = "not run"

ON_A_GPU = "gpu:"
"""Before the ids of tests that ran on a GPU machine, as `perf.evidence` has recorded it."""

_FILES_OF_PARTS = {"tests that need a GPU": "test_gpu.py", "NCCL on one process": "test_one_process.py"}
"""Parts of `perf.evidence`, and a file all of whose tests have passed where the part is done."""


class Row(NamedTuple):
    """A line of the matrix.

    Attributes:
        what: as the page says it.
        tests: ids of the tests that show it, below `tests/`. `*` stands for anything and `@` for the optimizer's name.
            A mapping has patterns for some optimizers; the others have none.
        shown: the word of a cell that tests show.
    """

    what: str
    tests: Sequence[str] | Mapping[str, Sequence[str]]
    shown: str = "yes"

    def patterns(self, optimizer: str) -> Sequence[str]:
        return self.tests.get(optimizer, ()) if isinstance(self.tests, Mapping) else self.tests


def _of_dtype(dtype: str, backend: str) -> dict[str, Sequence[str]]:
    """Patterns of the tests of numbers, in one dtype on one backend."""
    golden = {"float32": ("golden[betas*", "golden[beta1*"), "float64": ("golden[float64*",) * 2}
    adamw, adafactor = golden.get(dtype, (f"golden_in_16_bits*[{dtype}*", f"golden[{dtype}*"))
    files = ("test_adamw.py", "test_adafactor.py")
    if backend == "triton":
        files = ("test_kernels_adamw.py", "test_kernels_adafactor.py")
    keras = {
        "float32": f"test_keras.py::test_golden[*-{backend}]",
        "float64": f"test_keras.py::test_golden[float64*-{backend}]",
    }.get(dtype, f"test_keras.py::test_clipped_is_clipped_by_hand[*-torch.{dtype}-{backend}]")
    return {
        "AdamW": (f"{files[0]}::test_{adamw}",),
        "AdamWeightDecay": (keras,),
        "Adafactor": (f"{files[1]}::test_{adafactor}",),
        "Lion": (f"test_lion.py::test_every_step_is_the_formula_in_float64_rounded_once[*-torch.{dtype}-{backend}]",),
    }


_DTYPES = ("float32", "float64", "bfloat16", "float16")
_CAPTURED = {
    "AdamW": ("test_capture.py::test_capture_eager_step_with_other_gradients_replay",),
    "AdamWeightDecay": ("test_rate_on_device.py::test_a_captured_schedule_goes_on_with_every_replay_that_counts",),
    "Adafactor": ("test_triton_adafactor.py::test_captured_steps_and_eager_ones_in_turn",),
    "Lion": ("test_capture.py::test_a_captured_step_of_lion_reads_rate_and_gradients_at_every_replay",),
}
_IN_BACKWARD, _SHARDED = "test_in_backward.py::test_", "test_sharding.py::test_"
_ACCELERATE, _LIGHTNING = "test_accelerate.py::test_", "test_lightning.py::test_"
_TRAINERS, _EVERYWHERE = "test_trainers.py::test_", "test_precision_everywhere.py::test_"

SECTIONS: Mapping[str, Sequence[Row]] = {
    "Numbers, by dtype of the parameters": (
        *(Row(f"{dtype}, eager on a CPU", _of_dtype(dtype, "eager")) for dtype in _DTYPES),
        *(Row(f"{dtype}, kernels in the interpreter", _of_dtype(dtype, "triton")) for dtype in _DTYPES),
        Row(
            "gradients of another dtype",
            ("test_gradients_of_another_dtype.py::test_they_count_with_all_their_digits[@-*",),
        ),
    ),
    "16-bit weights": (
        Row(
            "`master_weights`: the float32 run, bit for bit",
            ("test_master_weights.py::test_the_weights_are_those_of_the_float32_run[@*",),
        ),
        Row(
            "`master_weights`, kernels",
            ("test_master_weights.py::test_kernels*_have_the_weights_of_their_float32_run[@*",),
        ),
        Row(
            "`stochastic_rounding`: the same bits on both backends",
            {
                **dict.fromkeys(
                    OPTIMIZERS, ("test_stochastic_rounding.py::test_both_backends_have_the_same_bits[@-*",)
                ),
                "Adafactor": (
                    "test_stochastic_rounding.py::test_both_backends_of_adafactor_round_the_same_elements_up*",
                ),
            },
        ),
        Row(
            "`state_dtype=torch.bfloat16`",
            {
                **dict.fromkeys(
                    OPTIMIZERS,
                    ("test_state_dtype.py::test_bfloat16_moments_are_those_of_wide_ones_but_for_their_rounding[*@*",),
                ),
                "Adafactor": ("test_state_dtype.py::test_states_of_every_policy[@*",),
            },
        ),
        Row(
            "options that change between steps",
            ("test_state_dtype.py::test_options_may_be_switched_between_steps[*@*",),
        ),
        Row("shards that round as one process does", (f"{_SHARDED}four_processes_round_16_bits_as_one[@-*",)),
        Row("in a CUDA graph", (f"{_EVERYWHERE}a_captured_step_goes_on_as_eager_ones[*-@]",)),
        Row("step in backward", (f"{_EVERYWHERE}a_step_in_backward[@*",)),
    ),
    "Checkpoints": (
        Row("resuming from a file, eager", ("test_checkpoints.py::test_resuming_from_a_file[@-*eager-*",)),
        Row("resuming from a file, kernels", ("test_checkpoints.py::test_resuming_from_a_file[@-*triton-*",)),
        Row(
            "from one backend to the other",
            {
                **dict.fromkeys(
                    OPTIMIZERS, ("test_checkpoints.py::test_a_checkpoint_of_one_backend_is_one_of_the_other[@-*",)
                ),
            },
        ),
        Row(
            "every schedule, resumed with its optimizer",
            ("test_checkpoints.py::test_resuming_with_every_schedule[*-@*",),
        ),
        Row(
            "`torch.distributed.checkpoint`, nested and flat",
            ("test_checkpoints.py::test_resuming_through_a_folder_of_distributed_checkpoint[@-*",),
        ),
        Row(
            "a model that changes its dtype",
            ("test_checkpoints.py::test_resuming_in_a_model_that_changed_its_dtype[@*",),
        ),
    ),
    "Clipping, skipping, GradScaler": (
        Row("`max_grad_norm`, eager", ("test_guard.py::test_clipping_is_that_of_torch[*-@-*eager]",)),
        Row("`max_grad_norm`, kernels", ("test_guard.py::test_clipping_is_that_of_torch[*-@-*triton]",)),
        Row(
            "`skip_nonfinite`",
            ("test_guard.py::test_a_bad_gradient_anywhere_skips_the_step_as_a_whole[*-@-*",),
        ),
        Row("`skip_grad_norm_above`", ("test_skipping.py::test_a_bound_skips_what_is_above_it[*@*",)),
        Row(
            "all of the `skip_...` options: nothing changes",
            ("test_skipping.py::test_what_is_skipped_changes_nothing[*@*",),
        ),
        Row("GradScaler, with an overflow", ("test_guard.py::test_grad_scaler[step-@-*",)),
        Row("GradScaler, `unscale_` first", ("test_guard.py::test_grad_scaler[unscale_*-@-*",)),
    ),
    "Shards, on four CPU processes": (
        Row("7 layouts on 1- and 2-d meshes, eager", (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-*eager]",)),
        Row("4 of them, kernels", (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-*triton]",)),
        Row(
            "a model under FSDP2, with tensor parallel and without: trains, saves, resumes",
            (f"{_SHARDED}a_sharded_model_trains_saves_and_resumes[*-@*",),
        ),
        Row("all-reduces of a step, counted", (f"{_SHARDED}collective_operations_of_a_step[@-*",)),
        Row(
            "with `max_grad_norm`",
            {
                "AdamW": (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-clipped-*",),
                "AdamWeightDecay": (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-clipped-*",),
                "Adafactor": (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-beta1-*",),
                "Lion": (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-skipping-*",),
            },
        ),
        Row("with `skip_nonfinite`", (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-*skipping-*",)),
        Row(
            "with `clipvalue`, `clipnorm`, `global_clipnorm`",
            {"AdamWeightDecay": (f"{_SHARDED}four_processes_have_the_numbers_of_one[@-*clip*",)},
        ),
        Row(
            "NCCL on a GPU, one process",
            {
                name: (f"{ON_A_GPU}test_one_process.py::test_a_sharded_model_of_one_process_trains_like_a_whole_one",)
                for name in ("AdamW", "Adafactor", "Lion")
            },
        ),
    ),
    "CUDA graphs": (
        Row("capture and replay, with stand-in graphs on a CPU", _CAPTURED),
        Row(
            "capture and replay on a GPU",
            (f"{ON_A_GPU}test_gpu.py::test_capture_eager_step_with_other_gradients_replay",),
        ),
    ),
    "torch.compile": (
        Row("a compiled model", ("test_compile_step.py::test_a_compiled_model[@*",)),
        Row(
            "a compiled function with the step in it",
            (
                "test_compile_step.py::test_a_compiled_training_step[@-*",
                f"{_EVERYWHERE}a_compiled_training_step[@-*",
            ),
        ),
    ),
    "Step in backward": (
        Row("the numbers of `step()`, both backends", (f"{_IN_BACKWARD}the_numbers_are_those_of_step[@-*",)),
        Row("under FSDP2", (f"{_IN_BACKWARD}fsdp2_sums_the_gradients_before[@]",)),
        Row(
            "of a compiled model, also with compiled autograd",
            {"AdamW": ("test_compile_step.py::test_a_step_in_the_backward_of_a_compiled_model*",)},
        ),
        Row(
            "with accumulation",
            {"AdamW": (f"{_IN_BACKWARD}refuses_a_second_gradient_before_the_step_and_has_not_applied_it",)},
            shown="refused",
        ),
        Row("with a GradScaler", {"AdamW": (f"{_IN_BACKWARD}refuses_a_grad_scaler",)}, shown="refused"),
        Row("in DDP", {"AdamW": (f"{_IN_BACKWARD}refuses_distributed_data_parallel",)}, shown="refused"),
        Row(
            "with `max_grad_norm`, `skip_nonfinite` or `global_clipnorm`",
            (f"{_IN_BACKWARD}refuses_what_needs_all_gradients[*.@'>*",),
            shown="refused",
        ),
    ),
    "Trainers": (
        Row(
            "transformers' Trainer, `optimizers=`",
            {
                "AdamW": (f"{_TRAINERS}our_adamw_is_the_trainers_own",),
                "AdamWeightDecay": (f"{_TRAINERS}create_optimizers_pair_in_the_transformers_trainer",),
                "Adafactor": (f"{_TRAINERS}transformers_trainer[adafactor]",),
            },
        ),
        Row("transformers' Trainer, `optimizer_cls_and_kwargs=`", (f"{_TRAINERS}optimizer_cls_and_kwargs[@]",)),
        Row(
            "its schedule beside a rate that is a function of the step",
            {
                "AdamWeightDecay": (
                    f"{_TRAINERS}a_rate_that_is_a_function_of_the_step_and_the_trainers_schedule_exclude_each_other",
                )
            },
            shown="refused",
        ),
        Row("Accelerate equals a plain loop", (f"{_ACCELERATE}accelerate_does_what_a_plain_loop_does[@*",)),
        Row("Lightning equals a plain loop", (f"{_LIGHTNING}lightning_does_what_a_plain_loop_does[@*",)),
        Row("Accelerate's `save_state`", {"AdamW": (f"{_ACCELERATE}accelerate",)}),
        Row("Lightning's checkpoints, its manual optimization", {"AdamW": (f"{_LIGHTNING}lightning[*",)}),
        Row("Lightning in 16 bits", (f"{_LIGHTNING}lightning_in_16_bits_does_what_a_plain_loop_does[@*",)),
    ),
    "On a GPU": (
        Row('`backend="auto"` takes the kernels', {"AdamW": (f"{ON_A_GPU}test_gpu.py::test_a_gpu_gets_the_kernels",)}),
        Row("a step waits for nothing", (f"{ON_A_GPU}test_gpu.py::test_a_step_waits_for_nothing",)),
        Row("fifty replays equal fifty steps", (f"{ON_A_GPU}test_gpu.py::test_fifty_replays_under_a_schedule*",)),
        Row("steps on changing streams", (f"{ON_A_GPU}test_gpu.py::test_steps_on_changing_streams",)),
    ),
}
"""Tests marked `gpu` are deselected where there is no GPU: their cells are of the committed runs on GPUs."""


def files() -> list[str]:
    """Returns the test files that the rows name."""
    every = (p for rows in SECTIONS.values() for row in rows for name in OPTIMIZERS for p in row.patterns(name))
    return sorted({pattern.partition("::")[0] for pattern in every if not pattern.startswith(ON_A_GPU)})


def collect() -> list[str]:
    """Returns the ids of the tests of these files that run on this machine, below `tests/`."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-n", "0"]
    paths = [f"tests/{name}" for name in files()]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"the tests cannot be collected: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line] + passed_on_a_gpu()


def passed_on_a_gpu() -> list[str]:
    """Returns the tests, without parameters, of the parts in which none failed when a GPU machine was last at hand."""
    runs = [results.read(path) for path in results.COMMITTED.glob("*/parts.jsonl")]
    done = {record["part"] for run in runs for record in run if record["outcome"] == "done"}
    names = {name: (ROOT / "tests" / name).read_text() for part, name in _FILES_OF_PARTS.items() if part in done}
    return [
        f"{ON_A_GPU}{name}::{test}" for name, text in names.items() for test in re.findall(r"(?m)^def (test_\w+)", text)
    ]


def _found(pattern: str, optimizer: str, ids: Sequence[str]) -> list[str]:
    """Returns the ids that a pattern matches.

    >>> _found("a.py::test[@-*", "AdamW", ["a.py::test[AdamW-1]", "a.py::test[AdamWeightDecay-1]", "a.py::test[AdamW]"])
    ['a.py::test[AdamW-1]']
    """
    name = rf"(?<![A-Za-z0-9]){optimizer}(?![A-Za-z0-9])"
    wanted = re.compile(re.escape(pattern).replace(r"\*", ".*").replace("@", name))
    return [test for test in ids if wanted.fullmatch(test)]


def shown_by(row: Row, optimizer: str, ids: Sequence[str]) -> list[str]:
    """Returns the tests that show one cell."""
    return [test for pattern in row.patterns(optimizer) for test in _found(pattern, optimizer, ids)]


def table(ids: Sequence[str]) -> str:
    """Returns the matrix as Markdown, given the ids of the tests that run."""
    lines = []
    for section, rows in SECTIONS.items():
        lines += [f"## {section}", "", f"| | {' | '.join(OPTIMIZERS)} | shown by |", "|---|" + "---|" * 5]
        for row in rows:
            cells = [shown_by(row, name, ids) for name in OPTIMIZERS]
            words = [row.shown if tests else NOT_RUN for tests in cells]
            functions = dict.fromkeys(test.partition("[")[0] for tests in cells for test in tests)
            lines.append(f"| {row.what} | {' | '.join(words)} | {_listed(list(functions))} |")
        lines.append("")
    return "\n".join(lines).strip()


def _listed(functions: Sequence[str]) -> str:
    """Returns the subjects of the files, each once, with the test's name where there is only one."""
    files = dict.fromkeys(test.removeprefix(ON_A_GPU).partition(".py::")[0].removeprefix("test_") for test in functions)
    listed = ", ".join(f"`{name}`" for name in files)
    if len(functions) == 1:
        name = functions[0].partition("::")[2].removeprefix("test_").replace("_", " ")
        return f"{listed}: {name}"
    return listed or "-"
