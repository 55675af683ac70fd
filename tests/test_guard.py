"""Clipping, skipping and GradScaler: what a step learns of its gradients before it updates, on every backend."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers.comparing import assert_near, assert_same, same
from helpers.optimizers import BACKENDS, OPTIMIZERS, VARIANTS

from fusedopt import AdamW, AdamWeightDecay, register_step_in_backward

MAKERS = {
    **OPTIMIZERS,
    "AdamW-torch-bfloat16": partial(OPTIMIZERS["AdamW"].at, 0.1, convention="torch"),
    "Adafactor-lr-beta1": VARIANTS["Adafactor-lr-beta1"],
}


def parameters(name):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    shapes = [(3, 5), (7,), (), (0,), (2, 3, 2, 2)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def norm_of(grads):
    return torch.cat([g.double().flatten() for g in grads]).norm()


def give(params, grads):
    for p, g in zip(params, grads):
        p.grad = g


def snapshot(optimizer, params):
    return copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("max_grad_norm", [1.0, 1e6])
def test_clipping_is_that_of_torch(maker, backend, max_grad_norm):
    """The reference is clip_grad_norm_ in float64, before the same optimizer."""
    ours, theirs = parameters(maker), parameters(maker)
    a = MAKERS[maker](ours, backend=backend, max_grad_norm=max_grad_norm)
    b = MAKERS[maker](theirs, backend="eager")
    for seed in range(3):
        grads = gradients(ours, seed)
        kept = [g.clone() for g in grads]
        give(ours, grads)
        a.step()
        norm = norm_of(grads)
        factor = min(1.0, max_grad_norm / (norm.item() + 1e-6))
        b.apply_gradients([(g.float() * factor, p) for g, p in zip(grads, theirs)])
        assert_near(a.grad_norm, norm, rtol=1e-6, atol=0)
        assert_same(grads, kept, "gradients, which are only read")
    for p, q in zip(ours, theirs):
        assert_near(p, q, rtol=2**-7 if p.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_anywhere_skips_the_step_as_a_whole(maker, backend, bad):
    params = parameters(maker)
    optimizer = MAKERS[maker](params, backend=backend, skip_nonfinite=True)
    give(params, gradients(params, 0))
    optimizer.step()
    before = snapshot(optimizer, params)
    grads = gradients(params, 1)
    grads[0][1, 2] = bad
    give(params, grads)
    optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps == 1
    give(params, gradients(params, 2))
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_ first"])
def test_grad_scaler(maker, backend, unscale):
    ours, theirs = parameters(maker), parameters(maker)
    if ours[0].is_cuda and ours[0].dtype is torch.bfloat16:
        pytest.skip("torch's scaler takes no gradients in bfloat16 on a GPU")
    a, b = MAKERS[maker](ours, backend=backend), MAKERS[maker](theirs, backend="eager")
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0, growth_interval=2)
    for seed in range(4):
        grads = gradients(ours, seed)
        scale = scaler.scale(torch.tensor(1.0)).item()
        give(ours, [g * scale for g in grads])
        if seed == 1:
            ours[1].grad[3] = math.inf
            before = snapshot(a, ours)
        if unscale:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if seed == 1:
            assert_same(snapshot(a, ours), before)  # an overflow changes nothing, step counts neither
        else:
            give(theirs, grads)
            b.step()
    assert scaler.get_scale() == 1024.0  # twice 2 good steps, once halved in between
    assert not hasattr(a, "grad_scale") and not hasattr(a, "found_inf")
    assert_near(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_at_once(backend):
    """Scaled gradients, clipped, skipped where they overflow: the norm is that of the unscaled gradients."""
    ours, theirs = parameters(""), parameters("")
    a = AdamW(ours, lr=0.1, backend=backend, max_grad_norm=0.5, skip_nonfinite=True)
    b = AdamW(theirs, lr=0.1, backend="eager")
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=256.0)
    for seed in range(3):
        grads = gradients(ours, seed)
        scale = scaler.scale(torch.tensor(1.0)).item()
        give(ours, [g * scale for g in grads])
        if seed == 1:
            ours[0].grad[0, 0] = math.nan
        scaler.step(a)
        scaler.update()
        if seed != 1:
            assert_near(a.grad_norm, norm_of(grads), rtol=1e-6, atol=0)
            b.apply_gradients([(g * (0.5 / (norm_of(grads).item() + 1e-6)), p) for g, p in zip(grads, theirs)])
    assert a.skipped_steps == 1
    assert_near(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_scaled_step_given_by_hand_is_clipped_after_scaling():
    (p,) = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = AdamW([p], max_grad_norm=math.inf)
    optimizer.apply_gradients([(torch.tensor([3.0, 4.0]), p)], scale=torch.tensor(0.5))
    assert optimizer.grad_norm == 2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend):
    results = []
    for _ in range(2):
        params = [torch.nn.Parameter(torch.ones(5000)), torch.nn.Parameter(torch.ones(33))]
        optimizer = AdamW(params, lr=0.1, backend=backend, max_grad_norm=0.1)
        give(params, gradients(params, 0))
        optimizer.step()
        results.append([optimizer.grad_norm, *(p.detach() for p in params)])
    assert_same(*results)


def test_copies_keep_the_options_and_the_counts():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], max_grad_norm=2.0, skip_nonfinite=True)
    optimizer.apply_gradients([(torch.tensor([math.nan, 0.0]), p)])
    other = copy.deepcopy(optimizer)
    assert other.guard.max_grad_norm == 2.0 and other.skipped_steps == 1
    assert other.skipped_steps is not optimizer.skipped_steps


MAGNITUDES = {
    torch.float32: (1e-45, 1e-38, 1e-30, 1e-23, 1e-22, 1e-21, 1e-19, 1e-15, 1.0, 1e19, 1e30, 1e37),
    torch.bfloat16: (1e-39, 1e-37, 1e-30, 1e-22, 1e-21, 1e-19, 1.0, 1e20, 1e37),
    torch.float16: (1e-7, 1e-5, 1e-3, 1.0, 1e4),
    torch.float64: (1e-150, 1e-100, 1e-30, 1.0, 1e30, 1e150),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", MAGNITUDES, ids=str)
def test_the_norm_is_right_at_every_magnitude(backend, dtype, device):
    """GradNorm overflow float32 above 1e19, are coarse below 1e-19 and vanish below 1e-22, beside others or alone."""
    device = device if backend == "triton" else torch.device("cpu")
    unit = torch.rand(16_385 if backend == "eager" else 4097, generator=torch.Generator().manual_seed(0)).double() + 0.5
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype, device=device)) for n in (len(unit), 5)]
    optimizer = AdamW(params, lr=0.0, backend=backend, skip_nonfinite=True, max_grad_norm=math.inf)
    # Triton's interpreter reads a bfloat16 below 1e-38 as another number.
    magnitudes = [size for size in MAGNITUDES[dtype] if backend == "eager" or dtype != torch.bfloat16 or size > 1e-38]
    for size in magnitudes:
        others = (0.0, magnitudes[0], size, magnitudes[-1], 1.0)
        for beside in others if backend == "eager" else others[::3]:
            grads = [(size * unit).to(dtype), (beside * unit[:5]).to(dtype)]
            exact = np.concatenate([g.double().numpy() for g in grads]).astype(np.longdouble)
            optimizer.apply_gradients((g.to(device), p) for g, p in zip(grads, params))
            norm = float(np.sqrt(np.square(exact).sum()))
            assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-6, abs=0.0), (size, beside)
    assert optimizer.skipped_steps == 0


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_beyond_1e154_is_inf_and_skips_or_clips_to_nothing(backend, device):
    """As in torch, whose clipping multiplies by 1 / inf."""
    device = device if backend == "triton" else "cpu"
    for options in ({"skip_nonfinite": True}, {"skip_grad_norm_above": 1e300}, {"max_grad_norm": 1.0}):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64, device=device))
        optimizer = AdamW([p], lr=0.1, backend=backend, **options)
        p.grad = torch.full_like(p, 1e200)
        optimizer.step()
        assert float(optimizer.grad_norm) == math.inf and p.eq(1.0).all()
        assert optimizer.skipped_steps is None or int(optimizer.skipped_steps) == 1
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    assert p.grad.eq(0.0).all()


def test_the_norm_of_a_large_gradient():
    """Added up in float32 one after the other, as torch's is, it would be off by 1e-4; with gaps too."""
    g = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) + 1.0
    gaps = torch.stack([g, g], dim=1)[:, 0]
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = AdamW([p], max_grad_norm=math.inf)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grad = g.to(dtype)
        optimizer.apply_gradients([(grad, p)])
        assert optimizer.grad_norm.item() == pytest.approx(grad.double().norm().item(), rel=1e-7)
    optimizer.apply_gradients([(gaps, p)])
    assert not gaps.is_contiguous() and optimizer.grad_norm.item() == pytest.approx(g.double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "a gap"])
