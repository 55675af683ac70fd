"""Steps that are skipped for the norm of their gradients: above a bound, and as outliers. See also test_guard.py."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from helpers.comparing import assert_near, assert_same, same
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS, every_optimizer
from helpers.waits import Waits
from torch.distributed.checkpoint import state_dict as dcp

from fusedopt import AdamW, LRRecorder, create_optimizer
from fusedopt.backends.eager.verdict import Verdict as EagerVerdict
from fusedopt.interface import StepArgs
from fusedopt.optimizer.clipping import Guard
from fusedopt_kernels import rules

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

CPU = torch.device("cpu")
WARM = (100.0, 10.0, 1.0)
"""The count, mean and variance of norms after a warm-up: with K = 3, norms above 13 are outliers."""

NORMS = [10.0, 14.0, 9.0, math.nan, 11.0, 1e9, math.inf, 12.0, 0.0, 10.5]
REASONS = {"nonfinite": 2, "grad_norm_above": 0, "outliers": 2}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), ()]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params, norm):
    """All elements alike, of this common norm."""
    numel = sum(p.numel() for p in params)
    return [torch.full_like(p, norm / math.sqrt(numel)) for p in params]


def step(optimizer, norm):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients(params, norm)):
        p.grad = g
    optimizer.step()


def average(optimizer):
    return optimizer.state_dict()["param_groups"][0]["grad_norm_average"]


def warmed_up(optimizer, moments=WARM):
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["grad_norm_average"] = moments
    optimizer.load_state_dict(saved)
    return optimizer


def snapshot(optimizer):
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((params, optimizer.state_dict()["state"]))


class Ledger:
    """What should come out, from all norms that entered, each with its weight."""

    def __init__(self, above=math.inf, deviations=3.0):
        self.above, self.deviations, self.entered = above, deviations, []

    def moments(self):
        """Mean and variance: the first hundred weigh the same, after which a new one weighs 1 %."""
        weights = np.array([])
        for n in range(1, len(self.entered) + 1):
            weight = max(1.0 / n, 0.01)
            weights = np.append(weights * (1.0 - weight), weight)
        values = np.array(self.entered, np.longdouble)
        mean = (weights * values).sum()
        return float(mean), float((weights * np.square(values - mean)).sum())

    def __call__(self, norm):
        mean, variance = self.moments()
        warm = len(self.entered) >= 100
        usual = mean + self.deviations * max(math.sqrt(variance), 0.01 * mean) if warm else math.inf
        if not math.isfinite(norm):
            return "nonfinite"
        if norm > 0.0:
            self.entered.append(min(norm, self.above, usual))
        return "grad_norm_above" if norm > self.above else "outliers" if norm > usual else None


def judged(norms, above=math.inf, deviations=3.0, ledger=None):
    """The reasons of the rule, and what it leaves."""
    ledger = torch.zeros(6, dtype=torch.float64) if ledger is None else ledger
    verdict = EagerVerdict(CPU)
    limits = rules.Limits(above, deviations)
    flags = [int(verdict(torch.tensor(x, dtype=torch.float64), None, ledger, limits)) for x in norms]
    return [(None, *rules.REASONS)[flag] for flag in flags], ledger


@pytest.mark.parametrize("above", [math.inf, 14.0])
def test_the_rule_is_that_of_all_norms_with_their_weights(above):
    """With spikes, NaN, a lasting change of level and norms of 0."""
    generator = np.random.default_rng(0)
    norms = [*(10 + generator.normal(size=150)), 50.0, math.nan, *(10 + generator.normal(size=50)), math.inf, 0.0]
    norms += [*(25 + generator.normal(size=150)), 1e30, *(3 + 0.1 * generator.normal(size=100))]
    reference = Ledger(above)
    reasons, ledger = judged(norms, above)
    assert reasons == [reference(norm) for norm in norms]
    assert {"nonfinite", "outliers" if above == math.inf else "grad_norm_above"} <= {*reasons}
    assert ledger[:3].tolist() == [reasons.count(reason) for reason in rules.REASONS]
    assert ledger[3:].tolist() == pytest.approx([len(reference.entered), *reference.moments()], rel=1e-12)


@pytest.mark.slow
def test_the_averages_lose_no_digits():
    """Norms that vary by a millionth: sums of squares would have lost it."""
    norms = 1.0 + 1e-6 * np.random.default_rng(0).normal(size=20_000)
    _, ledger = judged(norms, deviations=1e9)
    assert ledger[4].item() == pytest.approx(1.0, rel=1e-6)
    assert math.sqrt(ledger[5].item()) == pytest.approx(1e-6, rel=0.2)


@pytest.mark.parametrize(
    "factor, deviations, longest", [(1.5, 1.5, 110), (1.5, 6.0, 3), (10.0, 3.0, 110), (10.0, 6.0, 30), (1e6, 3.0, 500)]
)
def test_a_lasting_change_of_level_is_not_skipped_for_ever(factor, deviations, longest):
    noise = 1.0 + 0.05 * np.random.default_rng(0).normal(size=900)
    reasons, _ = judged([*noise[:200], *(factor * noise[200:])], deviations=deviations)
    after = reasons[200:]
    met = next(i for i, reason in enumerate(after) if reason is None)
    assert longest / 2 < met <= longest
    assert after[met + 50 :].count("outliers") < 0.2 * len(after[met + 50 :])


def test_norms_that_never_varied_have_no_outliers_in_a_small_change():
    """As after clip_grad_norm_, and the level they change to is met as well."""
    reasons, _ = judged([1.0] * 150 + [1.02] * 10 + [2.0] * 200)
    assert reasons[:160] == [None] * 160 and reasons[160] == "outliers" and reasons[-1] is None


def test_a_spike_hardly_moves_what_is_usual():
    quiet = [10.0 + 0.1 * (-1) ** i for i in range(200)]
    _, without = judged(quiet)
    reasons, ledger = judged([*quiet, 1e12])
    assert reasons[-1] == "outliers"
    assert ledger[4] < without[4] * 1.001 and ledger[5].sqrt() < without[5].sqrt() * 1.1


def test_the_warm_up_only_measures():
    reasons, ledger = judged([1.0] * 50 + [100.0] * 49)
    assert reasons == [None] * 99 and ledger[3] == 99
    assert judged([1.0] * 99 + [100.0])[0] == [None] * 100
    assert judged([1.0] * 100 + [100.0])[0][-1] == "outliers"


@NEEDS_TRITON
def test_the_kernel_has_the_bits_of_the_rule(device):
    from fusedopt.backends.triton.verdict import Verdict

    verdict = Verdict(device)
    for above, deviations, moments in (
        (math.inf, math.inf, (0.0, 0.0, 0.0)),
        (12.5, math.inf, (0.0, 0.0, 0.0)),
        (math.inf, 3.3, WARM),
        (1e3, 2.1, (99.0, 1 / 3, 1e-9)),
    ):
        limits = rules.Limits(above, deviations)
        ledgers = [torch.tensor([0, 0, 0, *moments], dtype=torch.float64) for _ in range(2)]
        ledgers[0] = ledgers[0].to(device)
        for i, x in enumerate([*NORMS, 1e200, 0.1, 1 / 3]):
            norm = torch.tensor(x, dtype=torch.float64)
            found = None if i % 3 else torch.tensor(float(i % 2))
            flag = verdict(norm.to(device), found if found is None else found.to(device), ledgers[0], limits)
            assert_same(flag, EagerVerdict(CPU)(norm, found, ledgers[1], limits), str(x))
            assert_same(*ledgers, str(x))
        assert deviations > 3.3 or ledgers[1][:3].sum() > 2


@every_optimizer
@pytest.mark.parametrize(
    "dtype, backend", [(torch.bfloat16, "eager"), *((torch.float32, b) for b in ("eager", "triton"))]
)
def test_what_is_skipped_changes_nothing(name, backend, dtype):
    """And is counted, for its reason; the other steps are those of an optimizer without guards."""
    options = {} if dtype == torch.float32 else {"master_weights": True}
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = warmed_up(OPTIMIZERS[name](ours, skip_outliers=3.0, backend=backend, **options))
    plain = OPTIMIZERS[name](theirs, backend=backend, **options)
    for norm in NORMS:
        before = snapshot(optimizer)
        skipped = int(optimizer.skipped_steps)
        step(optimizer, norm)
        if int(optimizer.skipped_steps) > skipped:
            assert_same(snapshot(optimizer), before, str(norm))
        else:
            step(plain, norm)
    assert dict(optimizer.skipped_steps) == REASONS
    assert_same(snapshot(optimizer), snapshot(plain))


@every_optimizer
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bound_skips_what_is_above_it(name, backend):
    params = parameters()
    optimizer = OPTIMIZERS[name](params, skip_grad_norm_above=12.0, backend=backend)
    step(optimizer, 11.9)
    for norm, reason in ((12.1, "grad_norm_above"), (1e20, "grad_norm_above"), (math.inf, "nonfinite")):
        before, counted = snapshot(optimizer), dict(optimizer.skipped_steps)
        step(optimizer, norm)
        assert_same(snapshot(optimizer), before)
        assert dict(optimizer.skipped_steps) == {**counted, reason: counted[reason] + 1}
    step(optimizer, 11.9)
    assert optimizer.skipped_steps == 3 and not same(snapshot(optimizer), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_unscaled_and_before_clipping(backend):
    """A scale, a scaler's scale, and two clippings: the step is skipped for the norm that `grad_norm` has."""
    for name, clipping in (("AdamW", {"max_grad_norm": 0.1}), ("AdamWeightDecay", {"global_clipnorm": 0.1})):
        params = parameters()
        optimizer = OPTIMIZERS[name](params, skip_grad_norm_above=5.0, backend=backend, **clipping)
        for scaled, skipped in ((6.0, 1), (4.0, 1)):
            optimizer.grad_scale = torch.tensor(1024.0)
            optimizer.apply_gradients(zip(gradients(params, 2048.0 * scaled), params), scale=0.5)
            optimizer.forget_scaler()
            assert_near(optimizer.grad_norm, torch.tensor(scaled, dtype=torch.float64), rtol=1e-6)
            assert optimizer.skipped_steps == skipped


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_a_step_that_a_scaler_skips_does_not_enter(backend):
    optimizer = warmed_up(OPTIMIZERS["AdamW"](parameters(), skip_outliers=3.0, backend=backend))
    step(optimizer, 10.0)
    before = average(optimizer), snapshot(optimizer)
    for found in (1.0, 0.0):
        optimizer.found_inf = torch.tensor([found])
        step(optimizer, 12.0)
        optimizer.forget_scaler()
        assert ((average(optimizer), snapshot(optimizer))[0] == before[0]) == bool(found)
        assert same(snapshot(optimizer), before[1]) == bool(found)
    assert optimizer.skipped_steps == 0


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@every_optimizer
def test_a_scale_that_has_fallen_to_0_is_no_error(name, backend):
    """Gradients are divided by it, as torch's fused kernels do it, and skipping sees that they are not finite."""
    optimizer = OPTIMIZERS[name](parameters(), skip_nonfinite=True, track_statistics=True, backend=backend)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for found in (0.0, 1.0):
        optimizer.grad_scale, optimizer.found_inf = torch.zeros(()), torch.tensor(found)
        step(optimizer, 1.0)
        optimizer.forget_scaler()
        assert_same([p.detach() for p in optimizer.param_groups[0]["params"]], before)
        assert not optimizer.statistics.tensor[:, 0].isfinite().any()


