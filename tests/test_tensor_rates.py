"""Rates that are tensors, of any floating dtype."""

import pytest
import torch
from helpers.comparing import assert_same
from helpers.optimizers import OPTIMIZERS
from helpers.surroundings import both_backends, outcome, parameters, step

from fusedopt import Adafactor
from fusedopt.schedules.metric import ReduceLROnPlateau

LR_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", LR_DTYPES, ids=str)
@both_backends
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_in_a_tensor_is_the_number_that_it_holds_whatever_its_dtype(name, backend, dtype):
    lr = torch.tensor(3e-3, dtype=dtype)
    row = OPTIMIZERS[name]
    options = {"relative_step": False} if row.cls is Adafactor else {}
    updated = []
    for rate in (lr, lr.item()):
        optimizer = row(parameters(backend), **{row.rate: rate}, backend=backend, **options)
        for number in range(3):
            step(optimizer, number)
        shown = [optimizer.effective_lr(p) for p in optimizer.param_groups[0]["params"]] if options else []
        updated.append([*outcome(optimizer), *shown])
    assert_same(*updated)


@pytest.mark.parametrize("dtype", LR_DTYPES, ids=str)
def test_a_plateau_reduces_a_rate_in_a_tensor_as_it_would_the_number(dtype):
    lr = torch.tensor(0.3, dtype=dtype)
    rates = []
    for rate in (lr, lr.item()):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.7, patience=0, min_lr=1e-4)
        for loss in (2.0, 2.0):
            scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0].dtype is dtype
    assert rates[0].item() == torch.tensor(rates[1], dtype=torch.float64).to(dtype).item()
