"""AdamWeightDecay: the recorded runs, which parameters decay, param groups, clipping."""

import math
import weakref

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.golden import assert_close, replay
from helpers.keras import BACKENDS, STATE_64, TOLERANCES, device_of, keras_cases, parameter, recorded, step

from fusedopt.interface import StepArgs
from fusedopt.keras import AdamWeightDecay
from fusedopt.optimizer.clipping import Clipping

REFUSED = ("weight_decay_negative",)
CASES = [case for case in keras_cases("tf_adam_weight_decay") if case.name not in REFUSED]
API = recorded("tf_api")

pytestmark = pytest.mark.filterwarnings("ignore:lr is Keras' old name")


def round_trip(optimizer):
    """Returns the optimizer of the config as the original makes it, without the lists of patterns."""
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


# Param groups.


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_kept(backend):
    """Their memory is needed by the next backward pass."""
    p = parameter(*range(20), device=device_of(backend))
    for options in ({}, {"clipnorm": 1.0}):
        optimizer = AdamWeightDecay([p], backend=backend, **options)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            gone = weakref.ref(p.grad)
            optimizer.step()
            optimizer.zero_grad()
            assert gone() is None


def test_patterns_are_searched_in_the_names_of_the_present_model():
    """A checkpoint has names too, perhaps of the model in another wrapper: patterns are not searched in those."""
    wrapped = AdamWeightDecay([("module.bias", parameter())], exclude_from_weight_decay=["^bias"])
    optimizer = AdamWeightDecay([("bias", parameter())], weight_decay_rate=0.5, exclude_from_weight_decay=["^bias"])
    optimizer.load_state_dict({**wrapped.state_dict()})
    optimizer.param_groups[0]["weight_decay"] = 0.5
    step(optimizer, 0.0)
    assert optimizer.param_groups[0]["params"][0].tolist() == [1.0, -2.0]


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
    assert_same(p, before)


# Clipping.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "clipping", [{"clipvalue": 0.3}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}], ids=lambda c: next(iter(c))
)
def test_clipped_is_clipped_by_hand(clipping, dtype, backend):
    """Gradients stay as they are; the update is that of gradients clipped in float32 (or float64)."""
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
        assert_same(given, before)
        results.append(params)
    assert_near(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


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
    """The factor of a GradScaler is divided out before anything is compared with a bound."""
    p = parameter()
    optimizer = AdamWeightDecay([p], global_clipnorm=1.0)
    control = StepArgs(scale=0.5, grad_scale=torch.tensor([1024.0]))
    _, clipped = optimizer.clipping.clip([[1024.0 * torch.tensor([3.0, 4.0])]], control)
    assert float(clipped.scale) * 1024.0 == pytest.approx(1 / 5) and clipped.grad_scale is None
    _, unclipped = optimizer.clipping.clip([[1024.0 * torch.tensor([0.3, 0.4])]], control)
    assert float(unclipped.scale) * 1024.0 == 0.5


@pytest.mark.parametrize("bound", ["clipvalue", "clipnorm", "global_clipnorm"])
def test_a_clipped_float64_gradient_is_unscaled_in_float64(bound):
    """A scale of 3 has no exact reciprocal, and 1 / 3 in float32 is off by 3e-8."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdamWeightDecay([p], beta_1=0.0, **{bound: 100.0})
    p.grad = torch.tensor([3.0, 6.0], dtype=torch.float64)
    optimizer.grad_scale = torch.tensor(3.0)
    optimizer.step()
    assert_near(optimizer.state[p]["exp_avg"], torch.tensor([1.0, 2.0], dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clipping", [{}, {"clipvalue": 1.0}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}], ids=str)
def test_norm_and_skipping_are_of_the_gradients_before_clipping(clipping, backend):
    p = parameter(device=device_of(backend))
    optimizer = AdamWeightDecay([p], skip_nonfinite=True, backend=backend, **clipping)
    before = p.detach().clone()
    step(optimizer, math.inf)
    assert_same(p, before)
    assert optimizer.skipped_steps == 1
    assert optimizer.iterations == 0 and optimizer.state[p]["step"] == 0
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
