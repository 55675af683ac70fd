"""Goals are judged rightly, and the commands of `perf` do what they say, evidence and sweeps included."""

import asyncio
import itertools
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch

from perf import bench, evidence, gate, measure, plans, providers, report, results, traffic, workloads
from perf.plans import COPY, Comparison, Goal
from perf.providers import Provider
from perf.results import Run

CPU = torch.device("cpu")
SMOKE = workloads.get("smoke")


# Goals.


def step_record(name, times, **more):
    where = {"kind": "step", "workload": "gpt_50m", "rule": "adamw", "provider": name, "status": "measured"}
    quantiles = measure.quantiles(times)
    milliseconds = {"step_ms": quantiles, "rounds_ms": times, "host_ms": quantiles, "rounds_host_ms": times}
    return {**where, **milliseconds, "params": 1_000_000, "floor_bytes": 28.0, **more}


def outcome(goal, *records):
    return plans.outcome(Comparison("gpt_50m", "adamw"), goal, Run(records))


def goal(limit, kind="speedup", theirs="torch fused", clock="step"):
    return Goal(theirs, limit, kind, clock)


OURS = step_record("fusedopt", [10.0, 20.0, 30.0, 10.0, 20.0])
THEIRS = step_record("torch fused", [20.0, 40.0, 66.0, 20.0, 44.0])


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (goal(1.9), 2.0, "met"),
        (goal(2.5), 2.0, "missed"),
        (goal(1.05, "time"), 0.5, "met"),
        (goal(0.4, "time"), 0.5, "missed"),
        (goal(1.0, clock="host"), 2.0, "met"),
    ],
    ids=str,
)
def test_goals_compare_round_by_round(goal, value, verdict):
    result = outcome(goal, OURS, THEIRS)
    assert result.value == pytest.approx(value, rel=0.11)
    assert result.verdict == verdict


def test_rounds_that_one_sat_out_are_not_compared():
    sat_out = step_record("torch fused", [20.0, 40.0], rounds_ms=[20.0, None, None, 60.0])
    result = outcome(goal(1.9), step_record("fusedopt", [10.0], rounds_ms=[10.0, 1.0, 1.0, 30.0]), sat_out)
    assert (result.value, result.low, result.high) == (2.0, 2.0, 2.0)


def test_who_is_slow_takes_part_more_rarely(monkeypatch):
    monkeypatch.setattr(gate, "check", lambda *args: gate.Verdict(0.0, 1.0))
    monkeypatch.setattr(traffic, "watch", lambda step: {})
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)

    class Slow(torch.optim.SGD):
        pass

    class Fast(torch.optim.SGD):
        pass

    def clock(step):
        milliseconds = 2.0 if isinstance(step.__self__, Slow) else 0.2
        return measure.Sample(milliseconds, milliseconds)

    rows = [Provider(make.__name__, "adamw", make) for make in (Fast, Slow)]
    monkeypatch.setattr(measure, "cpu_clock", clock)
    # A clock that each look at it moves on, so that a busy machine takes as many rounds.
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 0.002).__next__))
    fast, slow = measure.compare(SMOKE, rows, CPU, seconds=0.5)
    assert None not in fast["rounds_ms"]
    present = [i for i, ms in enumerate(slow["rounds_ms"]) if ms is not None]
    assert len(fast["rounds_ms"]) > measure.RARELY
    assert present == [0, 1, *range(measure.RARELY, len(fast["rounds_ms"]), measure.RARELY)]


def test_a_goal_of_bandwidth():
    # 28 MB in 20 ms are 1.4 GB/s.
    copy = {"kind": "copy", "bytes_per_second": 2e9}
    result = outcome(goal(0.4, theirs=COPY), OURS, copy)
    assert result.value == pytest.approx(0.7)
    assert (result.low, result.high) == pytest.approx((0.7 * 2 / 3, 1.4))
    assert result.verdict == "met"
    assert outcome(goal(0.6, theirs=COPY), OURS, copy).verdict == "met, unsure"
    assert outcome(goal(0.6, theirs=COPY), OURS).verdict == "not measured: copy: did not run"


def test_a_verdict_that_the_rounds_do_not_carry_is_unsure():
    few = outcome(goal(1.9), step_record("fusedopt", [10.0] * 4), step_record("torch fused", [20.0] * 4))
    assert few.verdict == "met, unsure"
    spread = [19.0, 19.5, 21.0, 22.0, 23.0, 24.0]
    mixed = outcome(goal(2.0), step_record("fusedopt", [10.0] * 6), step_record("torch fused", spread))
    assert (mixed.low, mixed.high) == (1.9, 2.4)
    assert mixed.verdict == "met, unsure"


def test_a_goal_without_measurement_says_why():
    missing = {**THEIRS, "status": "missing: torch fused is not there"}
    assert outcome(goal(1.0), OURS).verdict == "not measured: torch fused: did not run"
    assert outcome(goal(1.0), OURS, missing).verdict.endswith("missing: torch fused is not there")


