"""Checkpoints and optimizers that an earlier version wrote load, and the run goes on as it did then."""

import pickle
from pathlib import Path

import pytest
import torch
from helpers.comparing import assert_near
from helpers.optimizers import BACKENDS

from fusedopt import Adafactor, AdamW, AdamWeightDecay, PolynomialDecay, WarmUp

# Written before parameters had an engine and tables had records. Three steps of gradients from the seeds 1 to 3;
# "after" are the weights after two more.
DATA = Path(__file__).parent / "data"
SAVED = torch.load(DATA / "checkpoints_before_0.2.pt", weights_only=True)
MAKE = {
    "AdamW": lambda params, **options: AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True, **options),
    "AdamW, keras": lambda params, **options: AdamW(params, lr=0.01, convention="keras", **options),
    "Adafactor": lambda params, **options: Adafactor(params, beta1=0.9, weight_decay=0.1, **options),
    "AdamWeightDecay": lambda params, **options: AdamWeightDecay(
        params, WarmUp(0.05, PolynomialDecay(0.05, 20), warmup_steps=3), weight_decay_rate=0.1, **options
    ),
}


# Written when optimizers had no options for low precision and no seed, with the same gradients: each optimizer pickled
# after three steps, and its weights after two more, as arrays.
PICKLED = pickle.loads((DATA / "optimizers_before_0.2.pkl").read_bytes())


def steps_four_and_five(optimizer, params):
    for seed in (4, 5):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_did(name, backend, device):
    saved = SAVED[name]
    params = [torch.nn.Parameter(p.clone().to(device)) for p in saved["weights"]]
    optimizer = MAKE[name](params, backend=backend)
    optimizer.load_state_dict(saved["optimizer"])
    steps_four_and_five(optimizer, params)
    # Written by the eager backend on one machine; another order of operations rounds otherwise.
    assert_near([p.detach() for p in params], saved["after"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickled_optimizer_of_an_earlier_version_goes_on_as_it_did(name):
    written, after = PICKLED[name]
    optimizer = pickle.loads(written)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    steps_four_and_five(optimizer, params)
    assert_near([p.detach() for p in params], list(map(torch.from_numpy, after)), rtol=1e-6, atol=1e-6)
    assert optimizer.seed == 0 and not optimizer.param_groups[0]["master_weights"]
    assert pickle.loads(pickle.dumps(optimizer)).state_dict().keys() == optimizer.state_dict().keys()
