"""The Triton AdamW's numbers: the recorded runs, and the rules on numpy arrays bit for bit."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.adamw import (
    GOLDEN,
    SIXTEEN_BITS,
    STATES,
    RoundedOnce,
    gradients,
    parameters,
    rounding_spoils_nothing,
)
from helpers.comparing import Tolerance, assert_near, assert_same
from helpers.golden import ROUNDED_TWICE_PER_STEP, assert_close, replay

from fusedopt import AdamW
from fusedopt.backends.triton.adamw import TritonAdamW as TritonStepper
from fusedopt_kernels import rules
from fusedopt_kernels.adamw import SCALARS

# The interpreter computes with numpy, which warns about what it is given here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

TritonAdamW = partial(AdamW, backend="triton")


@pytest.mark.parametrize("case", [case for case in GOLDEN if case.dtype not in SIXTEEN_BITS], ids=str)
def test_golden(case, device):
    assert_close(case, replay(case, TritonAdamW, device=device))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (not case.name.endswith("_decay")))
        for case in GOLDEN
        if case.dtype in SIXTEEN_BITS
    ],
)
def test_golden_in_16_bits_is_exact_arithmetic_rounded_once(case, device):
    """As for the eager backend; what the original's own rounding does not spoil is near its recording as well."""
    allowed = Tolerance("a tie may fall to the other side, and move the moments for some steps", ulps=2)
    ours, expected = replay(case, TritonAdamW, device=device), replay(case, RoundedOnce)
    assert_near(ours.parameters, expected.parameters, allowed)
    if rounding_spoils_nothing(case):
        assert_close(case, ours, parameters=ROUNDED_TWICE_PER_STEP[case.dtype], skip_state=STATES)


class OnNumpy:
    """The rules on numpy arrays of the compute dtype, one parameter at a time, in the kernel's place."""

    def __init__(self, params, states, options, convention):
        self.params = [p.detach().cpu().clone() for p in params]
        self.states = [{name: value.cpu().clone() for name, value in state.items()} for state in states]
        self.options, self.convention = options, rules.CONVENTIONS[convention]

    def scalars(self, step):
        o = self.options
        betas = o["betas"] if o["correct_bias"] else (0.0, 0.0)
        return rules.adamw_scalars(
            np.float64(step),
            np.float64(o["lr"]),
            np.float64(o["weight_decay"]),
            np.float64(o["eps"]),
            *map(np.float64, map(rules.log_beta, betas)),
            self.convention.decays_update,
            self.convention.corrects_eps,
            np.exp,
            np.sqrt,
        )

    def step(self, grads, scale, scalars):
        """`scalars`: (decay_step, step_size, eps_hat) of each parameter."""
        beta1, beta2 = self.options["betas"]
        for i, (p, g, s) in enumerate(zip(self.params, grads, self.states)):
            if g is not None or self.convention.shared_steps:
                s["step"] += 1
            if g is None:
                continue
            wide = torch.promote_types(p.dtype, torch.float32)
            f = {torch.float32: np.float32, torch.float64: np.float64}[wide]
            arrays = [t.cpu().to(wide).numpy() for t in (p, g, s["exp_avg"], s["exp_avg_sq"])]
            factor = f(-scale if self.options["maximize"] else scale)
            decay_step, step_size, eps_hat = map(f, scalars[i])
            m, v = rules.adam_moments(
                arrays[1] * factor, arrays[2], arrays[3], f(beta1), f(1.0 - beta1), f(beta2), f(1.0 - beta2)
            )
            s["exp_avg"].copy_(torch.from_numpy(m))
            s["exp_avg_sq"].copy_(torch.from_numpy(v))
            if self.options["amsgrad"]:
                v = np.maximum(s["max_exp_avg_sq"].to(wide).numpy(), v)
                s["max_exp_avg_sq"].copy_(torch.from_numpy(v))
            new = rules.adamw_update(arrays[0], m, v, decay_step, step_size, eps_hat, np.sqrt, np.divide)
            p.copy_(torch.from_numpy(new))


PLACES = SCALARS.places


def device_scalars(optimizer):
    """What the prologue of the last step worked out: (decay_step, step_size, eps_hat) per row."""
    (stepper,) = (stepper for stepper in optimizer._engine.steppers.values() if isinstance(stepper, TritonStepper))
    return (
        stepper._tables._eager._scratch["scalars"][:, [PLACES.decay_step, PLACES.step_size, PLACES.eps_hat]]
        .cpu()
        .numpy()
    )


DTYPES = {  # parameter, gradient, moments
    "float32": (torch.float32, torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16 with float32 gradients and moments": (torch.bfloat16, torch.float32, torch.float32),
    "float32 with bfloat16 gradients": (torch.float32, torch.bfloat16, torch.float32),
    "float64 with float32 gradients and moments": (torch.float64, torch.float32, torch.float32),
}
OPTIONS = {
    "transformers": {"convention": "transformers"},
    "torch": {"convention": "torch"},
    "keras": {"convention": "keras"},
    "no correct_bias": {"correct_bias": False},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True, "convention": "torch"},
}
DEFAULTS = {
    "lr": 3e-2, "betas": (0.85, 0.97), "eps": 1e-5, "weight_decay": 0.1, "correct_bias": True, "amsgrad": False,
    "maximize": False, "convention": "transformers",
}  # fmt: skip


SIZES = (1, 7, 1024, 1025, 3000, 0, 2048)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.usefixtures("checks_for_overflow")
def test_equals_the_rules_on_numpy_bit_for_bit(options, dtypes, device):
    dtype, grad_dtype, moment_dtype = dtypes
    params = parameters(device, SIZES, dtype)
    options = {**DEFAULTS, **options}
    convention = options.pop("convention")
    optimizer = AdamW(params, convention=convention, backend="triton", **options)
    optimizer.init_state()
    for state in optimizer.state.values():
        for name in state.keys() - {"step"}:
            state[name] = state[name].to(moment_dtype)
    reference = OnNumpy(params, [optimizer.state[p] for p in params], options, convention)
    for step in range(2):
        grads = gradients(params, step, grad_dtype)
        grads[3][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        grads[step] = None
        optimizer.apply_gradients(zip(grads, params), scale=0.25)
        scalars = device_scalars(optimizer)
        with np.errstate(all="ignore"):
            reference.step(grads, scale=0.25, scalars=scalars)
        for i, g in enumerate(grads):
            if g is not None:
                expected = reference.scalars(float(reference.states[i]["step"]))
                # A device's own exponential is right to 8e-15, which 1 - exp(...) enlarges here by 1 / (1 - 0.97).
                rtol = 1e-12 if device.type == "cuda" else 0.0
                np.testing.assert_allclose(scalars[i], expected, rtol=rtol, atol=0.0)
        for i, p in enumerate(params):
            name = f"parameter {i} after step {step + 1}"
            assert_same(p, reference.params[i], name, equal_nan=True)
            assert_same(optimizer.state[p], reference.states[i], f"state of {name}", equal_nan=True)
