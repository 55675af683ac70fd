"""The references reproduce what the original optimizers did."""

from dataclasses import replace

import pytest
import torch
from helpers.golden import assert_close, cases, replay
from helpers.keras import STATE_64, TOLERANCES, keras_cases

from fusedopt.reference import ReferenceAdafactor, ReferenceAdamW, ReferenceAdamWeightDecay


@pytest.mark.parametrize("case", cases("adamw"), ids=str)
def test_adamw_golden(case):
    assert_close(case, replay(case, ReferenceAdamW))


@pytest.mark.parametrize("case", cases("adafactor"), ids=str)
def test_adafactor_golden(case):
    records = replay(case, ReferenceAdafactor)
    assert_close(case, records)
    assert [group["lr"] for group in records.optimizer.param_groups] == case.raw["group_lr_at_end"]


OPTIONS = ("beta_1", "beta_2", "epsilon", "amsgrad", "weight_decay_rate")
UNCLIPPED = [case for case in keras_cases("tf_adam_weight_decay") if not any("clip" in name for name in case.kwargs)]


@pytest.mark.parametrize("case", UNCLIPPED, ids=str)
def test_adam_weight_decay_golden(case):
    decays = [entry["decays"] for entry in case.raw["params"]]
    grouped = replace(
        case,
        kwargs={name: value for name, value in case.kwargs.items() if name in OPTIONS},
        groups=[
            {"params": [i for i, decay in enumerate(decays) if decay]},
            {"params": [i for i, decay in enumerate(decays) if not decay], "weight_decay": 0.0},
        ],
        lr_per_step=[[rate, rate] for rate in case.rates],
    )
    records = replay(grouped, ReferenceAdamWeightDecay)
    state = STATE_64 if case.dtype == torch.float64 else None
    assert_close(grouped, records, parameters=TOLERANCES[case.dtype], state=state)


@pytest.mark.parametrize("optimizer", [ReferenceAdamW, ReferenceAdafactor, ReferenceAdamWeightDecay])
def test_closure_runs_once_with_gradients(optimizer):
    weight = torch.nn.Parameter(torch.ones(3))
    calls = []

    def closure():
        loss = (weight * weight).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer([weight]).step(closure).item() == 3.0
    assert calls == [3.0]
    assert (weight < 1).all()
