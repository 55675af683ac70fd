"""Which parameters decay: by the type of their module and their dimensions, whatever their names."""

from functools import partial

import pytest
import torch
from helpers.optimizers import OPTIMIZERS
from torch import nn

from fusedopt.decay_groups import decay_groups, is_norm


class LlamaRMSNorm(nn.Module):
    """As in any number of libraries: a type of its own."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))


class PreNormBlock(nn.Module):
    """A name with a norm in it, around a matrix that is none."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.ones(4, 4))
        self.ln_f = LlamaRMSNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.block = PreNormBlock()
        self.norm1 = nn.BatchNorm1d(4)
        self.grid = nn.LayerNorm([4, 4])
        self.wide = LlamaRMSNorm(1, 4, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 8)
        self.head.weight = self.embed.weight


DECAYING = ["embed.weight", "conv.weight", "block.mix"]
KEPT = [
    *("scale", "conv.bias", "block.ln_f.weight", "norm1.weight", "norm1.bias"),
    *("grid.weight", "grid.bias", "wide.weight", "head.bias"),
]


def names(model, **options):
    return [sorted(group["param_names"]) for group in decay_groups(model, 0.1, report=None, **options)]


def test_who_decays():
    assert names(Model()) == [sorted(DECAYING), sorted(KEPT)]


@pytest.mark.parametrize("never", [[nn.Embedding], [nn.Linear]], ids=["first owner", "second owner"])
def test_a_shared_parameter_is_kept_if_any_owner_is(never):
    assert names(Model(), never=never)[0] == ["block.mix", "conv.weight"]


def test_min_dim():
    assert names(Model(), min_dim=3)[0] == ["conv.weight"]
    assert names(Model(), min_dim=0)[0] == sorted([*DECAYING, "scale", "conv.bias", "head.bias"])


def test_every_trainable_parameter_once():
    model = Model()
    first, second = decay_groups(model, 0.1, report=None)
    found = first["params"] + second["params"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(found) == len(trainable) and set(found) == set(trainable)
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    "make",
    [
        *(partial(row.at, 0.5) for row in OPTIMIZERS.values()),
        lambda groups: torch.optim.AdamW(groups, lr=0.5),
        lambda groups: torch.optim.SGD(groups, lr=0.5),
    ],
    ids=[*OPTIMIZERS, "torch.AdamW", "torch.SGD"],
)
@pytest.mark.parametrize("model", [Model, lambda: nn.Linear(4, 4, bias=False)], ids=["both groups", "nothing kept"])
def test_any_optimizer_takes_them(make, model):
    model = model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = decay_groups(model, 0.1, report=None)
    optimizer = make(groups)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    nonzero = [name for name in groups[0]["param_names"] if before[name].any()]
    assert sorted(moved) == sorted(nonzero)


def test_report():
    lines = []
    decay_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), 0.1, report=lines.append)
    assert lines == [
        "weight decay 0.1: 1 tensor, 6 parameters",
        "  6 of 1 in Linear: 0.weight",
        "weight decay 0: 3 tensors, 9 parameters",
        "  6 of 2 in LayerNorm: 1.weight, 1.bias",
        "  3 of 1 in Linear: 0.bias",
    ]


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(2), nn.RMSNorm(2), nn.GroupNorm(1, 2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.InstanceNorm1d(2)],
    ids=lambda norm: type(norm).__name__,
)
def test_torch_norms_are_norms(norm):
    assert is_norm(norm)


@pytest.mark.parametrize(
    ("model", "weight_decay", "message"),
    [
        (nn.Linear(2, 2), -0.1, "weight_decay must be >= 0, got -0.1"),
        (nn.Linear(2, 2).requires_grad_(False), 0.1, "no parameter of Linear requires a gradient"),
        (nn.LazyLinear(2), 0.1, "parameter weight has no shape yet: run the module once"),
    ],
    ids=["negative", "frozen", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_refuses(model, weight_decay, message):
    with pytest.raises(ValueError, match=message):
        decay_groups(model, weight_decay)