def test_a_scaler_whose_scale_overflows_and_the_averages():
    optimizer = OPTIMIZERS["AdamW"](parameters(), skip_outliers=3.0)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**127, backoff_factor=2.0**-60)
    scaler.scale(torch.zeros(()))
    for _ in range(4):
        params = optimizer.param_groups[0]["params"]
        for p, g in zip(params, gradients(params, 10.0)):
            p.grad = g * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
    assert dict(optimizer.skipped_steps) == {"nonfinite": 1, "grad_norm_above": 0, "outliers": 0}
    assert average(optimizer) == pytest.approx((3.0, 10.0, 0.0), rel=1e-6, abs=1e-9)


WAYS = {
    "checkpoint": lambda o, new: (new.load_state_dict(copy.deepcopy(o.state_dict())), new)[1],
    "deepcopy": lambda o, new: copy.deepcopy(o),
    "pickle": lambda o, new: pickle.loads(pickle.dumps(o)),
    "a file": lambda o, new: (new.load_state_dict(in_a_file(o.state_dict())), new)[1],
}


def in_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_optimizer
@pytest.mark.parametrize("how", WAYS)
def test_a_run_goes_on_with_the_same_averages(name, how):
    make = lambda: OPTIMIZERS[name](parameters(), skip_outliers=3.0, max_grad_norm=1.0)  # noqa: E731
    optimizer = warmed_up(make())
    for norm in NORMS:
        step(optimizer, norm)
    saved = average(optimizer)
    other = WAYS[how](optimizer, make())
    assert average(other) == saved and all(type(x) is float for x in saved)
    for one in (optimizer, other):
        for norm in (14.0, 10.0, 1e3):
            step(one, norm)
    assert average(other) == average(optimizer) != saved
    assert dict(other.skipped_steps)["outliers"] >= 1


