"""AdamWeightDecay: recorded runs, rates that are functions of the step, decay by name, clipping, configs, refusals."""

import copy
import inspect
import math
import pickle
import re
import warnings
import weakref

import numpy as np
import pytest
import torch
from golden_cases import assert_close, replay
from keras_cases import BACKENDS, STATE_64, TOLERANCES, device_of, keras_cases, recorded, schedule
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fusedopt import AdamW
from fusedopt.backends.eager_adamw import EagerAdamW
from fusedopt.batch import Control
from fusedopt.clipping import Clipping
from fusedopt.keras import AdamWeightDecay
from fusedopt.keras_schedules import PolynomialDecay, WarmUp, describe, revive
from fusedopt.plotting import plot_schedule
from fusedopt.recorder import LRRecorder
from fusedopt.verification import verify_schedule

REFUSED = ("weight_decay_negative",)
CASES = [case for case in keras_cases("tf_adam_weight_decay") if case.name not in REFUSED]
API = recorded("tf_api")
SCHEDULES = recorded("tf_schedules")

pytestmark = pytest.mark.filterwarnings("ignore:lr is Keras' old name")


def parameter(*values, dtype=torch.float32, device="cpu"):
    return torch.nn.Parameter(torch.tensor(values or (1.0, -2.0), dtype=dtype, device=device))


