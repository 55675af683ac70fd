"""AdamWeightDecay's configs, signature and refusals."""

import inspect
import json
import re
import warnings

import pytest
import torch
from helpers.golden import assert_close, replay
from helpers.keras import TOLERANCES, keras_cases, parameter, recorded, schedule, step

from fusedopt.keras import AdamWeightDecay

REFUSED = ("weight_decay_negative",)
CASES = [case for case in keras_cases("tf_adam_weight_decay") if case.name not in REFUSED]
API = recorded("tf_api")

pytestmark = pytest.mark.filterwarnings("ignore:lr is Keras' old name")


def without_modules(config):
    """Drops the keys of Keras that say where its classes live."""
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


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 2.0}, {"skip_nonfinite": True}, {"skip_outliers": 3.0}], ids=lambda o: next(iter(o))
)
def test_options_of_our_own_survive_the_config(options):
    config = AdamWeightDecay([parameter()], **options).get_config()
    assert AdamWeightDecay.from_config(config, [parameter()]).get_config() == config
    assert options.items() <= config.items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_options_of_low_precision_survive_json(dtype):
    options = {"master_weights": True, "state_dtype": dtype, "seed": 3}
    config = json.loads(json.dumps(AdamWeightDecay([parameter()], **options).get_config()))
    again = AdamWeightDecay.from_config(config, [parameter()])
    assert (again.seed, again.param_groups[0]["state_dtype"]) == (3, dtype)
    assert again.get_config() == config


def test_a_dtype_that_no_moment_has_is_refused_in_a_config_too():
    config = {**AdamWeightDecay([parameter()]).get_config(), "state_dtype": "float16"}
    with pytest.raises(ValueError, match=r"torch\.bfloat16, got 'float16'"):
        AdamWeightDecay.from_config(config, [parameter()])


def test_epsilon_zero_in_a_config_is_zero():
    config = {**AdamWeightDecay([parameter()]).get_config(), "epsilon": 0.0}
    assert AdamWeightDecay.from_config(config, [parameter()]).get_config() == config


# Refusals.

DEPARTURES = {
    "learning_rate_negative": "learning_rate must be finite and >= 0, got -1.0",
    "weight_decay_rate_negative": "weight_decay_rate must be finite and >= 0, got -1.0",
    "beta_above_one": r"beta_1 must be in \[0, 1\), got 2.0",
}
"""Refused here, accepted by the original."""


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
    """Decay in other dtypes than float32 is an error only in the original; TF's error class is RuntimeError here."""
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


def test_a_rate_of_a_group_is_refused_if_the_rate_is_a_function():
    with pytest.raises(ValueError, match=re.escape("a param group got the rate 0.5, but learning_rate is a function")):
        AdamWeightDecay([{"params": [parameter()], "lr": 0.5}], lambda i: 0.1)


def test_signature_is_the_originals():
    """After `params`; arguments that the original lacks are keyword-only."""
    ours = [p for p in inspect.signature(AdamWeightDecay).parameters.values() if p.kind is not p.KEYWORD_ONLY][1:]
    originals = API["signatures"]["AdamWeightDecay.__init__"][1:]
    assert [p.name for p in ours] == [p["name"] for p in originals]
    assert [p.default for p in ours if p.default is not p.empty] == [p["default"] for p in originals if "default" in p]
