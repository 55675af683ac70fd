"""Options that are tensors, as a rate may be: decays, betas and eps, read on their device at every step."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers.comparing import assert_same, same
from helpers.optimizers import BACKENDS, OPTIMIZERS
from helpers.waits import Waits
from torch.distributed.checkpoint import state_dict as dcp

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion, create_optimizer, register_step_in_backward
from fusedopt.backends.triton.scalars import DeviceScalars

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

LATER = {
    "weight_decay": (0.1, 0.3),
    "weight_decay_rate": (0.1, 0.3),
    "betas": ((0.9, 0.95), (0.5, 0.999)),
    "beta_1": (0.9, 0.5),
    "beta_2": (0.95, 0.999),
    "beta1": (0.9, 0.5),
    "eps": (1e-6, 1e-2),
    "epsilon": (1e-6, 1e-2),
}
"""Values of options: the first, and another one from the second step on."""

PAIRS = {"eps": ((1e-30, 1e-3), (1e-4, 1.5))}
"""Of Adafactor."""

CASES = {
    "AdamW": (AdamW, {"lr": 0.1}, ("weight_decay", "betas", "eps")),
    "AdamW-torch": (AdamW, {"lr": 0.1, "convention": "torch", "amsgrad": True}, ("weight_decay", "betas", "eps")),
    "AdamW-uncorrected": (AdamW, {"lr": 0.1, "correct_bias": False}, ("weight_decay", "betas")),
    "AdamWeightDecay": (AdamWeightDecay, {"decay": 0.1}, ("weight_decay_rate", "beta_1", "beta_2", "epsilon")),
    "Adafactor": (Adafactor, {}, ("weight_decay", "eps", "beta1")),
    "Lion": (Lion, {"lr": 0.1}, ("weight_decay", "betas")),
}
"""Which options of an optimizer may be tensors."""

IN_GROUPS = {"weight_decay_rate": "weight_decay", "epsilon": "eps"}


def values(cls, option):
    return PAIRS[option] if cls is Adafactor and option in PAIRS else LATER[option]


def tensor(value, dtype=torch.float64, device="cpu"):
    """A value, or a pair of them, as tensors."""
    if isinstance(value, tuple):
        return tuple(tensor(x, dtype, device) for x in value)
    return torch.tensor(value, dtype=dtype, device=device)


def number(value):
    """The same as floats: of a float32 tensor what it holds."""
    return tuple(map(number, value)) if isinstance(value, (tuple, list)) else float(value)


def fill(held, value):
    for t, x in zip(held, value) if isinstance(held, (tuple, list)) else [(held, value)]:
        t.fill_(x)


def parameters(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in ((3, 5), (7,), ())]


def step(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer.step()


def everything(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[p.detach() for p in params], [optimizer.state[p] for p in params]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tensors_have_the_bits_of_numbers(name, dtype, backend, device):
    """All options at once, and the values they are given between two steps."""
    cls, options, names = CASES[name]
    place = device if backend == "triton" else "cpu"
    given = {option: tensor(values(cls, option)[0], dtype, place) for option in names}
    ours = cls(parameters(place), **options, **given, backend=backend)
    theirs = cls(parameters(place), **options, **{k: number(v) for k, v in given.items()}, backend=backend)
    for turn in range(3):
        step(ours, turn)
        step(theirs, turn)
        assert_same(everything(ours), everything(theirs), f"step {turn}")
        for option in names if turn == 0 else ():
            fill(given[option], values(cls, option)[1])
            if option in ("beta_1", "beta_2"):
                place_in_pair = int(option[-1]) - 1
                betas = list(theirs.param_groups[0]["betas"])
                betas[place_in_pair] = number(given[option])
                theirs.param_groups[0]["betas"] = tuple(betas)
            else:
                theirs.param_groups[0][IN_GROUPS.get(option, option)] = number(given[option])


@pytest.mark.parametrize("name", CASES)
def test_every_option_is_read(name):
    """Each by itself: another value gives other weights at the next step."""
    cls, options, names = CASES[name]
    for option in names:
        given = tensor(values(cls, option)[0])
        optimizer = cls(parameters(), **options, **{option: given})
        step(optimizer, 0)
        other = copy.deepcopy(optimizer)
        fill(given, values(cls, option)[1])
        for one in (optimizer, other):
            step(one, 1)
        assert not same(everything(optimizer), everything(other)), option


def test_one_beta_of_two_and_tensors_of_one_element():
    ours = AdamW(parameters(), betas=(0.9, tensor(0.95)), eps=torch.full((1,), 1e-6, dtype=torch.float64))
    theirs = AdamW(parameters(), betas=(0.9, 0.95))
    for seed in range(2):
        step(ours, seed)
        step(theirs, seed)
    assert_same(everything(ours), everything(theirs))


BAD = [
    (torch.ones(2), "as a tensor must hold one floating-point number, got shape"),
    (torch.tensor(1), "as a tensor must hold one floating-point number, got shape"),
    (torch.tensor(0.1, device="meta"), "on the meta device, where it holds no number"),
    (torch.tensor(0.1, requires_grad=True), "requires a gradient, which a step does not give it: detach it"),
    (torch.tensor(-1.0), "must be"),
    (torch.tensor(math.nan), "must be"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bad_tensors_are_refused(name, bad, message):
    """By the constructor, and where one is put into a group."""
    cls, options, names = CASES[name]
    for option in names:
        present = values(cls, option)[0]
        value = (present[0], bad) if isinstance(present, tuple) else bad
        with pytest.raises(ValueError, match=message):
            cls(parameters(), **options, **{option: value})
        optimizer = cls(parameters(), **options)
        before = copy.deepcopy(everything(optimizer))
        key = IN_GROUPS.get(option, "betas" if option in ("beta_1", "beta_2") else option)
        optimizer.param_groups[0][key] = (0.9, bad) if key == "betas" else value
        with pytest.raises(ValueError, match=message):
            step(optimizer, 0)
        assert_same(everything(optimizer), before)


@pytest.mark.parametrize("name", ["clip_threshold", "decay_rate"])
def test_what_stays_a_number(name):
    with pytest.raises(ValueError, match=f"{name} must be a number, got tensor"):
        Adafactor(parameters(), **{name: torch.tensor(0.5)})


def in_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "checkpoint": lambda o, new: (new().load_state_dict(o.state_dict()), new.last)[1],
    "a file": lambda o, new: (new().load_state_dict(in_a_file(o.state_dict())), new.last)[1],
    "deepcopy": lambda o, new: copy.deepcopy(o),
    "pickle": lambda o, new: pickle.loads(pickle.dumps(o)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", CASES)
def test_copies_and_checkpoints_keep_tensors(name, how):
    """Of their own, in their dtype, with the present values."""
    cls, options, names = CASES[name]

    def new():
        given = {option: tensor(values(cls, option)[0]) for option in names}
        new.last = cls(parameters(), **options, **given)
        return new.last

    optimizer = new()
    step(optimizer, 0)
    (group,) = optimizer.param_groups
    keys = sorted({IN_GROUPS.get(o, "betas" if o in ("beta_1", "beta_2") else o) for o in names})
    fill(group["weight_decay"], 0.25)
    other = COPIES[how](optimizer, new)
    with torch.no_grad():
        for p, q in zip(other.param_groups[0]["params"], group["params"]):
            p.copy_(q)
    assert_same([other.param_groups[0][key] for key in keys], [group[key] for key in keys])
    step(other, 1)
    fill(group["weight_decay"], 0.5)
    assert float(other.param_groups[0]["weight_decay"]) == 0.25
    fill(group["weight_decay"], 0.25)
    step(optimizer, 1)
    assert_same(everything(other), everything(optimizer))


@pytest.mark.parametrize("flat", [False, True])
def test_tensors_through_distributed_checkpoint(flat):
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    pair = []
    for decay in (0.25, 0.1):
        model = torch.nn.Linear(3, 2)
        pair.append((model, AdamW(model.parameters(), weight_decay=tensor(decay), betas=tensor((0.5, 0.75)))))
    (model, optimizer), (other, resumed) = pair
    step(optimizer, 0)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    dcp.set_optimizer_state_dict(other, resumed, saved, options=options)
    (group,) = resumed.param_groups
    assert_same([group["weight_decay"], *group["betas"]], [tensor(0.25), *tensor((0.5, 0.75))])


def test_a_saved_tensor_is_a_number_where_the_optimizer_has_one():
    ours, plain = AdamW(parameters(), eps=tensor(1e-3)), AdamW(parameters())
    plain.load_state_dict(ours.state_dict())
    assert plain.param_groups[0]["eps"] == 1e-3 and type(plain.param_groups[0]["eps"]) is float


def test_groups_that_were_given_one_tensor_have_one_each():
    decay, betas = tensor(0.1), tensor((0.9, 0.95))
    optimizer = AdamW([{"params": [p]} for p in parameters()], weight_decay=decay, betas=betas)
    first, *others = optimizer.param_groups
    assert first["weight_decay"] is decay and first["betas"][1] is betas[1]
    for group in others:
        assert group["weight_decay"] is not decay and group["betas"][1] is not betas[1]
    decay.fill_(0.5)
    assert [float(group["weight_decay"]) for group in optimizer.param_groups] == [0.5, 0.1, 0.1]


def test_keras_names_and_config():
    optimizer, _ = create_optimizer(parameters(), 0.1, 10, 2)
    optimizer.set_epsilon(tensor(1e-3))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "beta_1": tensor(0.5)})
    step(optimizer, 0)
    assert isinstance(optimizer.param_groups[0]["eps"], torch.Tensor)
    assert float(optimizer.param_groups[1]["betas"][0]) == 0.5
    config = AdamWeightDecay(parameters(), weight_decay_rate=tensor(0.25), beta_2=tensor(0.5)).get_config()
    assert (config["weight_decay_rate"], config["beta_2"]) == (0.25, 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.9, 0.99, 0.98, 1e-7, 1 / 3, 0.0])
def test_a_config_has_the_shortest_decimals_that_give_the_tensor_back(dtype, value):
    held = torch.tensor(value, dtype=dtype)
    options = {"learning_rate": held, "beta_1": held, "beta_2": held.reshape(1), "weight_decay_rate": held}
    config = AdamWeightDecay(parameters(), **options).get_config()
    for name in options:
        assert type(config[name]) is float and torch.equal(torch.tensor(config[name], dtype=dtype), held)
    assert dtype is torch.float16 or value == 1 / 3 or config["beta_1"] == value
    assert len(repr(config["beta_1"])) <= len(repr(held.item()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_for_both_betas_stays_one(backend):
    beta = torch.tensor(0.9)
    params = parameters(beta.device)
    optimizer = AdamW([{"params": [p]} for p in params], lr=0.1, betas=(beta, beta), backend=backend)
    for first, second in (group["betas"] for group in optimizer.param_groups):
        assert first is second
    assert optimizer.param_groups[0]["betas"][0] is beta is not optimizer.param_groups[1]["betas"][0]
    twins = parameters(beta.device)
    plain = AdamW([{"params": [p]} for p in twins], lr=0.1, betas=(beta.item(),) * 2, backend=backend)
    for number, value in enumerate((0.9, 0.5, 0.75)):
        for group, twin in zip(optimizer.param_groups, plain.param_groups):
            group["betas"][0].fill_(value)
            twin["betas"] = (group["betas"][1].item(),) * 2
        step(optimizer, number)
        step(plain, number)
    assert_same(params, twins)
    again = copy.deepcopy(optimizer)
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for group in again.param_groups:
        assert [b.item() for b in group["betas"]] == [0.75, 0.75] and group["betas"][0] is not beta


def test_a_step_in_backward_reads_them():
    model = torch.nn.Linear(3, 2)
    decay = tensor(0.5)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=decay, betas=tensor((0.9, 0.95)))
    other = copy.deepcopy(model)
    plain = AdamW(other.parameters(), lr=0.1, weight_decay=0.25, betas=(0.9, 0.95))
    register_step_in_backward(optimizer, model)
    decay.fill_(0.25)
    for one, own in ((model, optimizer), (other, plain)):
        one(torch.ones(2, 3)).square().sum().backward()
        own.step()
    assert_same(model, other)


def test_effective_lr_reads_eps():
    floor = torch.tensor(0.5)
    optimizer = Adafactor(parameters(), eps=(1e-30, floor))
    step(optimizer, 0)
    p = optimizer.param_groups[0]["params"][2]
    floor.fill_(10.0)
    assert optimizer.effective_lr(p) == pytest.approx(0.1)


@pytest.fixture
def devices_are_not_waited_for(monkeypatch):
    """For tensors on a GPU, for which those of these tests stand in, a step looks at the kind and not at the value."""
    monkeypatch.setattr("fusedopt.optimizer.state_check.has_data", lambda t: False)
    from fusedopt import checks

    in_use = checks.in_use

    def of_kind(option):
        if isinstance(option, (tuple, list)):
            return tuple(map(of_kind, option))
        return 0.0 if isinstance(option, torch.Tensor) else in_use(option)

    monkeypatch.setattr(checks, "in_use", of_kind)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; see test_gpu.py")
@pytest.mark.usefixtures("devices_are_not_waited_for")
@pytest.mark.parametrize("name", CASES)
def test_every_replay_reads_them_and_nothing_waits(capture, name):
    pytest.importorskip("triton")
    cls, options, names = CASES[name]
    if name == "AdamWeightDecay":
        options = {}  # whose decay of the rate is worked out by torch's operations
    runs = []
    for _ in range(2):
        given = {option: tensor(values(cls, option)[0]) for option in names}
        runs.append((cls(parameters(), **options, **given, backend="triton"), given))
        step(runs[-1][0], 0)
    (ours, held), (theirs, others) = runs
    with Waits() as waits, capture() as graph:
        step(ours, 1)
    assert waits.count == 0
    for turn in range(2):
        for given in (held, others) if turn else ():
            for option in names:
                fill(given[option], values(cls, option)[1])
        graph.replay()
        step(theirs, 1)
        assert_same(everything(ours), everything(theirs), f"replay {turn}")


def test_a_tensor_on_the_cpu_is_refused_in_a_capture(capture):
    scalars = DeviceScalars(torch.device("cuda", 0))
    assert scalars.number("weight_decay", torch.tensor(0.5)) == (0.5, 0, 0)
    with (
        capture(),
        pytest.raises(RuntimeError, match=r"weight_decay is a tensor on cpu, .* make it a tensor on cuda:0"),
    ):
        scalars.number("weight_decay", torch.tensor(0.5))


def test_the_table_has_every_optimizer():
    assert {cls for cls, _, _ in CASES.values()} == {row.cls for row in OPTIMIZERS.values()}