def test_goals_name_what_exists():
    """And whom the plan compares: every goal stands beside its comparison."""
    for device in ("cpu", "cuda"):
        assert any(comparison.goals for comparison in plans.of_device(device))
    for comparison in [c for comparisons in plans.PLANS.values() for c in comparisons]:
        rows = {p.name: p for p in comparison.providers()}
        for g in comparison.goals:
            assert {g.ours, g.theirs} - {COPY} <= rows.keys(), g
            assert rows[g.ours].ours


@pytest.mark.parametrize("plan", plans.PLANS)
def test_plans_name_what_exists(plan):
    for comparison in plans.PLANS[plan]:
        workloads.get(comparison.workload)
        assert comparison.providers()


# The commands.


def test_the_benchmark_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)
    out = tmp_path / "results.jsonl"
    names = "fusedopt;torch fused;torch fused, captured"
    arguments = ["--workloads", "smoke", "--providers", names, "--seconds", "0", "--out", str(out), "--device", "cpu"]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    head, *records = results.read(out)
    assert head["kind"] == "environment"
    assert {"torch", "cpu", "commit", "date", "threads"} <= head.keys()
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["provider"] for r in steps] == names.split(";")
    assert {"min", "p25", "median", "p75", "n"} <= steps[0]["step_ms"].keys()
    assert steps[0]["error"] <= steps[0]["error_allowed"]
    assert "missing: does not run on cpu (torch fused, captured)" in printed
    assert "roofline:" in printed
    report.steps_picture(Run([head, *records])).savefig(tmp_path / "bars.png")
    assert "| fusedopt |" in report.text(Run([head, *records]), markdown=True)


@pytest.mark.parametrize("arguments", [["--workloads", "gpt3"], ["--workloads", "smoke", "--rules", "sgd"]])
def test_the_benchmark_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert "must be one of" in capsys.readouterr().err


def test_one_step_for_a_profiler(capsys):
    assert bench.main(["--once", "--workloads", "smoke", "--device", "cpu"]) == 0
    assert "fusedopt, adamw, smoke on cpu: finite" in capsys.readouterr().out


def test_results_survive_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"kind": "copy", "bytes_per_second": 1.0}\n{"kind": "st')
    assert results.read(file) == [{"kind": "copy", "bytes_per_second": 1.0}]


def test_committed_results_can_be_shown():
    for path in results.COMMITTED.glob("*/results.jsonl"):
        run = Run(results.read(path))
        (head,) = run.of("environment")[:1]
        assert {"torch", "triton", "date"} <= head.keys()
        assert run.device == "cpu" or {"gpu", "driver"} <= head.keys()
        assert report.text(run)


SWEEPS = {c.title: c for c in plans.PLANS["sweeps"]}


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
def test_sweeps_turn_knobs_that_exist(sweep, monkeypatch):
    monkeypatch.setattr(providers, "BACKEND", "auto" if torch.cuda.is_available() else "triton")
    rows = sweep.providers()
    assert len({row.name for row in rows}) == len(rows) > 1
    own = [resolve_name(path) for path, _ in sweep.sweep]
    assert [value for _, value in rows[0].constants] == own, "the code as it stands comes first"
    p = torch.ones(33, 17, requires_grad=True)
    p.grad = torch.ones_like(p)
    with rows[-1].setting():
        step, _ = replace(rows[-1], mode="eager").start([p])
        step()
    assert (p < 1).all()
    assert [resolve_name(path) for path, _ in sweep.sweep] == own


def test_a_sweep_is_a_comparison_of_its_own_in_the_report(capsys, monkeypatch):
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)
    records = []
    bench.run(plans.PLANS["smoke"], CPU, 0.0, records)
    assert list(Run(records).comparisons) == [("smoke", "adamw"), ("smoke", "adamw x BLOCK")]
    assert "BLOCK=1024" in capsys.readouterr().out


def stop_once_there(monkeypatch, file, seconds):
    """The time of a part that gets so many seconds is over once it has written this file, however slow the machine."""
    wait_for = asyncio.wait_for

    async def until_there(waiting, timeout):
        if timeout != seconds:
            return await wait_for(waiting, timeout)
        waiting.close()
        while not (file.exists() and file.read_text()):
            await asyncio.sleep(0.01)
        raise asyncio.TimeoutError

    monkeypatch.setattr(asyncio, "wait_for", until_there)


