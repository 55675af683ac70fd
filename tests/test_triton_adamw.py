"""The Triton AdamW as an optimizer: what the eager backend does, it does, wherever its tensors lie."""

import copy

import pytest
import torch
from helpers.adamw import RATES, gradients, parameters, run
from helpers.comparing import assert_near, assert_same

from fusedopt import AdamW, backends
from fusedopt.interface import StepArgs

SIZES = (7, 48, 1025, 2048)


def assert_like_eager(make, device, steps, params=None):
    """`make(params, backend)` gives an optimizer; both backends take the same steps from the same parameters."""
    ours = params or parameters(device, SIZES)
    theirs = copy.deepcopy(ours)
    optimizers = make(ours, "triton"), make(theirs, "eager")
    for optimizer, own in zip(optimizers, (ours, theirs)):
        run(optimizer, own, steps)
    for p, q in zip(ours, theirs):
        # The order of operations differs, both round once per operation; moments are sums that may nearly cancel.
        assert_near(p, q, rtol=2e-6, atol=2e-6)
        expected = optimizers[1].state[q]
        assert optimizers[0].state[p].keys() == expected.keys()
        for name, value in expected.items():
            atol = 1e-6 * float(value.abs().max())
            assert_near(optimizers[0].state[p][name], value, rtol=1e-6, atol=atol)
            assert optimizers[0].state[p][name].stride() == value.stride()
    return optimizers


@pytest.mark.parametrize("convention", ["transformers", "torch", "keras"])
def test_a_parameter_without_gradient_is_left_alone(convention, device):
    params = parameters(device, SIZES)
    steps = [gradients(params, seed) for seed in range(4)]
    for step, row in [(0, 0), (0, 1), (1, 1), (2, 0), (2, 3)]:
        steps[step][row] = None
    options = {"lr": 0.1, "weight_decay": 0.1, "convention": convention}
    ours, _ = assert_like_eager(lambda own, backend: AdamW(own, backend=backend, **options), device, steps)
    counts = [float(ours.state[p]["step"]) for p in ours.param_groups[0]["params"]]
    assert counts == ([4.0] * 4 if convention == "keras" else [2.0, 2.0, 4.0, 3.0])


@pytest.mark.parametrize(("convention", "counts"), [("torch", [0.0, 0.0]), ("keras", [1.0, 1.0])])
def test_shared_counts_go_on_where_this_device_has_no_gradient(convention, counts, device):
    """All gradients of the step may belong to parameters of another device."""
    params = parameters(device, (7, 48))
    optimizer = AdamW(params, convention=convention, backend="triton")
    optimizer.init_state()
    batches = optimizer._engine.param_sets(optimizer, optimizer.param_groups, [[None, None]])
    backends.create("adamw", device, "triton")(batches, StepArgs())
    assert [float(optimizer.state[p]["step"]) for p in params] == counts


def test_hyper_parameters_are_those_of_the_group(device):
    def make(own, backend):
        groups = [
            {"params": own[:1], "lr": 0.3, "weight_decay": 0.5},
            {"params": own[1:3], "betas": (0.0, 0.5), "eps": 0.1, "maximize": True},
            {"params": own[3:], "amsgrad": True, "correct_bias": False},
        ]
        return AdamW(groups, lr=1e-2, backend=backend)

    params = parameters(device, SIZES)
    assert_like_eager(make, device, [gradients(params, seed) for seed in range(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_learning_rate_on_the_device_is_read_at_every_step(dtype, device):
    ours, theirs = parameters(device, SIZES), parameters(device, SIZES)
    lr = torch.tensor(1.0, dtype=dtype, device=device)
    by_tensor = AdamW(ours, lr=lr, weight_decay=0.1, backend="triton")
    by_value = AdamW(theirs, lr=1.0, weight_decay=0.1, backend="triton")
    for step, rate in enumerate(RATES):
        lr.fill_(rate)
        by_value.param_groups[0]["lr"] = rate
        for optimizer, params in ((by_tensor, ours), (by_value, theirs)):
            run(optimizer, params, [gradients(params, step)])
        assert_same(ours, theirs)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)], ids=str)
