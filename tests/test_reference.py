"""The references reproduce what the original optimizers did."""

import pytest
import torch
from golden_cases import assert_close, cases, replay

from fusedopt.reference import ReferenceAdafactor, ReferenceAdamW


@pytest.mark.parametrize("case", cases("adamw"), ids=str)
def test_adamw_golden(case):
    assert_close(case, replay(case, ReferenceAdamW))


@pytest.mark.parametrize("case", cases("adafactor"), ids=str)
def test_adafactor_golden(case):
    records = replay(case, ReferenceAdafactor)
    assert_close(case, records)
    assert [group["lr"] for group in records.optimizer.param_groups] == case.raw["group_lr_at_end"]


@pytest.mark.parametrize("optimizer", [ReferenceAdamW, ReferenceAdafactor])
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