@pytest.mark.parametrize("flat", [False, True])
def test_averages_through_distributed_checkpoint(flat):
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    pair = []
    for _ in range(2):
        model = torch.nn.Linear(3, 2)
        pair.append((model, AdamW(model.parameters(), skip_outliers=3.0)))
    (model, optimizer), (other, resumed) = pair
    warmed_up(optimizer)
    for norm in NORMS:
        step(optimizer, norm)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    dcp.set_optimizer_state_dict(other, resumed, saved, options=options)
    assert average(resumed) == average(optimizer) != (0.0, 0.0, 0.0)


def test_a_checkpoint_without_averages_and_one_with_averages_that_are_not_wanted():
    plain, guarded = AdamW(parameters()), warmed_up(AdamW(parameters(), skip_outliers=3.0))
    for optimizer in (plain, guarded):
        step(optimizer, 10.0)
    before = average(guarded)
    guarded.load_state_dict(plain.state_dict())
    assert average(guarded) == before
    plain.load_state_dict(guarded.state_dict())
    assert "grad_norm_average" not in plain.param_groups[0]


@pytest.mark.parametrize("bad", [(1.0, 2.0), (1.0, 2.0, -1.0), (1.0, math.nan, 1.0), "abc", None, (1.0, 1.0, True)])
def test_averages_that_no_steps_can_have_left_are_refused(bad):
    optimizer = warmed_up(AdamW(parameters(), skip_outliers=3.0))
    with pytest.raises(ValueError, match="grad_norm_average must be the count, mean and variance of norms, got"):
        warmed_up(optimizer, bad)
    assert average(optimizer) == WARM