def test_gradients_are_scaled_on_the_way(scale, device):
    ours, theirs = parameters(device, SIZES), parameters(device, SIZES)
    grads = gradients(ours, 0)
    kept = [g.clone() for g in grads]
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    AdamW(ours, maximize=True, backend="triton").apply_gradients(zip(grads, ours), scale=scale)
    AdamW(theirs, backend="triton").apply_gradients(zip([-0.5 * g for g in grads], theirs))
    assert_same(ours, theirs)
    assert_same(grads, kept)


@pytest.mark.parametrize("found", [0.0, 1.0, torch.nan])
def test_a_step_with_found_inf_changes_nothing_and_is_not_counted(found, device):
    ours, theirs = parameters(device, SIZES), parameters(device, SIZES)
    optimizer, expected = AdamW(ours, backend="triton"), AdamW(theirs, backend="triton")
    stepper = backends.create("adamw", device, "triton")
    grads = gradients(ours, 0)
    optimizer.init_state()
    stepper(
        optimizer._engine.param_sets(optimizer, optimizer.param_groups, [[1024.0 * g for g in grads]]),
        StepArgs(grad_scale=torch.tensor([1024.0], device=device), found_inf=torch.tensor([found], device=device)),
    )
    if found == 0.0:
        expected.apply_gradients(zip(grads, theirs))
    for p, q in zip(ours, theirs):
        assert_same(p, q)
        assert float(optimizer.state[p]["step"]) == (found == 0.0)


def layouts():
    """Name to (a parameter's tensor, a gradient for it)."""
    base = torch.linspace(-1.0, 1.0, 6 * 8 * 4 * 4)
    image = base.reshape(6, 8, 4, 4)
    nhwc = image.contiguous(memory_format=torch.channels_last)
    matrix = base.reshape(48, 16)
    return {
        "channels_last with a contiguous gradient": (nhwc, image + 1.0),
        "channels_last": (nhwc, nhwc + 1.0),
        "transposed": (matrix.t(), matrix.t() + 1.0),
        "transposed with a contiguous gradient": (matrix.t(), matrix.t().contiguous() + 1.0),
        "contiguous with an expanded gradient": (matrix, torch.ones(1, 1).expand(48, 16)),
        "columns of a larger matrix": (matrix[:, 3:9], matrix[:, 2:8]),
        "every second row": (matrix[::2], matrix[::2] + 1.0),
        "a scalar": (base[5], base[7]),
        "a size of one": (
            matrix[:, :1].t(),
            matrix[:1, :48].t()[:16].reshape(1, 16).expand(1, 16)[:, :1].expand(1, 48),
        ),
    }


@pytest.mark.parametrize("name", layouts())
def test_any_layout(name, device):
    p, g = (t.to(device) for t in layouts()[name])
    assert p.shape == g.shape
    ours, theirs = (torch.nn.Parameter(copy.deepcopy(p)) for _ in range(2))
    assert ours.stride() == p.stride()
    for own, backend in ((ours, "triton"), (theirs, "eager")):
        optimizer = AdamW([own], lr=0.1, weight_decay=0.1, backend=backend)
        for _ in range(2):
            optimizer.apply_gradients([(g, own)])
    assert_near(ours, theirs, rtol=2e-6, atol=2e-6)


def in_the_middle(tensor, offset):
    """A copy that starts at this element of a larger tensor of NaN, and that larger tensor."""
    whole = torch.full((tensor.numel() + 64,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    part = whole[offset : offset + tensor.numel()]
    part.copy_(tensor)
    return part, whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 16, 31])
