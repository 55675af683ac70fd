"""The float32 weights as a state dict, and back; what an optimizer keeps, in words."""

import copy

import pytest
import torch
from helpers.comparing import assert_same, same
from helpers.loops import Net, sharded, train
from helpers.optimizers import BACKENDS, OPTIMIZERS
from helpers.precision import FROZEN, HALVES, PRECISE, each_half, float32_weight
from torch import nn

import fusedopt
from fusedopt import AdamW, Lion, float32_parameters, load_float32_parameters

pytestmark = pytest.mark.filterwarnings(FROZEN)


def trained(half=torch.bfloat16, steps=3, cls=AdamW, model=None, **options):
    model = (model or Net()).to(half)
    optimizer = cls(model.parameters(), lr=0.01, **{"master_weights": True, **options})
    train(model, optimizer, steps)
    return model, optimizer


@each_half
def test_they_are_the_weights_that_updates_work_on(half):
    model, optimizer = trained(half)
    weights = float32_parameters(optimizer, model)
    assert list(weights) == list(model.state_dict())
    for name, p in model.named_parameters():
        assert_same(weights[name], float32_weight(optimizer, p), name)
        assert not torch.equal(weights[name], p.detach().float())
    kept = copy.deepcopy(weights)
    train(model, optimizer, 1)
    assert_same(weights, kept)  # They share no memory with what goes on.


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_without_master_weights_they_are_the_models_own(dtype):
    model, optimizer = trained(dtype, master_weights=False)
    weights = float32_parameters(optimizer, model)
    wide = torch.promote_types(dtype, torch.float32)
    assert_same(weights, {name: p.detach().to(wide) for name, p in model.named_parameters()})
    kept = copy.deepcopy(weights)
    train(model, optimizer, 1)
    assert_same(weights, kept)


def test_what_an_option_left_behind_does_not_count():
    model, optimizer = trained()
    optimizer.param_groups[0]["master_weights"] = False
    train(model, optimizer, 1)
    weights = float32_parameters(optimizer, model)
    assert_same(weights, {name: p.detach().float() for name, p in model.named_parameters()})


@each_half
@pytest.mark.parametrize("steps", [0, 2])
def test_loading_is_the_inverse(half, steps):
    model, optimizer = trained(half)
    weights = float32_parameters(optimizer, model)
    other = Net(9).to(half)
    another = AdamW(other.parameters(), lr=0.01, master_weights=True)
    train(other, another, steps)
    load_float32_parameters(another, other, weights)
    assert_same(float32_parameters(another, other), weights)
    assert_same(other, model)
    assert {int(s["step"]) for s in another.state.values()} == {steps}


