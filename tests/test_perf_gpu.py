"""What a GPU machine measured: the hardware's counts are read rightly, and documents show the committed run."""

import re
from pathlib import Path

import pytest

from perf import counters, report, results
from perf.results import Run

ROOT = Path(__file__).parent.parent

HEAD = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def launch(number, kernel, us, read, written, of_peak, registers):
    """The lines of ncu for one launch."""
    values = (
        ("dram__bytes_read.sum", "Mbyte", f"{read:,.1f}"),
        ("dram__bytes_write.sum", "byte", f"{written:,}"),
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", of_peak),
        ("gpu__time_duration.sum", "ns", f"{1000 * us:,}"),
        ("launch__registers_per_thread", "register/thread", registers),
    )
    return [f'"{number}","7","{kernel}","{name}","{unit}","{value}"' for name, unit, value in values]


def test_counts_of_one_step_are_per_parameter():
    lines = [
        *("==PROF== Connected to process 7", "fusedopt, adamw, equal on cuda: finite", HEAD),
        *launch(0, "update", 20, read=4.0, written=1_048_576, of_peak=50, registers=48),
        *launch(1, "finish", 5, read=0.0, written=0, of_peak=1, registers=30),
        *launch(2, "update", 60, read=1004.0, written=1_048_576, of_peak=90, registers=40),
        "==PROF== Disconnected",
    ]
    update, finish, everything = counters.read(lines, "equal", "adamw")  # of 4 x 256 x 256 parameters
    assert (update["kernel"], update["launches"], update["us"]) == ("update", 2, 80.0)
    assert update["read"] == pytest.approx(1008e6 / 4 / 65536) and update["written"] == 8.0
    assert (update["of_peak"], update["registers"]) == (90.0, 40.0), "those of the longest launch"
    assert (finish["kernel"], finish["us"], finish["registers"]) == ("finish", 5.0, 30.0)
    assert (everything["launches"], everything["us"], everything["written"]) == (3, 85.0, 8.0)
    assert "of_peak" not in everything
    table = report.text(Run([update, finish, everything]))
    assert "update  2         80.0" in table and "all     3         85.0" in table


def test_an_unknown_unit_is_an_error():
    lines = [HEAD, *launch(0, "update", 1, 1.0, 1, 1, 1)]
    with pytest.raises(KeyError, match="furlong"):
        counters.read([line.replace('"ns"', '"furlong"') for line in lines], "equal", "adamw")


def test_where_nothing_was_counted_ncu_says_why():
    with pytest.raises(ValueError, match=r"no launch(.|\n)*ERR_NVGPUCTRPERM"):
        counters.read(["==PROF== Connected to process 7\n", "==ERROR== ERR_NVGPUCTRPERM\n"], "equal", "adamw")


def step(provider, ms, workload="gpt2", **fields):
    record = {"kind": "step", "rule": "adamw", "workload": workload, "provider": provider, "dtype": "float32"}
    record |= {"params": 2_000_000, "tensors": 1, "floor_bytes": 28.0, "status": "measured"}
    return {**record, "device_ms": {"median": ms}, **fields}


def test_shares_are_of_the_best_copy_and_of_the_devices_time():
    run = Run(
        [
            {"kind": "environment", "device": "cuda", "gpu": "A GPU", "date": "today"},
            *({"kind": "copy", "bytes_per_second": speed} for speed in (0.9e12, 1e12, 0.8e12)),
            step("fusedopt", 0.064),  # 56 MB, which the copy moves in 0.056 ms
            step("clip_grad_norm_ + torch fused", 0.112),
            step("fusedopt, captured", 0.060),
            step("torch foreach", 0.56),
            step("fusedopt", 0.001, workload="tiny_300", params=100),
            step("fusedopt, BLOCK=1", 0.001, sweep="adamw x BLOCK"),
        ]
    )
    head, *rows = report.shares_table(run, markdown=True).splitlines()
    cells = dict(zip(map(str.strip, head.split("|")), map(str.strip, rows[1].split("|"))))
    assert len(rows) == 2
    assert (cells["fusedopt"], cells["torch fused"], cells["torch foreach"]) == ("87.5%", "50.0%", "10.0%")
    assert cells["optimi"] == "" and cells["parameters"] == "gpt2, float32"


def test_times_in_the_notes_are_those_of_the_committed_runs():
    """Those with three digits, which are milliseconds of the device."""
    notes = (ROOT / "perf" / "NOTES.md").read_text().partition("\n## On an H100\n")[2].partition("\n## ")[0]
    said = re.findall(r"\b\d+\.\d{3}\b", notes)
    assert len(said) > 20
    runs = [Run(results.read(path)) for path in (results.COMMITTED / "h100").rglob("*.jsonl")]
    measured = {f"{r['device_ms']['median']:.3f}" for run in runs for r in run.of("step") if "device_ms" in r}
    assert [number for number in said if number not in measured] == []


GPUS = sorted(folder for folder in results.COMMITTED.iterdir() if folder.is_dir() and folder.name != "cpu")


@pytest.mark.parametrize("folder", GPUS, ids=lambda folder: folder.name)
@pytest.mark.parametrize(
    ("page", "file"),
    [("README.md", "results"), ("docs/gpu.md", "results"), ("docs/gpu.md", "counters")],
)
def test_documents_show_the_committed_run(page, file, folder):
    document = (ROOT / page).read_text()
    run = Run(results.read(folder / f"{file}.jsonl"))
    assert report.between_marks(document, run) == document, "python -m perf.report FILE --into README.md docs/gpu.md"
