"""Master weights: a bfloat16 parameter and an int16 remainder, or a float32 copy, are the weights of a float32 run."""

import pytest
import torch
from helpers.comparing import assert_same, same
from helpers.optimizers import BACKENDS, NEEDS_TRITON, OPTIMIZERS
from helpers.precision import (
    FROZEN,
    HALVES,
    LAYOUTS,
    PRECISE,
    bits_of,
    each_half,
    float32_weight,
    from_bits,
    normal,
    parameters,
    step,
)

from fusedopt import Adafactor, AdamW, Lion
from fusedopt.backends import has_triton
from fusedopt.backends.eager.storage import read_weight, write_weight

pytestmark = [
    # The interpreter computes with numpy, which warns about what it is given here on purpose.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings(FROZEN),
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)


# Splitting and joining.

LOWER = (0x0000, 0x0001, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFF)
"""Lower halves at and around ties and their ends: with every upper half all infinities, denormals and kinds of NaN."""

NAN_KINDS = (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FFF8000)

if has_triton():
    import triton
    import triton.language as tl

    from fusedopt_kernels.storage import load_weight, store_weight

    @triton.jit
    def split_kernel(weight, p, remainder, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        store_weight(tl.load(weight + at, mask=mask), p + at, remainder + at, None, mask, tl.bfloat16, tl.int16, 0)

    @triton.jit
    def join_kernel(weight, p, remainder, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        tl.store(weight + at, load_weight(p + at, remainder + at, mask, tl.int16, tl.float32), mask=mask)


def split(weight, backend, device):
    p = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
    remainder = torch.empty(weight.shape, dtype=torch.int16, device=device)
    if backend == "eager":
        write_weight(p, remainder, weight.clone(), None)
    else:
        split_kernel[(-(-weight.numel() // 8192),)](weight.to(device), p, remainder, weight.numel(), BLOCK=8192)
    return p.cpu(), remainder.cpu()


def join(p, remainder, backend, device):
    if backend == "eager":
        return read_weight(p, remainder)
    weight = torch.empty(p.shape, dtype=torch.float32, device=device)
    join_kernel[(-(-p.numel() // 8192),)](weight, p.to(device), remainder.to(device), p.numel(), BLOCK=8192)
    return weight.cpu()


@every_backend
def test_every_weight_is_split_and_joined_exactly(backend, device):
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = torch.cat([*(upper + lower for lower in LOWER), torch.tensor(NAN_KINDS)])
    weight = from_bits(bits)
    p, remainder = split(weight, backend, device)
    # Half away from zero: plus one where the lower half's top bit is set.
    nan = weight.isnan()
    assert_same(bits_of(p)[~nan], ((bits + 0x8000) >> 16 & 0xFFFF)[~nan])
    assert_same((remainder.to(torch.int64) & 0xFFFF)[~nan], (bits & 0xFFFF)[~nan])
    assert p[nan].isnan().all() and not p[~nan].isnan().any()
    again = join(p, remainder, backend, device)
    assert_same(bits_of(again)[~nan], bits[~nan])
    assert again[nan].isnan().all()


@every_backend
def test_a_parameter_is_the_nearest_one_and_differs_from_rounding_to_even_at_ties_alone(backend, device):
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in LOWER:
        weight = from_bits(upper + lower)
        p, _ = split(weight, backend, device)
        differ = bits_of(p) != bits_of(weight.bfloat16())
        differ &= ~weight.isnan()
        even = (torch.arange(1 << 16) & 1) == 0
        expected = even & ~weight.isnan() if lower == 0x8000 else torch.zeros_like(differ)
        assert_same(differ, expected, f"{lower:#x}")


@every_backend
def test_a_remainder_that_is_left_over_moves_a_weight_by_half_a_unit_and_makes_no_nan(backend, device):
    """Somebody else wrote to the parameter."""
    largest, least = torch.finfo(torch.bfloat16).max, 2.0**-133
    written = [0.0, -0.0, 1.0, -1.0, 3.140625, largest, -largest, least, -least, 2.0**-126, torch.inf, -torch.inf]
    remainder = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    p = torch.tensor(written, dtype=torch.bfloat16).repeat_interleave(len(remainder))
    weight = join(p, remainder.repeat(len(written)), backend, device)
    assert not weight.isnan().any()
    off = bits_of(weight) - (bits_of(p) << 16)
    assert off.abs().max() <= 0x8000
    # An infinite parameter is what a finite weight above the largest bfloat16 shows as, too.
    assert (weight[p.isinf()].abs() > 3.38e38).all()
    p = torch.full((4,), torch.nan, dtype=torch.bfloat16)
    assert join(p, remainder[[0, 1, -2, -1]], backend, device).isnan().all()


def test_both_backends_join_alike():
    pytest.importorskip("triton")
    p = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for value in (-0x8000, -0x7FFF, -1, 0, 1, 0x7FFF):
        remainder = torch.full(p.shape, value, dtype=torch.int16)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert_same(join(p, remainder, "triton", device), join(p, remainder, "eager", "cpu"), equal_nan=True)


# The weights of the float32 run.

SHAPES = [(1,), (7,), (2049,), (33, 5), (64, 33), (3, 5, 7), (), (0, 4), *[(13, 10)] * len(LAYOUTS)]

RUNS = {
    "AdamW": (AdamW, {}),
    "AdamW-clipped": (AdamW, {"max_grad_norm": 2.0, "eps": 1e-8}),
    "AdamW-amsgrad": (AdamW, {"amsgrad": True, "maximize": True}),
    "AdamW-torch": (AdamW, {"convention": "torch", "max_grad_norm": 2.0}),
    "AdamW-keras": (AdamW, {"convention": "keras", "amsgrad": True}),
    "AdamW-without_correction": (AdamW, {"correct_bias": False}),
    "Lion": (Lion, {"max_grad_norm": 2.0}),
    "Adafactor": (Adafactor, {}),
    "Adafactor-beta1": (
        Adafactor,
        {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "beta1": 0.9, "max_grad_norm": 2.0},
    ),
    "Adafactor-scaled": (Adafactor, {"lr": 1e-2, "relative_step": False, "maximize": True}),
}
if "AdamWeightDecay" in PRECISE:
    RUNS["AdamWeightDecay"] = (OPTIMIZERS["AdamWeightDecay"].cls, {"clipnorm": 0.5})
    RUNS["AdamWeightDecay-global_clipnorm"] = (OPTIMIZERS["AdamWeightDecay"].cls, {"global_clipnorm": 2.0})


def run(name, dtype, steps, shapes, half, backend="eager", device="cpu", **more):
    """Some steps from 16-bit weights and gradients, whatever the dtype, with all that may happen between them."""
    cls, options = RUNS[name]
    tensors = normal(shapes, 0, half)
    layouts = list(LAYOUTS.values())
    plain = len(shapes) - (len(layouts) if shapes is SHAPES else 0)
    tensors[plain:] = [lay(t) for lay, t in zip(layouts, tensors[plain:])]
    params = [torch.nn.Parameter(like(t, dtype, device)) for t in tensors]
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2]}]
    # Kernels of Adafactor cut gradients by their dtype, and add up what they cut: there, it is that of 16 bits for all.
    grad_dtype = half if backend == "triton" and cls is Adafactor else dtype
    for p in params:
        p.grad_dtype = grad_dtype
    optimizer = cls(groups, skip_nonfinite=True, backend=backend, **options, **more)
    ordered = [*params[::2], *params[1::2]]
    for number in range(steps):
        grads = [g.to(device, grad_dtype) for g in normal([p.shape for p in ordered], number + 1, half)]
        if number % 7 == 3:
            grads[-1].fill_(torch.inf)
        if number % 11 == 5:
            grads[1] = None
        if number % 5 == 2:
            optimizer.found_inf = torch.tensor(float(number % 2), device=device)
            optimizer.grad_scale = torch.tensor(4.0, device=device)
        for group in optimizer.param_groups:
            if group.get("lr") is not None:
                group["lr"] = 1e-2 / (1 + number % 9)
        grads = [g if g is None or number % 3 else strided(g) for g in grads]
        for p, g in zip(ordered, grads):
            p.grad = g
        optimizer.step()
        optimizer.forget_scaler()
    assert steps < 4 or float(optimizer.skipped_steps) >= 1
    return optimizer, ordered


def like(t, dtype, device):
    """The same numbers with the same strides."""
    base = t._base if t._base is not None else t
    return base.detach().to(device, dtype, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def strided(g):
    """The same numbers with gaps between them."""
    return torch.stack([g, g], dim=-1)[..., 0]


def assert_float32_weights(name, half, steps, shapes, backend="eager", device="cpu"):
    ours, params = run(name, half, steps, shapes, half, backend, device, master_weights=True)
    theirs, expected = run(name, torch.float32, steps, shapes, half, backend, device)
    for p, q in zip(params, expected):
        if p in ours.state:
            what = f"{name}, shape {tuple(p.shape)}, strides {p.stride()}"
            assert_same(float32_weight(ours, p), q.detach().contiguous(), what)
            moments = {k: v for k, v in ours.state[p].items() if k not in ("remainder", "master_weight")}
            assert_same(moments, dict(theirs.state[q]), what)
    assert not any(same(p.detach().float(), q.detach()) for p, q in zip(params, expected) if p.numel() > 100)


@each_half
@pytest.mark.parametrize("name", RUNS)
def test_the_weights_are_those_of_the_float32_run(name, half):
    """All that happens between steps has happened by then, many times over."""
    assert_float32_weights(name, half, 40, SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_weights_are_those_of_the_float32_run_after_200_steps(name):
    assert_float32_weights(name, torch.bfloat16, 200, SHAPES)


LARGE = {"tiles": [(300, 301), (70001,)], "stacks": [(40, 50)] * 5 + [(50,)] * 3, "pieces": [(200_003,), (3, 40_001)]}


@each_half
@pytest.mark.parametrize("shapes", LARGE)
@pytest.mark.parametrize("name", ["AdamW", "AdamW-amsgrad", "Lion", "Adafactor", "Adafactor-beta1"])
def test_the_weights_are_those_of_the_float32_run_where_tensors_are_cut_or_joined(name, shapes, half):
    assert_float32_weights(name, half, 5, LARGE[shapes])


FEW = [(7,), (33, 5)]


bfloat16_first = pytest.mark.parametrize(
    "half", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)


@NEEDS_TRITON
@bfloat16_first
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("AdamW-clipped", "Lion")))
        for name in RUNS
        if not name.startswith("Adafactor")
    ],
)
def test_kernels_have_the_weights_of_their_float32_run(name, half, device):
    assert_float32_weights(name, half, 8, FEW, "triton", device)


@NEEDS_TRITON
@pytest.mark.slow
@each_half
@pytest.mark.parametrize("name", ["AdamW-clipped", "AdamW-keras", "Lion"])
def test_kernels_have_the_weights_of_their_float32_run_after_200_steps(name, half, device):
    assert_float32_weights(name, half, 200, FEW, "triton", device)


@pytest.mark.slow
@NEEDS_TRITON
@bfloat16_first
@pytest.mark.parametrize("name", [n for n in RUNS if n.startswith("Adafactor")])
def test_kernels_of_adafactor_have_the_weights_of_their_float32_run(name, half, device):
    assert_float32_weights(name, half, 4, FEW, "triton", device)


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adafactor", "Adafactor-beta1"])
def test_kernels_of_adafactor_have_the_weights_of_their_float32_run_after_200_steps(name, device):
    assert_float32_weights(name, torch.bfloat16, 200, FEW, "triton", device)


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["AdamW-amsgrad", pytest.param("Lion", marks=pytest.mark.slow)])
def test_kernels_have_the_weights_of_their_float32_run_whatever_the_layout(name, device):
    assert_float32_weights(name, torch.bfloat16, 4, SHAPES, "triton", device)


# Decay, and what has no need of all this.


@pytest.mark.parametrize("policy", ["master_weights", pytest.param("stochastic_rounding", marks=pytest.mark.slow)])
@bfloat16_first
@pytest.mark.parametrize("name", PRECISE)
def test_a_thousand_small_decays_add_up(name, half, policy):
    """0.9999 to the power of 1,000 is 0.9048. Rounded to nearest, none of the weights would move."""
    row = OPTIMIZERS[name]
    (start,) = parameters([(20_000,)], half)
    p = torch.nn.Parameter(start.detach().clone())
    decay = "weight_decay_rate" if name == "AdamWeightDecay" else "weight_decay"
    named = [("p", p)] if name == "AdamWeightDecay" else [p]
    optimizer = row.at(1e-3, named, **{decay: 0.1, policy: True})
    p.grad = torch.zeros_like(p)
    for _ in range(1000):
        optimizer.step()
    weight = (float32_weight(optimizer, p) if policy == "master_weights" else p.detach()).double()
    before = start.detach().double()
    # Unbiased, unlike the ratio of the norms: the variance of what is rounded at random adds to a norm.
    ratio = float((weight * before).sum() / before.square().sum())
    assert ratio == pytest.approx(0.9999**1000, rel=1e-4 if policy == "master_weights" else 1e-3)


@every_backend
@each_half
def test_a_parameter_that_was_written_to_is_updated_from_what_was_written(half, backend, device):
    device = device if backend == "triton" else "cpu"
    (p,) = parameters([(64,)], half, device=device)
    optimizer = Lion([p], lr=2.0**-14, master_weights=True, backend=backend)
    step(optimizer, [torch.ones_like(p)])
    written = torch.tensor([0.0, -0.0, 2.0, -3.0, 1e-30, 0.5, 100.0, -1.0], device=device, dtype=half).repeat(8)
    with torch.no_grad():
        p.copy_(written)
    step(optimizer, [torch.ones_like(p)])
    new, written = float32_weight(optimizer, p).cpu(), written.cpu().float()
    assert ((new - (written - 2.0**-14)).abs() <= written.abs() * 2.0**-8 + 2.0**-126).all()


def test_zeros_and_infinities_that_were_written_are_updated_as_in_a_float32_run_from_there():
    """torch's kernel makes NaN of what the remainders that are left over make of them."""
    written = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1e-40, 3e38]).repeat(257)
    p = torch.nn.Parameter(torch.randn(len(written)).bfloat16())
    optimizer = AdamW([p], lr=1e-2, weight_decay=0.1, amsgrad=True, master_weights=True, backend="eager")
    for number in range(2):
        step(optimizer, normal([p.shape], number, torch.bfloat16))
    state = {name: value.clone() for name, value in optimizer.state[p].items()}
    remainder = state.pop("remainder")
    assert (remainder < 0).any() and (remainder > 0).any()
    with torch.no_grad():
        p.copy_(written)
    q = torch.nn.Parameter(p.detach().float())
    float32 = AdamW([q], lr=1e-2, weight_decay=0.1, amsgrad=True, backend="eager")
    float32.init_state()
    for name, value in state.items():
        float32.state[q][name].copy_(value)
    (g,) = normal([p.shape], 2, torch.bfloat16)
    step(optimizer, [g])
    step(float32, [g.float()])
    assert_same({n: optimizer.state[p][n] for n in state}, dict(float32.state[q]))
    weight = float32_weight(optimizer, p)
    assert_same(weight.isnan(), q.detach().isnan())
    finite = written.isfinite()
    off = (weight - q.detach())[finite].abs()
    assert (off <= written[finite].abs() * 2.0**-8 + 1e-8).all()  # what is left over is half a unit
    assert (weight[written.isinf()].abs() > 3.38e38).all()