def test_nothing_beside_the_tensors_is_read_or_written(offset, dtype, device):
    plain = parameters(device, SIZES, dtype)
    expected = AdamW(plain, lr=0.1, amsgrad=True, backend="triton")
    wholes, params, grads = [], [], []
    for p, g in zip(plain, gradients(plain, 0)):
        middle, whole = in_the_middle(p.detach(), offset)
        params.append(torch.nn.Parameter(middle))
        grads.append(in_the_middle(g, 1)[0])
        p.grad = g
        wholes.append((params[-1], whole))
    optimizer = AdamW(params, lr=0.1, amsgrad=True, backend="triton")
    optimizer.init_state()
    for state in optimizer.state.values():
        for name in state.keys() - {"step"}:
            state[name], whole = in_the_middle(state[name], offset)
            wholes.append((state[name], whole))
    expected.step()
    optimizer.apply_gradients(zip(grads, params))
    assert_same(params, plain)
    for part, whole in wholes:
        beside = torch.cat([whole[:offset], whole[offset + part.numel() :]])
        assert beside.isnan().all()
        assert not part.isnan().any()


@pytest.mark.parametrize("backends_in_turn", [("eager", "triton"), ("triton", "eager")], ids="->".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_moves_between_the_backends(backends_in_turn, dtype, device):
    moved, stayed = parameters(device, SIZES, dtype), parameters(device, SIZES, dtype)
    steps = [gradients(moved, seed) for seed in range(4)]
    steps[1][0] = None
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}
    run(AdamW(stayed, backend="triton", **options), stayed, steps)
    first = AdamW(moved, backend=backends_in_turn[0], **options)
    run(first, moved, steps[:2])
    second = AdamW(moved, backend=backends_in_turn[1], **options)
    second.load_state_dict(first.state_dict())
    run(second, moved, steps[2:])
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    assert_near(moved, stayed, **tolerance)


def test_many_tiny_tensors(device):
    sizes = tuple(range(1, 6)) * 30
    params = parameters(device, sizes)
    assert_like_eager(
        lambda own, backend: AdamW(own, lr=0.1, backend=backend), device, [gradients(params, 0)], params=params
    )


def test_zero_gradients_move_weights_by_decay_alone(device):
    params = parameters(device, SIZES)
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, lr=0.125, weight_decay=0.5, backend="triton")
    optimizer.apply_gradients((torch.zeros_like(p), p) for p in params)
    for p, old in zip(params, before):
        assert_same(p, old - 0.0625 * old)


def test_parameters_that_share_memory_are_refused(device):
    whole = torch.ones(32, device=device)
    one, other = torch.nn.Parameter(whole[:20]), torch.nn.Parameter(whole[16:])
    optimizer = AdamW([one, other], backend="triton")
    grads = [torch.ones_like(one), torch.ones_like(other)]
    with pytest.raises(RuntimeError, match=r"of shapes \(20,\) and \(16,\), share memory"):
        optimizer.apply_gradients(zip(grads, [one, other]))
    assert_same(whole, torch.ones_like(whole))
    optimizer.apply_gradients([(grads[0], one)])
    assert (whole[:20] != 1.0).all() and (whole[20:] == 1.0).all()


def test_an_option_that_needs_more_state_gets_it(device):
    p = torch.nn.Parameter(torch.ones(16, device=device))
    optimizer = AdamW([p], backend="triton")
    optimizer.init_state()
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.apply_gradients([(torch.ones_like(p), p)])
    assert_same(optimizer.state[p]["max_exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


def test_a_state_of_an_unsupported_dtype_is_refused(device):
    p = torch.nn.Parameter(torch.ones(16, device=device))
    optimizer = AdamW([p], backend="triton")
    optimizer.init_state()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to(torch.int32)
    with pytest.raises(RuntimeError, match=r"exp_avg .*torch\.int32.*, expected one of shape \(16,\) in a floating"):
        optimizer.apply_gradients([(torch.ones_like(p), p)])
    assert_same(p, torch.ones_like(p))
    assert float(optimizer.state[p]["step"]) == 0.0