def step(optimizer, *grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.apply_gradients([(torch.full_like(p, g), p) for p, g in zip(params, grads or [1.0] * len(params))])


# The recorded runs.


def round_trip(optimizer):
    """Through a config as the original makes it, without the lists of patterns."""
    config = optimizer.get_config()
    for patterns in ("include_in_weight_decay", "exclude_from_weight_decay"):
        del config[patterns]
    return AdamWeightDecay.from_config(config, optimizer.param_groups[0]["params"], backend=optimizer.backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case, backend):
    def make(groups, **kwargs):
        optimizer = case.optimizer(groups, backend=backend, **kwargs)
        return round_trip(optimizer) if case.raw.get("from_config_of_get_config") else optimizer

    records = replay(case, make, device=device_of(backend), observe=lambda opt, _: opt.param_groups[0]["lr"])
    state = STATE_64 if case.dtype == torch.float64 else None
    assert_close(case, records, parameters=TOLERANCES[case.dtype], state=state)
    assert records.optimizer.iterations == case.raw["iterations_at_end"]
    used = [lr / (1 + records.optimizer.decay * i) for i, lr in enumerate(records.observed)]
    assert used == pytest.approx(case.rates, rel=1e-6, abs=1e-12)


def test_all_recorded_runs_are_here():
    assert len(CASES) + len(REFUSED) == 35


@pytest.mark.parametrize(
    "rule", API["decay_rules"], ids=lambda r: f"{r['weight_decay_rate']}-{r['include']}-{r['exclude']}"
)
def test_decay_rules(rule):
    names = API["decay_rule_names"]
    params = [parameter(1.0) for _ in names]
    options = {"include_in_weight_decay": rule["include"], "exclude_from_weight_decay": rule["exclude"]}
    if rule["weight_decay_rate"] < 0:
        with pytest.raises(ValueError, match=r"weight_decay_rate must be finite and >= 0, got -0\.1"):
            AdamWeightDecay(zip(names, params), weight_decay_rate=rule["weight_decay_rate"], **options)
        return
    step(AdamWeightDecay(zip(names, params), 0.5, weight_decay_rate=rule["weight_decay_rate"], **options), *[0.0] * 8)
    assert [p.item() != 1.0 for p in params] == rule["decays"]


# Schedules.


@pytest.mark.parametrize("case", SCHEDULES["cases"], ids=lambda case: case["name"])
def test_schedule_golden(case):
    rate = schedule(case["schedule"])
    convert = int if case["step_type"] == "int" else lambda s: torch.tensor(s, dtype=getattr(torch, case["step_type"]))
    values = [rate(convert(s)) for s in case["steps"]]
    assert all(type(value) is float for value in values)
    assert values == pytest.approx(case["values"], rel=1e-6, abs=1e-9, nan_ok=True)
    assert rate(case["steps"]).tolist() == rate(torch.tensor(case["steps"])).tolist() == values


def test_schedule_config_golden():
    inner = PolynomialDecay(0.1, 12)
    config = WarmUp(0.1, inner, 3).get_config()
    assert list(config) == SCHEDULES["warmup_get_config"]["keys"]
    assert config.pop("decay_schedule_fn") is inner
    assert config == SCHEDULES["warmup_get_config"]["values_without_decay_schedule_fn"]
    named = WarmUp(0.1, inner, 3, power=2.0, name="schedule").get_config()
    assert {**named, "decay_schedule_fn": None} == {
        **SCHEDULES["warmup_get_config"]["named"],
        "decay_schedule_fn": None,
    }


def test_schedules_survive_their_configs():
    nested = WarmUp(0.1, WarmUp(0.2, PolynomialDecay(0.3, 5, cycle=True), 4), 3, power=2.0)
    assert revive(describe(nested)) == nested
    assert WarmUp.from_config(nested.get_config()) == nested
    assert pickle.loads(pickle.dumps(nested)) == nested


def test_schedules_plot_their_rates():
    decay = PolynomialDecay(0.4, 10, 0.0)
    figure = plot_schedule([WarmUp(0.4, decay, 10), decay])
    warm_up, alone = (line for line in figure.axes[0].lines if len(line.get_xdata()) > 2)
    assert (warm_up.get_label(), alone.get_label()) == ("WarmUp", "PolynomialDecay")
    assert warm_up.get_ydata().tolist() == [WarmUp(0.4, decay, 10)(step) for step in warm_up.get_xdata()]
    assert warm_up.get_xdata().max() >= 20
    assert "times" not in figure.axes[0].get_ylabel()


def test_schedule_lengths():
    assert WarmUp(0.1, PolynomialDecay(0.1, 5), 3).length == 8
    assert WarmUp(0.1, PolynomialDecay(0.1, 5, cycle=True), 3).length is None
    assert WarmUp(0.1, math.exp, 3).length is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmUp(0.1, 0.1, 3), "decay_schedule_fn must be a function of the step, got 0.1"),
        (lambda: WarmUp(0.1, math.exp, -1), "warmup_steps must be >= 0, got -1"),
        (lambda: WarmUp(0.1, math.exp, 3, power=-1.0), "power must be >= 0"),
        (lambda: WarmUp(math.nan, math.exp, 3), "initial_learning_rate must be a finite number, got nan"),
        (lambda: PolynomialDecay(0.1, -5), "decay_steps must be >= 0, got -5"),
        (lambda: PolynomialDecay(0.1, 5, "0"), "end_learning_rate must be a finite number, got '0'"),
        (lambda: revive({"class_name": "CosineDecay", "config": {}}), "no schedule can be made of .*CosineDecay"),
    ],
)
def test_schedule_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Rates that are functions of the step.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_function_counts_calls_and_the_correction_counts_updates(backend):
    """A call without gradients moves the schedule on and the bias correction not."""
    rates = [0.5, 0.25, 0.125]
    p, plain = (parameter(device=device_of(backend)) for _ in range(2))
    optimizer = AdamWeightDecay([p], lambda i: rates[i], backend=backend)
    other = AdamW([plain], eps=1e-7, convention="keras", backend=backend)
    for i, gradient in enumerate([1.0, None, 3.0]):
        p.grad = plain.grad = None if gradient is None else torch.full_like(p, gradient)
        other.param_groups[0]["lr"] = rates[i]
        optimizer.step()
        other.step()
        assert optimizer.param_groups[0]["lr"] == rates[i]
    assert torch.equal(p, plain)
    assert optimizer.iterations == 3
    assert optimizer.state[p]["step"].item() == 2


def test_counts_go_on_where_all_gradients_are_on_another_device():
    p = parameter()
    optimizer = AdamWeightDecay([p], backend="eager")
    step(optimizer)
    EagerAdamW(p.device)(optimizer.batches([[None]]), Control())
    assert optimizer.state[p]["step"].item() == 2


