"""What Adafactor refuses, what state it keeps, and how that state travels."""

import io
import math

import pytest
import torch
from helpers.comparing import assert_near, assert_same

from fusedopt.adafactor import Adafactor, rate_on_device
from fusedopt.reference import ReferenceAdafactor

NAN, INF = math.nan, math.inf
MANUAL = {"relative_step": False, "lr": 0.1}


def weight(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape or (2, 3), **kwargs))


# The original's own refusals are the first three; all others are departures.
REFUSED = [
    ({"lr": 0.1}, r"lr=0\.1 has no effect.*relative_step=False"),
    ({"lr": 0.0}, r"lr=0\.0 has no effect"),
    ({**MANUAL, "warmup_init": True}, "warmup_init=True needs relative_step=True"),
    ({"relative_step": False}, "relative_step=False needs an lr"),
    ({**MANUAL, "lr": -1.0}, r"lr must be .*-1\.0"),
    ({**MANUAL, "lr": NAN}, "lr must be"),
    ({**MANUAL, "lr": torch.ones(2)}, "lr as a tensor must hold one"),
    ({"eps": 1e-30}, "eps must be a pair.*1e-30"),
    ({"eps": (1e-30,)}, "eps must be a pair"),
    ({"eps": (-1e-30, 1e-3)}, r"eps\[0\] must be .*-1e-30"),
    ({"eps": (1e-30, NAN)}, r"eps\[1\] must be"),
    ({"clip_threshold": None}, "clip_threshold must be a number, got None"),
    ({"clip_threshold": 0.0}, r"clip_threshold must be > 0, got 0\.0"),
    ({"clip_threshold": -1.0}, r"clip_threshold must be > 0, got -1\.0"),
    ({"clip_threshold": NAN}, "clip_threshold must be > 0"),
    ({"decay_rate": 0.8}, r"decay_rate must be finite and <= 0.*got 0\.8"),
    ({"decay_rate": -INF}, "decay_rate must be finite"),
    ({"decay_rate": NAN}, "decay_rate must be finite"),
    ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1\.0"),
    ({"beta1": -0.1}, "beta1 must be in"),
    ({"beta1": (0.9, 0.999)}, "beta1 must be a number"),
    ({"weight_decay": -0.1}, r"weight_decay must be .*-0\.1"),
    ({"weight_decay": None}, "weight_decay must be a number"),
    ({"scale_parameter": 1}, "scale_parameter must be True or False"),
    ({"relative_step": None}, "relative_step must be True or False"),
    ({"warmup_init": "yes"}, "warmup_init must be True or False"),
    ({"maximize": None}, "maximize must be True or False"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adafactor([weight()], **options)
    optimizer = Adafactor([weight()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight()], **options})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=message):
        Adafactor([{"params": [weight()], **options}])