def test_the_state_of_a_fresh_model_is_no_remainder():
    for half in HALVES:
        params = parameters([(33, 5)], half)
        optimizer = AdamW(params, master_weights=True)
        optimizer.init_state()
        assert_same(float32_weight(optimizer, params[0]), params[0].detach().float())


@each_half
@every_backend
def test_a_group_may_have_float32_parameters_beside_those_of_16_bits(backend, half, device):
    """Layer norms stay in float32 in many models; with moments in bfloat16 all are updated in the same way."""
    dtypes = (half, torch.float32, half)
    device = device if backend == "triton" else torch.device("cpu")

    def trained(which):
        params = [torch.nn.Parameter(t.to(device, d)) for t, d in zip(normal([(5,), (3, 4), ()], 0), dtypes)]
        some = [params[i] for i in which]
        optimizer = AdamW(some, lr=0.1, master_weights=True, state_dtype=torch.bfloat16, backend=backend)
        for count in range(2):
            grads = [g.to(device, d) for g, d in zip(normal([(5,), (3, 4), ()], 1 + count), dtypes)]
            step(optimizer, [grads[i] for i in which])
        return [p.detach() for p in some]

    # What is random goes by the place of a parameter, so the first one alone can be compared.
    together, alone = trained((0, 1, 2)), trained((0,))
    assert_same(together[0], alone[0])
    assert not any(same(p, before.to(p.dtype)) for p, before in zip(together, normal([(5,), (3, 4), ()], 0)))