def test_calls_are_counted_across_checkpoints_copies_and_late_groups():
    make = lambda p: AdamWeightDecay([p], PolynomialDecay(0.4, 4, 0.0))  # noqa: E731
    p = parameter()
    optimizer = make(p)
    step(optimizer)
    step(optimizer)
    restored = make(parameter())
    restored.load_state_dict(optimizer.state_dict())
    copied = pickle.loads(pickle.dumps(optimizer))
    late = copy.deepcopy(optimizer)
    late.add_param_group({"params": [parameter()]})
    for other in (restored, copied, late):
        step(other)
        assert [group["iterations"] for group in other.param_groups] == [3] * len(other.param_groups)
        assert [group["lr"] for group in other.param_groups] == [pytest.approx(0.2)] * len(other.param_groups)
    step(optimizer)
    assert torch.equal(copied.param_groups[0]["params"][0], p)


def test_recorded_rates_are_those_of_their_steps():
    """Of copies too, whose hooks are made again, and once."""
    optimizer = AdamWeightDecay([parameter()], PolynomialDecay(0.4, 4, 0.0))
    copied, loaded = copy.deepcopy(optimizer), copy.deepcopy(optimizer)
    loaded.load_state_dict(optimizer.state_dict())
    for one in (optimizer, copied, loaded):
        recorder = LRRecorder(one)
        for _ in range(3):
            step(one)
        assert recorder.rates.tolist() == pytest.approx(np.array([[0.4], [0.3], [0.2]]))
        assert verify_schedule(recorder, one.schedule).finding == "all 3 steps used the rate of the schedule"
        assert len(one._optimizer_step_pre_hooks) == 2


def test_looking_at_a_fresh_state_takes_no_step():
    """torch.distributed.checkpoint steps with a rate of 0 to see the state."""
    model = torch.nn.Linear(2, 1)
    optimizer = AdamWeightDecay(model.named_parameters(), lambda i: 0.5)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.iterations == 0 and optimizer.param_groups[0]["lr"] == 0.5
    model(torch.ones(2)).backward()
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    other = AdamWeightDecay(model.named_parameters(), lambda i: 0.5)
    set_optimizer_state_dict(model, other, saved)
    assert other.iterations == 1


def test_closure_and_schedule():
    p = parameter(1.0)
    optimizer = AdamWeightDecay([p], lambda i: 0.5 / (i + 1))

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert [optimizer.step(closure).item() for _ in range(2)] == [1.0, pytest.approx(0.25, rel=1e-5)]


def test_torch_scheduler_drives_a_number():
    optimizer = AdamWeightDecay([parameter()], 0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    step(optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.hyper(optimizer.param_groups[0]).lr == 0.25


def test_torch_scheduler_on_a_function_is_refused():
    p = parameter()
    optimizer = AdamWeightDecay([p], lambda i: 0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    step(optimizer)
    scheduler.step()
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"was set to 0\.25, by a torch scheduler or by hand, but learning_rate is"):
        step(optimizer)
    assert torch.equal(p, before) and optimizer.iterations == 1


@pytest.mark.parametrize("bad", [math.nan, -0.1, math.inf])
def test_a_function_that_returns_no_rate_is_refused(bad):
    p = parameter()
    optimizer = AdamWeightDecay([p], lambda i: bad if i else 0.1)
    step(optimizer)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=f"gives {bad} at step 1"):
        step(optimizer)
    assert torch.equal(p, before)


@pytest.mark.parametrize("options", [{"learning_rate": lambda i: 0.1}, {"decay": 0.5}], ids=["function", "decay"])
def test_a_function_of_the_step_is_refused_in_a_cuda_graph(monkeypatch, options):
    optimizer = AdamWeightDecay([parameter()], **options)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="pass a tensor as learning_rate"):
        step(optimizer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_as_a_tensor(backend):
    device = device_of(backend)
    p, q = parameter(device=device), parameter(device=device)
    lr = torch.tensor(0.5, device=device)
    optimizer, other = AdamWeightDecay([p], lr, backend=backend), AdamWeightDecay([q], 0.5, backend=backend)
    for value in (0.5, 0.25):
        lr.fill_(value)
        other.param_groups[0]["lr"] = value
        step(optimizer)
        step(other)
    assert torch.equal(p, q)
    assert optimizer.get_config()["learning_rate"] == 0.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_held_on_to(backend):
    """The next backward pass needs their memory."""
    p = parameter(*range(20), device=device_of(backend))
    for options in ({}, {"clipnorm": 1.0}):
        optimizer = AdamWeightDecay([p], backend=backend, **options)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            gone = weakref.ref(p.grad)
            optimizer.step()
            optimizer.zero_grad()
            assert gone() is None


# Param groups.


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_names_of_torch_and_of_keras(backend):
    params = [
        ("a.weight", parameter(1.0)),
        ("a.bias", parameter(1.0)),
        ("b.weight", parameter(1.0)),
        ("b.bias", parameter(1.0)),
    ]
    params = [(name, torch.nn.Parameter(p.detach().to(device_of(backend)))) for name, p in params]
    optimizer = AdamWeightDecay(
        [
            {"params": params[:2], "learning_rate": 0.5, "weight_decay_rate": 0.1, "beta_1": 0.5, "epsilon": 0.0},
            {"params": params[2:], "lr": 0.25, "weight_decay": 0.2, "eps": 0.0},
        ],
        exclude_from_weight_decay=["bias$"],
        backend=backend,
    )
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.999), (0.9, 0.999)]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-7, 0.0]
    optimizer.param_groups[1]["eps"] = 1e-7
    step(optimizer, *[0.0] * 4)
    assert [p.item() for _, p in params] == pytest.approx([0.95, 1.0, 0.95, 1.0])