def test_a_run_in_16_bits_starts_from_float32_weights():
    """And is the float32 run's from then on."""
    reference = Net()
    model = Net(9).bfloat16()
    optimizer = Lion(model.parameters(), lr=0.01, master_weights=True)
    load_float32_parameters(optimizer, model, reference.state_dict())
    theirs = Lion(reference.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p, q in zip(model.parameters(), reference.parameters()):
            q.grad = torch.randn(p.shape, generator=generator).bfloat16().float()
            p.grad = q.grad.bfloat16()
        optimizer.step()
        theirs.step()
    assert_same(float32_parameters(optimizer, model), dict(reference.state_dict()))


def test_loading_where_the_option_was_switched_on_a_moment_ago():
    model, optimizer = trained(master_weights=False)
    optimizer.param_groups[0]["master_weights"] = True
    weights = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    load_float32_parameters(optimizer, model, weights)
    assert_same(float32_parameters(optimizer, model), weights)


def test_loading_without_master_weights_rounds_to_nearest():
    for options in ({}, {"stochastic_rounding": True}):
        model = Net().bfloat16()
        optimizer = AdamW(model.parameters(), **options)
        weights = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
        load_float32_parameters(optimizer, model, weights)
        assert_same(dict(model.state_dict()), {name: value.bfloat16() for name, value in weights.items()})
        assert not optimizer.state


class Tied(nn.Module):
    """A weight under two names, a buffer of another dtype, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.tensor(4))
        self.register_buffer("scale", torch.full((2,), 0.5))

    def forward(self, x):
        return self.head(self.embedding(x))


def test_tied_weights_buffers_and_parameters_without_a_state():
    model = Tied().bfloat16()
    optimizer = AdamW([model.embedding.weight], lr=0.01, master_weights=True)
    for _ in range(2):
        model(torch.tensor([1, 2, 6])).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = float32_parameters(optimizer, model)
    assert_same(weights["embedding.weight"], weights["head.weight"])
    assert_same(weights["embedding.weight"], float32_weight(optimizer, model.embedding.weight))
    assert weights["frozen"].dtype == torch.float32 and weights["count"] == 4
    assert weights["count"].data_ptr() != model.count.data_ptr()

    other = Tied().bfloat16()
    other.count.fill_(9)
    another = AdamW([other.embedding.weight], lr=0.01, master_weights=True)
    load_float32_parameters(another, other, weights)
    assert other.count == 4
    assert_same(float32_parameters(another, other), weights)
    reference = Tied()
    reference.load_state_dict(weights)  # They fit the float32 model, too.


@pytest.mark.parametrize("half", [torch.bfloat16])
def test_before_the_first_step_they_are_the_models_own(half):
    model = Net().to(half)
    optimizer = AdamW(model.parameters(), master_weights=True)
    assert_same(float32_parameters(optimizer, model), {n: p.detach().float() for n, p in model.named_parameters()})
    assert not optimizer.state


def broken(weights):
    first = next(iter(weights))
    rest = {name: value for name, value in weights.items() if name != first}
    yield rest, "missing .*first.weight"
    yield {**weights, "more": torch.ones(1)}, "unexpected .*more"
    yield {**weights, first: weights[first].T}, "first.weight of the state dict is .*5, 8.*expected .*8, 5"
    yield {**weights, "last.weight": None}, "last.weight of the state dict is NoneType"
    yield {**weights, "last.weight": [1.0]}, "last.weight of the state dict is list"


def test_what_does_not_fit_changes_nothing():
    model, optimizer = trained()
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
    new = {name: value + 1.0 for name, value in float32_parameters(optimizer, model).items()}
    for wrong, message in broken(new):
        with pytest.raises(ValueError, match=message):
            load_float32_parameters(optimizer, model, wrong)
    assert_same((dict(model.state_dict()), optimizer.state_dict()), before)


def test_sharded_weights_are_sharded_and_load():
    with sharded(Net().bfloat16()) as model:
        optimizer = AdamW(model.parameters(), lr=0.01, master_weights=True)
        train(model, optimizer, 2)
        weights = float32_parameters(optimizer, model)
        plain, plain_optimizer = trained(steps=2)
        expected = float32_parameters(plain_optimizer, plain)
        for name, p in model.named_parameters():
            assert weights[name].placements == p.placements and weights[name].dtype == torch.float32
        assert_same({name: value.full_tensor() for name, value in weights.items()}, expected)
        # Whole ones, the same in all processes, load as well as sharded ones.
        for given in (expected, weights):
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            load_float32_parameters(optimizer, model, given)
            again = float32_parameters(optimizer, model)
            assert_same({name: value.full_tensor() for name, value in again.items()}, expected)


@each_half
@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_master_weights_forgets_what_completed_the_parameters(half, backend, device):
    device = device if backend == "triton" else torch.device("cpu")
    shape = (33,)
    results = []
    for reset in (True, False):
        p = nn.Parameter(torch.ones(shape, dtype=half, device=device))
        optimizer = Lion([p], lr=1e-4, master_weights=True, backend=backend)
        optimizer.reset_master_weights()  # before the first step there is nothing to do
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        with torch.no_grad():
            p.add_(0.5)
        if reset:
            optimizer.reset_master_weights()
            assert_same(float32_weight(optimizer, p).cpu(), p.detach().float().cpu())
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(float32_weight(optimizer, p).cpu())
    assert_same(results[0], torch.full(shape, 1.5) - 1e-4)
    # Without it a remainder is left over; a copy that does not round to the parameter any more does not count.
    assert same(*results) == (half is torch.float16)
    assert float((results[0] - results[1]).abs().max()) <= 2.0**-8


LINES = [
    ("Lion", torch.bfloat16, {}, "bfloat16 2 + exp_avg bfloat16 2 = 4 bytes"),
    ("Lion", torch.bfloat16, {"master_weights": True}, "bfloat16 2 + exp_avg float32 4 + remainder int16 2 = 8 bytes"),
    (
        "Lion",
        torch.float16,
        {"master_weights": True},
        "float16 2 + exp_avg float32 4 + master_weight float32 4 = 10 bytes",
    ),
    ("AdamW", torch.float32, {}, "float32 4 + exp_avg float32 4 + exp_avg_sq float32 4 = 12 bytes"),
    (
        "AdamW",
        torch.float32,
        {"state_dtype": torch.bfloat16},
        "float32 4 + exp_avg bfloat16 2 + exp_avg_sq bfloat16 2 = 8 bytes",
    ),
    (
        "AdamW",
        torch.bfloat16,
        {"stochastic_rounding": True},
        "bfloat16 2 + exp_avg bfloat16 2 + exp_avg_sq bfloat16 2 = 6 bytes",
    ),
]


@pytest.mark.parametrize("name, dtype, options, expected", LINES)
def test_a_line_says_what_is_kept(name, dtype, options, expected):
    optimizer = OPTIMIZERS[name].cls([nn.Parameter(torch.ones(30, 40, dtype=dtype))], **options)
    assert optimizer.describe() == f"group 0: 1,200 parameters: {expected}"


@pytest.mark.parametrize("name", PRECISE)
def test_the_bytes_are_those_of_the_state(name):
    """Added up over a model of several groups and dtypes, but for the numbers per tensor."""
    params = [nn.Parameter(torch.ones(shape, dtype=d)) for shape in ((20, 30), (50,)) for d in (*HALVES, torch.float32)]
    groups = [{"params": params[:4], "master_weights": True}, {"params": params[4:], "state_dtype": torch.bfloat16}]
    optimizer = OPTIMIZERS[name].cls(groups)
    described = optimizer.describe()
    optimizer.init_state()
    assert optimizer.describe() == described
    kept = 0
    for line in described.splitlines():
        _, elements, rest = line.split(":")
        kept += int(elements.split()[0].replace(",", "")) * float(rest.rsplit("=", 1)[1].split()[0])
    states = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
    total = sum(t.numel() * t.element_size() for t in [*params, *states])
    assert kept == pytest.approx(total, rel=0.01)


def test_lazy_parameters_are_left_out_and_nothing_is_no_line():
    lazy = nn.LazyLinear(3, bias=False)
    assert Lion(lazy.parameters()).describe() == ""
    lazy(torch.ones(1, 4))
    assert Lion(lazy.parameters()).describe().startswith("group 0: 12 parameters")
    assert "describe" in dir(fusedopt.AdamW)