def test_evidence_goes_on_after_a_fault_and_ends_in_time(tmp_path, capsys, monkeypatch):
    stop_once_there(monkeypatch, tmp_path / "out" / "child", 0.5)
    parts = [
        evidence.Part("works", "echo measured > {out}/first", 10, enough=0),
        evidence.Part("faults", "sh -c 'exit 3'", 10, enough=0),
        evidence.Part("hangs", "sh -c 'sleep 60 & echo $! > {out}/child; wait'", 0.5, enough=0),
        evidence.Part("needs a tool", "no-such-tool {python}", 10, enough=0),
        evidence.Part("too late", "echo", 10, enough=1e6),
    ]
    start = time.monotonic()
    summary = evidence.run(parts, tmp_path / "out", minutes=1)
    assert time.monotonic() - start < 30
    assert [s["outcome"] for s in summary] == [
        "done",
        "failed with exit code 3",
        "stopped after 0 s",
        "left out: no-such-tool is not there",
        "left out: no time was left",
    ]
    assert results.read(tmp_path / "out" / "parts.jsonl") == summary
    assert (tmp_path / "out" / "first").read_text() == "measured\n"
    child = (tmp_path / "out" / "child").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True, check=False).stdout
    assert state[:1] in ("", "Z"), "what a part started ends with it"


def test_what_only_checks_runs_side_by_side_before_what_measures(tmp_path):
    waits = "sh -c 'until [ -e {{out}}/{other} ]; do sleep 0.1; done; touch {{out}}/{own}'"
    parts = [
        evidence.Part("first", "touch {out}/0", 120, enough=0, checks=True),
        evidence.Part("waits for the third", waits.format(own=1, other=2), 120, enough=0, checks=True),
        evidence.Part("third", "touch {out}/2", 120, enough=0, checks=True),
        evidence.Part("measures", "sh -c 'test -e {out}/1'", 120, enough=0),
        evidence.Part("measures too", "touch {out}/4", 120, enough=0),
    ]
    summary = evidence.run(parts, tmp_path, minutes=5)
    assert [(s["part"], s["outcome"]) for s in summary] == [(part.name, "done") for part in parts]


def test_a_part_that_is_stopped_may_say_what_it_has_found(tmp_path, monkeypatch):
    stop_once_there(monkeypatch, tmp_path / "ready", 1.0)
    says = "sh -c 'trap \"echo two failed; exit 1\" INT; echo running | tee {out}/ready; while :; do sleep 0.1; done'"
    (end,) = evidence.run([evidence.Part("tests", says, 1.0, enough=0)], tmp_path, minutes=1)
    assert end["outcome"] == "stopped after 1 s"
    assert "running\ntwo failed\n" in (tmp_path / "log.txt").read_text()


def test_only_the_parts_that_are_named(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(evidence, "run", lambda parts, *_: started.extend(parts) or [])
    evidence.main(["--out", str(tmp_path), "--parts", "sweeps", "NCCL on one process"])
    assert [part.name for part in started] == ["NCCL on one process", "sweeps", "report"]


def test_a_program_of_a_wheel_is_found_and_run(tmp_path, monkeypatch):
    """compute-sanitizer comes with a toolkit, or in a wheel that puts nothing on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'empty'}:/usr/bin:/bin")
    assert evidence.program("a-sanitizer") is None
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "a-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\necho "$@"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert evidence.program("a-sanitizer") is None, "it cannot be executed"
    tool.chmod(0o755)
    assert evidence.program("a-sanitizer") == str(tool)
    part = evidence.Part("checked", "a-sanitizer --tool memcheck {python}", 10, enough=0)
    assert [p["outcome"] for p in evidence.run([part], tmp_path / "out", minutes=1)] == ["done"]
    assert "--tool memcheck" in (tmp_path / "out" / "log.txt").read_text()


def test_the_evidence_has_all_sanitizers_over_all_kernels():
    names = {part.name for part in evidence.GPU_PARTS}
    assert {f"{tool}, {rule}" for tool in ("memcheck", "racecheck", "initcheck") for rule in RULES_RUN} <= names
    assert {"tests that need a GPU", "NCCL on one process"} <= names


RULES_RUN = ("adamw", "adamw, clipped", "adafactor", "lion")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real evidence runs where there is a GPU")
def test_the_whole_of_the_evidence_in_small(tmp_path):
    """Every command that the evidence starts on a GPU machine, on tiny tensors in Triton's interpreter."""
    code = evidence.main(["--smoke", "--minutes", "4", "--out", str(tmp_path / "out")])
    assert code == 0, (tmp_path / "out" / "log.txt").read_text()
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {
        "log.txt",
        "parts.jsonl",
        "results.jsonl",
        "static.jsonl",
        "report.md",
        "performance.png",
    }


def test_the_evidence_wants_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        evidence.main(["--out", "nowhere"])
    assert "there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_the_documented_numbers_are_those_of_the_committed_run(name):
    document = (Path(__file__).parent.parent / name).read_text()
    run = Run(results.read(results.COMMITTED / "cpu" / "results.jsonl"))
    assert report.between_marks(document, run) == document, "run the command that stands below the table"
    with pytest.raises(ValueError, match="needs the marks"):
        report.between_marks("no marks", run)