def test_all_parameters_of_a_group_excluded():
    p = parameter()
    before = p.detach().clone()
    step(AdamWeightDecay([("bias", p)], weight_decay_rate=0.5, exclude_from_weight_decay=["bias"]), 0.0)
    assert torch.equal(p, before)


# Clipping.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "clipping", [{"clipvalue": 0.3}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}], ids=lambda c: next(iter(c))
)
def test_clipped_is_clipped_by_hand(clipping, dtype, backend):
    """Gradients are left as they are; the update is the one that clipped float32 (or float64) gradients give."""
    torch.manual_seed(0)
    device = device_of(backend)
    start = [torch.randn(3, 5, device=device).to(dtype), torch.randn(7, device=device).to(dtype)]
    grads = [torch.randn_like(p) for p in start]
    wide = torch.promote_types(dtype, torch.float32)
    scaled = [0.25 * g.to(wide) for g in grads]
    if "clipvalue" in clipping:
        expected = [g.clamp(-0.3, 0.3) for g in scaled]
    elif "clipnorm" in clipping:
        expected = [g * (0.5 / max(g.norm().item(), 0.5)) for g in scaled]
    else:
        norm = torch.cat([g.flatten() for g in scaled]).norm().item()
        expected = [g * (0.5 / max(norm, 0.5)) for g in scaled]
    results = []
    for options, given, scale in ((clipping, grads, 0.25), ({}, expected, 1.0)):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = AdamWeightDecay(params, 0.1, epsilon=0.1, backend=backend, **options)
        before = [g.clone() for g in given]
        optimizer.apply_gradients(zip(given, params), scale=scale)
        assert all(map(torch.equal, given, before))
        results.append(params)
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_clip_of_many_layouts():
    """Empty tensors, mixed dtypes, a scale that is a tensor."""
    grads = [[torch.zeros(0), None], [torch.full((2,), 300.0, dtype=torch.float16), torch.ones(2, dtype=torch.float64)]]
    _, factor = Clipping(global_clipnorm=1.0)(grads, torch.tensor(0.5))
    assert factor.item() == pytest.approx(1 / math.sqrt(2 * 300**2 + 2))
    clipped, factor = Clipping(clipvalue=10.0, clipnorm=2.0)(grads, 0.5)
    assert factor == 1.0
    assert clipped[0][1] is None and clipped[1][0].norm().item() == pytest.approx(2.0)
    assert clipped[1][1].tolist() == [0.5, 0.5]