def test_every_element_of_a_large_gradient_counts_once(layout):
    """Each 64 times as heavy as the rest, at the borders of what is read together."""
    shape = {"channels_last": (4, 33, 128, 130), "transposed": (1100, 1999)}.get(layout, (2_199_000,))
    g = torch.ones(shape)
    if layout == "channels_last":
        g = g.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        g = g.t()
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = AdamW([p], max_grad_norm=math.inf)
    last = g.numel() - 1
    for at in (0, 1023, 1024, 2**20 - 1, 2**20, 2**21, last - 1024, last):
        grad = g.clone()
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), g.shape))
        grad[where] = 64.0
        if layout == "a gap":
            grad = torch.stack([grad, grad], dim=1)[:, 0]
        assert grad.is_contiguous() == (layout == "contiguous")
        optimizer.apply_gradients([(grad, p)])
        assert optimizer.grad_norm.item() ** 2 == pytest.approx(last + 64.0**2, rel=1e-9), at


@pytest.mark.slow
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_clipped_step_of_tensors_larger_than_what_is_scaled_at_a_time(amsgrad):
    """Large ones in pieces, small ones in lists; on the CPU."""
    shapes = [(5,), (3, 700_001), (600_000,), (600_000,), (2, 3), (1 << 20,), (4, 7, 200, 201)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    last = ours[-1].detach().contiguous(memory_format=torch.channels_last)
    ours[-1], theirs[-1] = torch.nn.Parameter(last.clone()), torch.nn.Parameter(last.clone())
    a = AdamW(ours, lr=0.1, weight_decay=0.1, amsgrad=amsgrad, max_grad_norm=1.0)
    b = AdamW(theirs, lr=0.1, weight_decay=0.1, amsgrad=amsgrad)
    for seed in range(2):
        grads = gradients(ours, seed)
        factor = 1.0 / (norm_of(grads).item() + 1e-6)
        a.apply_gradients(zip(grads, ours))
        b.apply_gradients([((g.double() * factor).float(), p) for g, p in zip(grads, theirs)])
    for p, q in zip(ours, theirs):
        assert_near(p, q, rtol=1e-6, atol=1e-7)
        for name, value in b.state[q].items():
            assert_near(a.state[p][name], value, rtol=1e-6, atol=1e-6 * value.abs().max().item())


def test_numbers_of_one_element_may_have_any_shape():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.apply_gradients([(torch.ones(2), p)])
    optimizer.apply_gradients([(torch.ones(2), p)], scale=torch.tensor([0.5]))
    assert optimizer.grad_norm.shape == () and optimizer.skipped_steps == 0


@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.ones(2), "scale as a tensor must hold one real number, got shape"),
        (torch.tensor(1j), r"scale as a tensor must hold one real number, got .*complex64"),
        (math.nan, "scale must be finite, got nan"),
        ("1", "scale must be a number, got '1'"),
        (None, "scale must be a number, got None"),
    ],
)
def test_a_bad_scale_is_refused_before_anything_changes(scale, message):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients([(torch.ones(2), p)], scale=scale)
    assert not optimizer.state
    assert_same(p, torch.ones(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
def test_an_infinite_gradient_without_skipping(backend, max_grad_norm):
    """As after clip_grad_norm_: the norm is inf, only that element becomes NaN, and inf as a bound only measures."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = AdamW(params, backend=backend, max_grad_norm=max_grad_norm)
    optimizer.apply_gradients([(torch.tensor([math.inf, 1.0, 1.0]), params[0]), (torch.ones(3), params[1])])
    assert optimizer.grad_norm == math.inf
    assert [p.isnan().tolist() for p in params] == [[True, False, False], [False, False, False]]
    moved = max_grad_norm == math.inf
    assert (params[1] < 0).all() == moved and (params[1] == 0).all() != moved


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_that_raises_under_a_scaler_leaves_no_scale_behind(in_backward):
    model = torch.nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())
    handle = register_step_in_backward(optimizer, model) if in_backward else None
    scaler = torch.amp.GradScaler(torch.get_default_device().type)
    scaler.scale(model(torch.ones(2)).sum()).backward()
    if handle is None:
        model.weight.grad = model.weight.grad.to_sparse()
    else:
        scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
            torch.get_default_device(): torch.zeros(1)
        }
    with pytest.raises(RuntimeError, match="GradScaler cannot unscale" if in_backward else "is sparse"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_with_the_negative_bit(maker, backend):
    """Autograd of complex numbers makes them: memory holds the other sign."""
    params = parameters(maker)
    grads = gradients(params, 0)
    negative = [torch._neg_view(-g) for g in grads]
    assert all(g.is_neg() for g in negative)
    assert_same(negative, grads)
    others = parameters(maker)
    for own, given in ((params, grads), (others, negative)):
        optimizer = MAKERS[maker](own, backend=backend, max_grad_norm=1.0)
        give(own, given)
        optimizer.step()
    assert_same(params, others)


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_keras_clippings_know_the_norm_of_a_large_gradient(option):
    """Added up in float32 one after the other, it would be off by 1e-3."""
    g = torch.full((1 << 24,), 0.1)
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = AdamWeightDecay([p], 0.1, beta_1=0.0, **{option: 1.0})
    optimizer.apply_gradients([(g, p)])
    assert optimizer.state[p]["exp_avg"].double().norm().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-22, 1e30, 1e37])
@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("numel", [400, 16_400])
def test_keras_clippings_know_norms_of_every_magnitude(numel, option, size):
    g = size * (torch.rand(numel, generator=torch.Generator().manual_seed(0)) + 0.5)
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = AdamWeightDecay([p], 0.1, beta_1=0.0, **{option: 10.0 * size})
    optimizer.apply_gradients([(g, p)])
    clipped = optimizer.state[p]["exp_avg"].double()
    # Below 1e-38 a float32 is a multiple of 1.4e-45.
    assert clipped.norm().item() == pytest.approx(10.0 * size, rel=1e-5 if size < 1e-38 else 1e-6)


def test_two_clippings_exclude_each_other():
    with pytest.raises(ValueError, match=r"global_clipnorm=1\.0 and max_grad_norm=2\.0"):
        AdamWeightDecay([torch.nn.Parameter(torch.ones(1))], global_clipnorm=1.0, max_grad_norm=2.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, "1"])
def test_bad_bounds(bad):
    with pytest.raises(ValueError, match="max_grad_norm"):
        AdamW([torch.nn.Parameter(torch.ones(1))], max_grad_norm=bad)
    with pytest.raises(ValueError, match="skip_nonfinite"):
        AdamW([torch.nn.Parameter(torch.ones(1))], skip_nonfinite=1)