ACCEPTED = [
    {"decay_rate": 0.0},
    {"decay_rate": 0},
    {"clip_threshold": INF},
    {"eps": [0.0, 0.0]},
    {"beta1": 0.0},
    {**MANUAL, "lr": 0.0},
    {**MANUAL, "lr": torch.tensor(0.1)},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_accepted_in_the_constructor_and_in_a_group(options):
    for optimizer in (Adafactor([weight()], **options), Adafactor([{"params": [weight()], **options}])):
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state[p]["step"] == 1


def test_each_group_may_bring_the_lr_that_the_constructor_lacks():
    groups = [{"params": [weight()], "lr": 0.1}, {"params": [weight()], "lr": 0.2}]
    optimizer = Adafactor(groups, relative_step=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_a_group_with_relative_steps_beside_a_given_lr_says_so():
    groups = [{"params": [weight()]}, {"params": [weight()], "relative_step": True, "lr": None}]
    assert Adafactor(groups, **MANUAL).param_groups[1]["lr"] is None
    with pytest.raises(ValueError, match="has no effect"):
        Adafactor([{"params": [weight()], "relative_step": True}], **MANUAL)


def test_an_lr_that_a_tool_sets_for_a_moment_is_neither_refused_nor_used():
    p, q = weight(), weight()
    optimizer, plain = Adafactor([p]), Adafactor([q])
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = q.grad = torch.ones(2, 3)
    optimizer.step()
    plain.step()
    assert_same(p, q)
    assert (p < 1).all()
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.0
    plain.step()


@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_torchs_choices_of_implementation_point_to_backend(name):
    with pytest.raises(TypeError, match=rf"{name}=True.*backend="):
        Adafactor([weight()], **{name: True})


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_gradient_changes_nothing():
    p, q = weight(), weight(4, 2)
    p.grad = torch.ones_like(p)
    q.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (4, 2))
    optimizer = Adafactor([p, q])
    with pytest.raises(RuntimeError, match="is sparse"):
        optimizer.step()
    assert not optimizer.state and (p == 1).all()


# State.

SHAPES = {
    (): {"exp_avg_sq": ()},
    (5,): {"exp_avg_sq": (5,)},
    (3, 4): {"exp_avg_sq_row": (3,), "exp_avg_sq_col": (4,)},
    (1, 6): {"exp_avg_sq_row": (1,), "exp_avg_sq_col": (6,)},
    (2, 3, 4): {"exp_avg_sq_row": (2, 3), "exp_avg_sq_col": (2, 4)},
    (6, 5, 3, 2): {"exp_avg_sq_row": (6, 5, 3), "exp_avg_sq_col": (6, 5, 2)},
}
DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize("beta1", [None, 0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_state_is_what_was_promised(shape, dtype, beta1):
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = Adafactor([p], beta1=beta1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    expected = {**SHAPES[shape], "step": (), "RMS": (), **({} if beta1 is None else {"exp_avg": shape})}
    state = optimizer.state[p]
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert {value.dtype for name, value in state.items() if name != "step"} == {DTYPES[dtype]}
    assert state["step"].dtype == torch.float64


def test_the_state_of_a_matrix_takes_no_more_memory_than_a_row_and_a_column():
    p = weight(300, 200)
    optimizer = Adafactor([p])
    optimizer.init_state()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in optimizer.state[p].values()
    }
    assert sum(storages.values()) == 4 * (300 + 200 + 1) + 8


def test_state_follows_the_layout_of_its_parameter():
    p = torch.nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))
    optimizer = Adafactor([p], beta1=0.9)
    optimizer.init_state()
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def trained(make, shapes=((3, 4), (5,), (2, 3, 4)), dtype=torch.float32, steps=3, start=None, **options):
    """The parameters, the optimizer, and a function that takes more steps."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype) if start is None else start[i].clone())
        for i, shape in enumerate(shapes)
    ]
    optimizer = make(params, **options)

    def more(steps, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()

    more(steps)
    return [p.detach() for p in params], optimizer, more


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OPTIONS = [{}, {"beta1": 0.9, "weight_decay": 0.1}, {**MANUAL, "scale_parameter": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_goes_on_from_a_checkpoint_of_the_original(options):
    theirs, original, go_on = trained(ReferenceAdafactor, **options)
    ours, optimizer, follow = trained(Adafactor, start=theirs, steps=0, **options)
    optimizer.load_state_dict(through_a_file(original.state_dict()))
    go_on(3, seed=1)
    follow(3, seed=1)
    assert_near(ours, theirs, rtol=2e-5, atol=2e-6)
    assert all(state["step"] == 6 for state in optimizer.state.values())


def test_the_originals_state_before_any_rms_and_in_16_bits():
    """The original makes RMS as the int 0, and rounds the state of 16-bit parameters when it loads a checkpoint."""
    p = weight(dtype=torch.bfloat16)
    optimizer = Adafactor([p])
    row, column = torch.full((2,), 0.5).bfloat16(), torch.full((3,), 0.5).bfloat16()
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": 3, "RMS": 0, "exp_avg_sq_row": row, "exp_avg_sq_col": column}}
    optimizer.load_state_dict(saved)
    state = optimizer.state[p]
    assert {name: value.dtype for name, value in state.items()} == {
        **dict.fromkeys(state, torch.float32),
        "step": torch.float64,
    }
    assert state["step"] == 3 and state["RMS"] == 0 and (state["exp_avg_sq_row"] == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_checkpoint_keeps_every_bit(options, dtype):
    straight, optimizer, go_on = trained(Adafactor, dtype=dtype, **options)
    saved = through_a_file(optimizer.state_dict())
    resumed, other, follow = trained(Adafactor, dtype=dtype, start=straight, steps=0, **options)
    other.load_state_dict(saved)
    for state in other.state.values():
        assert all(value.dtype == DTYPES[dtype] for name, value in state.items() if name != "step")
    go_on(3, seed=1)
    follow(3, seed=1)
    assert_same(straight, resumed)


def test_a_checkpoint_with_other_state_is_refused():
    _, with_average, _ = trained(Adafactor, beta1=0.9)
    _, without, _ = trained(Adafactor)
    saved = with_average.state_dict()
    saved["state"][0]["average"] = saved["state"][0].pop("exp_avg")
    with pytest.raises(ValueError, match=r"unknown \['average'\]"):
        without.load_state_dict(saved)


# The rate.


def test_the_rate_of_the_last_update_can_be_read():
    _, optimizer, go_on = trained(Adafactor, steps=1, scale_parameter=False, warmup_init=True)
    p = optimizer.param_groups[0]["params"][0]
    assert optimizer.effective_lr(p) == pytest.approx(1e-6)
    go_on(2)
    assert optimizer.effective_lr(p) == pytest.approx(3e-6)
    with pytest.raises(ValueError, match="is not a parameter"):
        optimizer.effective_lr(weight())


def test_the_rate_before_the_first_update():
    p = weight()
    optimizer = Adafactor([p])
    assert optimizer.effective_lr(p) == 0.0 and optimizer.effective_lr(p, before=0.5) == 0.5
    optimizer.init_state()
    assert optimizer.effective_lr(p, before=0.5) == 0.5


@pytest.mark.parametrize("rms", [0.5, 1e-9, NAN, INF])
@pytest.mark.parametrize("step", [1.0, 7.0, 20_000.0])
@pytest.mark.parametrize("options", [{}, {"warmup_init": True}, {"scale_parameter": False}, MANUAL], ids=str)
def test_on_a_device_the_same_rate_is_computed_without_waiting(options, step, rms):
    optimizer = Adafactor([weight()], **options)
    hyper = optimizer.hyper(optimizer.param_groups[0])
    on_device = rate_on_device(hyper, torch.tensor(step), torch.tensor(rms), before=0.25)
    assert on_device.shape == () and float(on_device) == pytest.approx(hyper.rate(step, rms), rel=1e-6)
    assert rate_on_device(hyper, torch.tensor(0.0), torch.tensor(rms), before=0.25) == 0.25
    # Reading a tensor on this device raises.
    nowhere = rate_on_device(hyper, torch.tensor(step, device="meta"), torch.tensor(rms, device="meta"), before=0.25)
    assert nowhere.shape == () and nowhere.device.type == "meta"


def test_a_rate_given_as_a_tensor_is_shown_as_a_number():
    p = weight()
    optimizer = Adafactor([p], lr=torch.tensor([0.5]), relative_step=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.effective_lr(p) == 0.5
    hyper = optimizer.hyper(optimizer.param_groups[0])
    assert rate_on_device(hyper, torch.tensor(1.0), torch.tensor(1.0), before=0.0).shape == ()