def test_clipping_sees_unscaled_gradients():
    """A GradScaler's factor is divided out before anything is compared with a bound."""
    p = parameter()
    optimizer = AdamWeightDecay([p], global_clipnorm=1.0)
    control = Control(scale=0.5, grad_scale=torch.tensor([1024.0]))
    _, clipped = optimizer.prepare([[1024.0 * torch.tensor([3.0, 4.0])]], control)
    assert float(clipped.scale) * 1024.0 == pytest.approx(1 / 5) and clipped.grad_scale is None
    _, unclipped = optimizer.prepare([[1024.0 * torch.tensor([0.3, 0.4])]], control)
    assert float(unclipped.scale) * 1024.0 == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clipping", [{}, {"clipvalue": 1.0}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}], ids=str)
def test_norm_and_skipping_are_of_the_gradients_before_clipping(clipping, backend):
    p = parameter(device=device_of(backend))
    optimizer = AdamWeightDecay([p], skip_nonfinite=True, backend=backend, **clipping)
    before = p.detach().clone()
    step(optimizer, math.inf)
    assert torch.equal(p, before) and optimizer.skipped_steps == 1
    assert optimizer.iterations == 1 and optimizer.state[p]["step"] == 0
    step(optimizer, 3.0)
    assert optimizer.grad_norm.item() == pytest.approx(3 * 2**0.5)
    assert (p != before).all() and optimizer.skipped_steps == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_common_norm_that_is_not_finite_gives_nan_everywhere(bad):
    p, q = parameter(1.0), parameter(1.0)
    step(AdamWeightDecay([p, q], global_clipnorm=1.0), bad, 1.0)
    assert p.isnan().all() and q.isnan().all()


def test_clipping_to_zero():
    p = parameter(1.0)
    for options in ({"clipnorm": 0.0}, {"global_clipnorm": 0.0}, {"clipvalue": 0.0}):
        step(AdamWeightDecay([p], **options), 0.0)
        step(AdamWeightDecay([p], **options), 1.0)
    assert p.item() == 1.0


# Configs.


def without_modules(config):
    """What Keras writes beside class name and config says where its classes live."""
    if not isinstance(config, dict):
        return config
    return {key: without_modules(v) for key, v in config.items() if key not in ("module", "registered_name")}


@pytest.mark.parametrize("case", API["configs"], ids=lambda case: case["name"])
def test_config_golden(case):
    kwargs = {key: schedule(value) for key, value in case["kwargs"].items()}
    params = [("a", parameter())]
    config = AdamWeightDecay(params, **kwargs).get_config()
    patterns = {key: config.pop(key) for key in ("include_in_weight_decay", "exclude_from_weight_decay")}
    assert config == without_modules(case["config"])
    assert patterns == {key: kwargs.get(key) for key in patterns}
    # Ours and Keras' own both make the optimizer again.
    for same in ({**config, **patterns}, {**case["config"], **patterns}):
        assert AdamWeightDecay.from_config(same, params).get_config() == {**config, **patterns}


@pytest.mark.parametrize("case", API["from_config"], ids=lambda case: case["name"])
def test_from_config_golden(case):
    if "schedule" in case:
        before = schedule(case["schedule"])
        config = AdamWeightDecay(
            [parameter()], before, weight_decay_rate=case.get("weight_decay_rate", 0.0)
        ).get_config()
        if case["name"] == "warmup_live_inner":
            config["learning_rate"]["config"]["decay_schedule_fn"] = before.decay_schedule_fn
        expected = case["before"]  # after the round trip the original's warm-up breaks at its end
    else:
        config, expected = case["config"], case["after"]
    optimizer = AdamWeightDecay.from_config(config, [parameter()])
    rates = []
    for _ in expected:
        step(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, rel=1e-6)
    assert optimizer.defaults["weight_decay"] == case.get("weight_decay_rate", 0.0)
    assert optimizer.clipping.clipvalue == case.get("clipvalue")


def test_patterns_survive_the_config():
    case = next(case for case in CASES if case.name == "include_over_exclude")
    again = lambda groups, **kw: AdamWeightDecay.from_config(  # noqa: E731
        case.optimizer(groups, **kw).get_config(), list(zip(case.names, groups[0]["params"]))
    )
    assert_close(case, replay(case, again), parameters=TOLERANCES[case.dtype])


