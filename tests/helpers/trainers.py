"""What trainers train on, and what they are not asked about."""

import pytest
import torch

QUIET = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]
"""What trainers warn of that does not matter here."""


def batches(number):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 4, 5, generator=generator)


def loss_of(model, x):
    return model(x).square().mean()
