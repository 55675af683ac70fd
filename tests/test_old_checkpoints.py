"""Checkpoints that an earlier version wrote load, and the run goes on as it did then."""

from pathlib import Path

import pytest
import torch
from helpers.comparing import assert_near
from helpers.optimizers import BACKENDS

from fusedopt import Adafactor, AdamW, AdamWeightDecay, PolynomialDecay, WarmUp

# Written before parameters had an engine and tables had records. Three steps of gradients from the seeds 1 to 3;
# "after" are the weights after two more.
SAVED = torch.load(Path(__file__).parent / "data" / "checkpoints_before_0.2.pt", weights_only=True)
MAKE = {
    "AdamW": lambda params, **options: AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True, **options),
    "AdamW, keras": lambda params, **options: AdamW(params, lr=0.01, convention="keras", **options),
    "Adafactor": lambda params, **options: Adafactor(params, beta1=0.9, weight_decay=0.1, **options),
    "AdamWeightDecay": lambda params, **options: AdamWeightDecay(
        params, WarmUp(0.05, PolynomialDecay(0.05, 20), warmup_steps=3), weight_decay_rate=0.1, **options
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_did(name, backend, device):
    saved = SAVED[name]
    params = [torch.nn.Parameter(p.clone().to(device)) for p in saved["weights"]]
    optimizer = MAKE[name](params, backend=backend)
    optimizer.load_state_dict(saved["optimizer"])
    for seed in (4, 5):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer.step()
    # Written by the eager backend on one machine; another order of operations rounds otherwise.
    assert_near([p.detach() for p in params], saved["after"], rtol=1e-6, atol=1e-6)