@pytest.mark.parametrize("options", [{"max_grad_norm": 2.0}, {"skip_nonfinite": True}], ids=lambda o: next(iter(o)))
def test_options_of_our_own_survive_the_config(options):
    config = AdamWeightDecay([parameter()], **options).get_config()
    assert AdamWeightDecay.from_config(config, [parameter()]).get_config() == config
    assert options.items() <= config.items()


def test_epsilon_zero_in_a_config_is_zero():
    config = {**AdamWeightDecay([parameter()]).get_config(), "epsilon": 0.0}
    assert AdamWeightDecay.from_config(config, [parameter()]).get_config() == config


# Refusals.

DEPARTURES = {
    "learning_rate_negative": "learning_rate must be finite and >= 0, got -1.0",
    "weight_decay_rate_negative": "weight_decay_rate must be finite and >= 0, got -1.0",
    "beta_above_one": r"beta_1 must be in \[0, 1\), got 2.0",
}
"""What the original accepts."""


@pytest.mark.parametrize("case", [c for c in API["errors"] if c["when"] == "construct"], ids=lambda case: case["name"])
def test_construction_errors_golden(case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case["error"] is None and case["name"] not in DEPARTURES:
            AdamWeightDecay([parameter()], **case["kwargs"])
        else:
            expected = {"TypeError": TypeError}.get((case["error"] or {}).get("type"), ValueError)
            with pytest.raises(expected, match=DEPARTURES.get(case["name"])):
                AdamWeightDecay([parameter()], **case["kwargs"])
    assert [w.category.__name__ for w in caught] == case["warnings"]


@pytest.mark.parametrize("case", [c for c in API["errors"] if c["when"] == "apply"], ids=lambda case: case["name"])
def test_apply_errors_golden(case):
    """Decay of what is not float32 is an error of the original and works here; TF's own class is RuntimeError."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    p = parameter(1.0, 1.0, 1.0, dtype=dtype)
    optimizer = AdamWeightDecay([p], 0.5, weight_decay_rate=case.get("weight_decay_rate", 0.0))
    pairs = {"[]": [], "all None": [(None, p)], "wrong shape": [(torch.ones(4), p)]}
    if "grads" not in case:
        optimizer.apply_gradients([(torch.ones_like(p), p)])
        assert (p < 1).all()
        return
    with pytest.raises(ValueError if case["error"]["type"] == "ValueError" else RuntimeError):
        optimizer.apply_gradients(pairs[case["grads"]])
    assert optimizer.iterations == 0 and (p == 1).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exclude_from_weight_decay": ["bias"]}, ValueError, r"pass model.named_parameters\(\) instead"),
        ({"include_in_weight_decay": ["bias"]}, ValueError, r"pass model.named_parameters\(\) instead"),
        ({"exclude_from_weight_decay": "bias"}, ValueError, "must be a list of regular expressions, got 'bias'"),
        ({"exclude_from_weight_decay": ["("]}, ValueError, r"has '\(' in it, which is no regular expression"),
        ({"fused": True}, TypeError, "backend="),
        ({"epsilon": -1.0}, ValueError, "epsilon must be finite and >= 0, got -1.0"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        AdamWeightDecay([parameter()], **options)


def test_a_group_with_a_rate_of_its_own_beside_a_function_is_refused():
    with pytest.raises(ValueError, match=re.escape("a param group got the rate 0.5, but learning_rate is a function")):
        AdamWeightDecay([{"params": [parameter()], "lr": 0.5}], lambda i: 0.1)


def test_signature_is_the_originals():
    """After `params`; what is ours alone is keyword-only."""
    ours = [p for p in inspect.signature(AdamWeightDecay).parameters.values() if p.kind is not p.KEYWORD_ONLY][1:]
    originals = API["signatures"]["AdamWeightDecay.__init__"][1:]
    assert [p.name for p in ours] == [p["name"] for p in originals]
    assert [p.default for p in ours if p.default is not p.empty] == [p["default"] for p in originals if "default" in p]