def test_options_set_later_and_groups_that_come_later():
    optimizer = AdamW(parameters())
    step(optimizer, 10.0)
    assert optimizer.skipped_steps is None and "grad_norm_average" not in optimizer.state_dict()["param_groups"][0]
    optimizer.guard.skip_outliers = 3.0
    optimizer.guard.skip_grad_norm_above = 5.0
    step(optimizer, 10.0)
    assert dict(optimizer.skipped_steps) == {"nonfinite": 0, "grad_norm_above": 1, "outliers": 0}
    assert average(optimizer) == (1.0, 5.0, 0.0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert [group["grad_norm_average"] for group in optimizer.param_groups] == [(1.0, 5.0, 0.0)] * 2


def test_create_optimizer_and_the_recorder_of_rates():
    model = torch.nn.Linear(3, 2)
    optimizer, _ = create_optimizer(model, 0.1, 10, 2, skip_grad_norm_above=5.0, skip_outliers=4.0)
    recorder = LRRecorder(optimizer)
    for norm in (1.0, 10.0, 1.0):
        step(optimizer, norm)
    assert optimizer.iterations == 2 and recorder.skipped.tolist() == [False, True, False]
    config = optimizer.get_config()
    assert (config["skip_grad_norm_above"], config["skip_outliers"]) == (5.0, 4.0)
    assert type(optimizer).from_config(config, model.named_parameters()).get_config() == config


@pytest.mark.parametrize("name, least", [("skip_grad_norm_above", 0), ("skip_outliers", 1)])
@pytest.mark.parametrize("make", [row.cls for row in OPTIMIZERS.values()])
def test_bad_limits(name, least, make):
    for bad in (float(least), -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be finite and > {least}, or None, got"):
            make(parameters(), **{name: bad})
    with pytest.raises(ValueError, match=f"{name} must be a number, got True"):
        make(parameters(), **{name: True})


@NEEDS_TRITON
def test_a_verdict_waits_for_nothing(device):
    from fusedopt.backends.triton.verdict import Verdict

    guard, verdict = Guard(1.0, True, 5.0, 3.0), Verdict(device)
    squares = [torch.full((2,), 50.0, dtype=torch.float64, device=device)]
    args = StepArgs(grad_scale=torch.ones((), device=device), found_inf=torch.zeros((), device=device))
    guard(squares, args, lambda home: verdict).write()
    with Waits() as waits:
        for _ in range(3):
            guard(squares, args, lambda home: verdict).write()
        skipped = guard.skipped_steps
    assert waits.count == 0 and skipped.tensor.tolist() == [0.0, 4.0, 0.0]
    with waits:
        assert int(skipped) == 4
    assert waits.count == 1


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py")
def test_a_graph_judges_the_norm_of_each_replay(capture):
    from fusedopt.backends.triton.verdict import Verdict

    verdict, limits = Verdict(CPU), rules.Limits(deviations=3.0)
    ledgers = [torch.tensor([0, 0, 0, *WARM], dtype=torch.float64) for _ in range(2)]
    norm = torch.tensor(10.0, dtype=torch.float64)
    verdict(norm, None, ledgers[0], limits)
    EagerVerdict(CPU)(norm, None, ledgers[1], limits)
    with capture() as graph:
        flag = verdict(norm, None, ledgers[0], limits)
        with pytest.raises(RuntimeError, match="no step before it had these limits for norms: take one step"):
            verdict(norm, None, ledgers[0], rules.Limits(deviations=4.0))
    assert verdict.captured and graph.launches == 1
    for size in (10.0, 20.0, math.nan, 12.0):
        norm.fill_(size)
        graph.replay()
        assert_same(flag, EagerVerdict(CPU)(norm, None, ledgers[1], limits))
        assert_same(*ledgers)


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py")
def test_a_capture_before_the_first_guarded_step_is_refused(capture):
    squares = [torch.ones(1, dtype=torch.float64)]
    with pytest.raises(RuntimeError, match="before the optimizer counts skipped steps on its device"), capture():
        Guard(skip_nonfinite=True)(squares, StepArgs(), EagerVerdict)
