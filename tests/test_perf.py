"""The benchmarks measure what they say: no number for a wrong result, nothing dropped, goals judged rightly."""

import doctest
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.compiled import in_every_run

import fusedopt
from fusedopt.reference import ReferenceAdamW
from fusedopt.statistics.values import QUANTITIES
from perf import cases, gate, measure, providers, report, results, static_report, traffic, workloads
from perf.peers import Float32Copy, FusedWithStatistics
from perf.providers import Provider

CPU = torch.device("cpu")
SMOKE = workloads.get("smoke")


def provider(make, **kwargs):
    return Provider("under test", "adamw", make, like_torch=True, **kwargs)


def loop(**changes):
    return lambda params: torch.optim.AdamW(params, **{**providers.ADAM, "foreach": False, **changes})


DOCUMENTED = [measure, results]


@pytest.mark.parametrize("module", DOCUMENTED, ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


# Workloads.


@pytest.mark.parametrize(
    ("name", "tensors", "params"),
    [  # as the models' authors publish them
        ("gpt2", 148, 124_439_808),
        ("bert_base", 199, 109_482_240),
        ("resnet50", 161, 25_557_032),
        ("vit_l", 296, 304_326_632),
        ("llama2_7b", 291, 6_738_415_616),
        ("gpt_50m", 90, 49_897_472),
        ("tiny_2000", 2000, 128_000),
        ("embedding_2g4", 1, 2_400_000_000),
    ],
)
def test_workloads_are_the_models_they_are_named_after(name, tensors, params):
    workload = workloads.get(name)
    assert (workload.tensors, workload.params) == (tensors, params)


def test_a_workload_gives_its_layout_and_dtype():
    conv = workloads.get("resnet50").empty((8, 4, 3, 3), CPU)
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert workloads.get("llama2_7b").empty((2, 2), CPU).dtype == torch.bfloat16
    assert workloads.get("gpt2:bfloat16").empty((2, 2), CPU).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt3", "gpt2:bfloat17", "gpt2:nn"])
def test_a_workload_that_is_none(name):
    with pytest.raises(ValueError, match=r"must be"):
        workloads.get(name)


# The gate.

RIGHT = [p for p in providers.PROVIDERS if p.missing(CPU) is None]


@pytest.mark.parametrize("row", RIGHT, ids=lambda p: f"{p.rule} - {p.name}")
@pytest.mark.parametrize("name", ["smoke", "smoke:bfloat16"])
def test_what_is_right_passes_the_gate(row, name):
    verdict = gate.check(row, workloads.get(name), CPU)
    assert verdict.passed, verdict


class SkipsTheTail(torch.optim.AdamW):
    """A kernel that forgets the last element of each tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        ends = [p.flatten()[-1].clone() for p in self.param_groups[0]["params"]]
        super().step(closure)
        for p, end in zip(self.param_groups[0]["params"], ends):
            p.view(-1)[-1] = end


WRONG = {
    "a rate 1 % too high": loop(lr=1.01 * providers.LR),
    "eps in the other place": lambda params: ReferenceAdamW(params, lr=providers.LR, eps=1e-4, weight_decay=0.0),
    "no bias correction": lambda params: ReferenceAdamW(params, lr=providers.LR, correct_bias=False),
    "the last element left out": lambda params: SkipsTheTail(params, **providers.ADAM),
    "beta2 a little off": loop(betas=(0.9, 0.995)),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_what_is_wrong_gets_no_number(make):
    (record,) = measure.compare(SMOKE, [provider(make)], CPU, seconds=0.0)
    assert record["status"].startswith("wrong here: off by")
    assert "step_ms" not in record


def test_a_wrong_rate_in_bfloat16_is_caught_too():
    assert not gate.check(provider(loop(lr=1.3 * providers.LR)), workloads.get("smoke:bfloat16"), CPU).passed


def test_the_gate_sees_every_distinct_shape_of_a_workload():
    sample = gate.sample(workloads.get("gpt2"))
    assert [s[1:] for s in sample] == [s[1:] for s in dict.fromkeys(workloads.get("gpt2").shapes)]
    assert sum(map(torch.Size.numel, map(torch.Size, sample))) <= gate.BUDGET


# Measuring.


def test_gradients_are_new_tensors_at_new_addresses_at_every_step():
    problem = measure.Problem(SMOKE, CPU, sets=2)
    problem.set_grads()
    first = [p.grad for p in problem.params]
    problem.set_grads()
    assert all(p.grad is not g and p.grad.data_ptr() != g.data_ptr() for p, g in zip(problem.params, first))


def test_a_clipped_gradient_has_its_norm_again_for_the_next_provider():
    problem = measure.Problem(SMOKE, CPU, sets=2)
    problem.set_grads()
    before = torch.nn.utils.clip_grad_norm_(problem.params, 1e-3)
    problem.restore_norm()
    after = torch.nn.utils.get_total_norm([p.grad for p in problem.params])
    assert_near(after, before, rtol=1e-3, atol=0.0)


def test_providers_take_turns_and_each_leads_a_round(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            order.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(gate, "check", lambda *args: gate.Verdict(0.0, 1.0))
    monkeypatch.setattr(traffic, "watch", lambda step: {})
    rows = [provider(lambda params, lr=lr: Noted(params, lr=lr)) for lr in (1.0, 2.0)]
    rows = [Provider(**{**vars(row), "name": str(i)}) for i, row in enumerate(rows)]
    # A clock that each look at it moves on, so that a busy machine takes as many rounds.
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 0.002).__next__))
    measure.compare(SMOKE, rows, CPU, seconds=0.5)
    turns = [lr for lr, before in zip(order, [None, *order]) if lr != before]
    assert turns[:3] == [1.0, 2.0, 1.0]
    warm_up_and_first = order[: order.index(2.0)]
    assert len(warm_up_and_first) == 2 + measure.MIN_STEPS
    second = next(list(steps) for lr, steps in itertools.groupby(order) if lr == 2.0)
    assert len(second) == 2 + 2 * measure.MIN_STEPS, "who comes last in a round leads the next"


def test_what_is_missing_or_fails_is_listed_with_its_reason():
    def refuses(params):
        raise RuntimeError("no such device")

    rows = [
        Provider("absent", "adamw", "no_such_package.AdamW"),
        Provider("removed", "adamw", "torch.optim.NoSuchAdamW"),
        Provider("elsewhere", "adamw", loop(), devices=("cuda",)),
        Provider("fails", "adamw", refuses),
        Provider("there", "adamw", "torch.optim.AdamW", providers.ADAM, like_torch=True),
    ]
    records = measure.compare(SMOKE, rows, CPU, seconds=0.0)
    assert [r["status"] for r in records] == [
        "missing: no_such_package.AdamW is not there",
        "missing: torch.optim.NoSuchAdamW is not there",
        "missing: does not run on cpu",
        "failed: RuntimeError: no such device",
        "measured",
    ]
    table = report.steps_table(records, results.Run(records))
    assert all(f"({row.name})" in table for row in rows[:4])


def test_constants_hold_during_a_step_and_not_after_it():
    constants = (("perf.gate.BUDGET", 7),)
    seen = []

    class Notes(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(gate.BUDGET)

    row = provider(Notes, constants=constants)
    step, _ = row.start([torch.ones(1, requires_grad=True)])
    before = gate.BUDGET
    with row.setting():
        step()
    assert (seen, gate.BUDGET) == ([7], before)


def test_a_float32_copy_has_the_weights_of_a_float32_run():
    torch.manual_seed(0)
    starts = [torch.randn(5, 4).bfloat16(), torch.randn(3).bfloat16()]
    grads = [torch.randn_like(s) for s in starts]
    weights, exact = [s.clone().requires_grad_() for s in starts], [s.float().requires_grad_() for s in starts]
    for p, e, g in zip(weights, exact, grads):
        p.grad, e.grad = g, g.float()
    copied, plain = Float32Copy(weights, **providers.ADAM), torch.optim.AdamW(exact, **providers.ADAM, fused=True)
    for _ in range(3):
        copied.step()
        plain.step()
    assert_same([p.detach() for p in weights], [e.detach().bfloat16() for e in exact])


def test_statistics_by_torchs_operations_are_those_that_ours_tracks():
    torch.manual_seed(0)
    starts = [0.1 * torch.randn(5, 4), 0.1 * torch.randn(3)]
    theirs, ours = ([s.clone().requires_grad_() for s in starts] for _ in range(2))
    for p, q in zip(theirs, ours):
        p.grad = q.grad = torch.randn_like(p)
    tracked = fusedopt.AdamW(ours, **providers.ADAM, convention="torch", track_statistics=True)
    tracked.step()
    columns = [QUANTITIES.index(n) for n in ("grad_norm", "weight_norm", "update_norm", "largest_update")]
    found = FusedWithStatistics(theirs, **providers.ADAM).step().T
    assert_near(found.double(), tracked.statistics.tensor[:, columns].double(), rtol=1e-4, atol=0.0)


class FakeCuda:
    """Stands in for `torch.cuda`: events tell the time of a clock that steps and sleeps move on."""

    def __init__(self, monkeypatch):
        self.now, self.slept, fake = 0.0, [], self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                self.at = fake.now

            def elapsed_time(self, other):
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)

    def step(self):
        self.now += 3.0


def test_the_gpu_clock_looks_at_an_idle_device_and_at_a_busy_one(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    sample = measure.CudaClock()(cuda.step)
    assert (sample.step, sample.device) == (3.0, 3.0)
    assert 0.0 < sample.host < 3.0
    assert len(cuda.slept) == 1


def test_launches_are_counted_apart_from_copies():
    on_device, on_host = measure.DeviceType.CUDA, measure.DeviceType.CPU
    span = SimpleNamespace(elapsed_us=lambda: 1500.0)
    names = [("update", on_device), ("Memcpy HtoD", on_device), ("Memset", on_device), ("aten::add", on_host)]
    events = [SimpleNamespace(name=n, device_type=d, time_range=span) for n, d in names]
    assert measure.launches(events) == {"launches": 1, "copies": 2, "kernel_ms": 1.5}


def test_a_captured_step_passes_the_gate_from_its_start(monkeypatch):
    """Capturing takes steps of its own, which must not count. The stand-in graph replays the step."""
    graphs = []

    class Graph:
        def replay(self):
            self.step()

    @contextmanager
    def capture(graph):
        graphs.append(graph)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)

    def make(params):
        optimizer = torch.optim.AdamW(params, **providers.ADAM)
        Graph.step = staticmethod(optimizer.step)
        return optimizer

    row = provider(make, mode="captured")
    assert gate.check(row, SMOKE, CPU).passed
    assert len(graphs) == 1


# What eager steps move.


def counted(step):
    c = traffic.watch(step)
    return c["operations"], c["read_bytes"], c["written_bytes"]


def test_bytes_are_those_of_distinct_elements_read_and_written():
    a, b = torch.zeros(100), torch.zeros(100)
    assert counted(lambda: a.mul_(2)) == (1, 400, 400)
    assert counted(lambda: a + b) == (1, 800, 400)
    assert counted(lambda: a * a) == (1, 400, 400)
    assert counted(lambda: a.copy_(b)) == (1, 400, 400)
    assert counted(lambda: a.zero_()) == (1, 0, 400)
    assert counted(lambda: torch.add(a, b, out=a)) == (1, 800, 400)
    assert counted(lambda: a.view(10, 10).t().reshape(-1)[3:].detach()) == (1, 400, 400)
    assert counted(lambda: torch._foreach_add_([a, b], 1.0)) == (1, 800, 800)
    assert counted(lambda: torch.zeros(1).expand(100) * a)[1:] == (404, 404)


def test_temporaries_are_those_alive_at_once():
    a = torch.zeros(100)

    def step():
        b = a + 1
        c = b + 1
        del b
        return float((c + 1)[0])

    assert traffic.watch(step)["temporary_bytes"] == 800


def test_the_record_of_a_provider_says_what_its_step_moves():
    """The original's loop makes eight passes over float32 tensors: 80 bytes per parameter, where 28 are enough."""
    (row,) = providers.of("adamw", ["transformers 4.34 loop"])
    (record,) = measure.compare(workloads.get("equal"), [row], CPU, seconds=0.0)
    per_tensor = record["operations"] / record["tensors"]
    per_parameter = [record[key] / record["params"] for key in ("read_bytes", "written_bytes", "state_bytes")]
    assert (per_tensor, *per_parameter) == (8, 48, 32, 8)


@pytest.mark.parametrize(
    ("rule", "dtype", "bytes_"),
    [
        ("adamw", torch.float32, 28),
        ("adamw", torch.bfloat16, 14),
        ("adamw, clipped", torch.float32, 32),
        ("adafactor", torch.float32, 24),
        ("adafactor", torch.bfloat16, 12),
        ("lion", torch.float32, 20),
    ],
)
def test_the_roofline_of_every_update(rule, dtype, bytes_):
    assert providers.RULES[rule].floor(dtype) == bytes_


# What kernels move.


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="counted in Triton's interpreter, which is off where there is a GPU"
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=f"{case.rule}, {case.name}",
            marks=[pytest.mark.slow] * (case.name != "float32" and not in_every_run(case)),
        )
        for case in static_report.of_one_dtype(cases.CASES)
    ],
)
def test_a_kernel_moves_no_more_than_it_must(case):
    row = static_report.count(case)
    assert row["ok"], f"moves {row['moved']:.2f} bytes per parameter where {row['floor']} are enough: {row['bytes']}"
    assert row["moved"] >= case.floor * 0.999, "counts too little"


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="counted in Triton's interpreter, which is off where there is a GPU"
)
def test_a_step_that_goes_over_its_tensors_twice_is_caught():
    class Twice(fusedopt.AdamW):
        def step(self, closure=None):
            super().step()
            super().step()

    traced = traffic.trace(lambda params: Twice(params, backend="triton"), [(32, 16)], torch.float32)
    assert traced.kernels == ["prologue", "update"] * 2
    moved = {owner: [traced.total(access, owner) for access in ("read", "written")] for owner in ("gradient", "state")}
    assert moved == {"gradient": [2 * 4 * 512, 0], "state": [2 * 8 * 512, 2 * 8 * 512]}
    assert traced.bytes["prologue", "read", "gradient"] == 0


def test_a_kernel_that_moves_too_much_is_marked_in_the_table():
    moved = {owner: [4.0, 4.0] for owner in traffic.OWNERS}
    row = {"kind": "traffic", "rule": "adamw", "case": "float32", "launches": 2, "bytes": moved, "moved": 24.0}
    text = report.text(results.Run([{**row, "floor": 12.0, "ok": False, "verdict": "MOVES TOO MUCH"}]))
    assert "4.0 + 4.0  4.0 + 4.0  4.0 + 4.0  24.0   12    MOVES TOO MUCH" in text


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="counted in Triton's interpreter, which is off where there is a GPU"
)
def test_a_case_that_moves_more_than_its_floor_is_not_ok():
    case = cases.Case("adamw", "float32", extra=-4)
    assert not static_report.count(case)["ok"]
