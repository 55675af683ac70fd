"""create_optimizer: the recorded runs of both of the original's classes, its schedules, its refusals."""

import inspect

import pytest
import torch
from helpers.comparing import assert_same
from helpers.golden import assert_close, replay
from helpers.keras import BACKENDS, TOLERANCES, device_of, keras_cases, recorded

from fusedopt.keras import AdamWeightDecay
from fusedopt.keras.recipe import create_optimizer
from fusedopt.keras.schedules import PolynomialDecay, WarmUp, revive

REFUSED = ("weight_decay_negative",)  # the original returns its Adam without decay
CASES = [case for case in keras_cases("tf_create_optimizer") if case.name not in REFUSED]
RUNS = [case for case in CASES if case.steps]
API = recorded("tf_api")


def parameters():
    return [("weight", torch.nn.Parameter(torch.ones(3)))]


def test_all_recorded_calls_are_here():
    assert len(CASES) + len(REFUSED) == 18
    assert [case.name for case in CASES if case not in RUNS] == ["warmup_is_all"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_golden(case, backend):
    def make(groups, **kwargs):
        return create_optimizer(zip(case.names, groups[0]["params"]), **kwargs, backend=backend)[0]

    records = replay(case, make, device=device_of(backend), observe=lambda opt, _: opt.param_groups[0]["lr"])
    assert_close(case, records, parameters=TOLERANCES[case.dtype])
    assert records.observed == pytest.approx(case.rates, rel=1e-6, abs=1e-9)
    assert records.optimizer.iterations == case.raw["iterations_at_end"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_schedule_and_config_golden(case):
    optimizer, schedule = create_optimizer(parameters(), **case.kwargs)
    raw = case.raw
    assert optimizer.schedule is schedule
    assert type(schedule).__name__ == raw["schedule_class"]
    values = [schedule(s) for s in raw["schedule_steps"]]
    assert values == pytest.approx(raw["schedule_values"], rel=1e-6, abs=1e-9, nan_ok=True)
    decay = schedule.decay_schedule_fn if isinstance(schedule, WarmUp) else schedule
    assert decay.get_config() == raw["decay_config"]
    if isinstance(schedule, WarmUp):
        assert {**schedule.get_config(), "decay_schedule_fn": None} == {
            **raw["warmup_config"],
            "decay_schedule_fn": None,
        }
    config = optimizer.get_config()
    assert revive(config["learning_rate"]) == schedule
    # The keys that both configs have. The original's class without decay is called Adam.
    shared = {key: value for key, value in raw["config"].items() if key in config and key != "name"}
    assert {key: config[key] for key in shared} == shared
    for key in ("include_in_weight_decay", "exclude_from_weight_decay"):
        assert config[key] == raw.get(key)


@pytest.mark.parametrize("weight_decay_rate", [0.0, 0.1])
def test_a_module_is_its_named_parameters(weight_decay_rate):
    model = torch.nn.TransformerEncoderLayer(8, 2, 16)
    optimizer, _ = create_optimizer(model, 0.1, 10, 2, weight_decay_rate=weight_decay_rate)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    listed, _ = create_optimizer(list(model.named_parameters()), 0.1, 10, 2, weight_decay_rate=weight_decay_rate)
    assert listed.param_groups[0]["params"] == optimizer.param_groups[0]["params"]


def test_without_decay_names_are_not_needed():
    create_optimizer([p for _, p in parameters()], 0.1, 10, 2, include_in_weight_decay=["x"])
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        create_optimizer([p for _, p in parameters()], 0.1, 10, 2, weight_decay_rate=0.1)


@pytest.mark.parametrize(("weight_decay_rate", "epsilon"), [(0.0, 0.0), (0.1, 1e-7)])
def test_epsilon_zero_stays_zero_only_without_decay(weight_decay_rate, epsilon):
    """As in the two classes of the original; a round trip through the config keeps either."""
    optimizer, _ = create_optimizer(parameters(), 0.1, 10, 2, adam_epsilon=0.0, weight_decay_rate=weight_decay_rate)
    again = AdamWeightDecay.from_config(optimizer.get_config(), parameters())
    for one in (optimizer, again):
        assert [group["eps"] for group in one.param_groups] == [epsilon] == [one.get_config()["epsilon"]]


def test_training_ends_where_the_warm_up_does():
    """Every step of such a training has a rate; the step after it is refused, where the original would set NaN."""
    [(name, p)] = parameters()
    optimizer, _ = create_optimizer([(name, p)], 0.1, num_train_steps=3, num_warmup_steps=3)
    for _ in range(3):
        optimizer.apply_gradients([(torch.ones_like(p), p)])
    before = p.detach().clone()
    with pytest.raises(ValueError, match="gives nan at step 3"):
        optimizer.apply_gradients([(torch.ones_like(p), p)])
    assert_same(p, before)


@pytest.mark.parametrize(
    "case", [c for c in API["errors"] if c["when"] == "create_optimizer"], ids=lambda case: case["name"]
)
def test_errors_golden(case):
    with pytest.raises(ValueError, match=r"clipnorm=1\.0 and global_clipnorm=1\.0 exclude each other"):
        create_optimizer(parameters(), 0.1, 10, 2, **case["kwargs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay_rate": -0.1}, "weight_decay_rate must be finite and >= 0, got -0.1"),
        ({"init_lr": -0.1}, "gives -0.1 at step 0"),
        ({"adam_beta2": 1.0}, r"beta_2 must be in \[0, 1\), got 1.0"),
        ({"num_warmup_steps": 11}, "num_train_steps includes num_warmup_steps=11 and must not be less, got 10"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(parameters(), **{"init_lr": 0.1, "num_train_steps": 10, "num_warmup_steps": 0, **options})


def test_signature_is_the_originals():
    """After `params`; arguments that the original lacks are keyword-only."""
    keywords = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    ours = [p for p in inspect.signature(create_optimizer).parameters.values() if p.kind not in keywords][1:]
    originals = API["signatures"]["create_optimizer"]
    assert [p.name for p in ours] == [p["name"] for p in originals]
    assert [p.default for p in ours if p.default is not p.empty] == [p["default"] for p in originals if "default" in p]


def test_returns_optimizer_and_schedule():
    optimizer, schedule = create_optimizer(parameters(), 0.1, 10, 0)
    assert isinstance(optimizer, AdamWeightDecay) and isinstance(schedule, PolynomialDecay)
