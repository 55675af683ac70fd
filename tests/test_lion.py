"""Lion: its numbers against the formula in float64, and to the bit; what every optimizer can do, it can."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import Lion, backends
from fusedopt.backends.eager import elementwise
from fusedopt_kernels import rules

BACKENDS = ["eager", pytest.param("triton", marks=pytest.mark.skipif(not backends.has_triton(), reason="no triton"))]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = (1, 7, 48, 1025, 3000, 0, 2048)

# The interpreter computes with numpy, which warns about what it is given here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tensors(seed, dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def parameters(dtype=torch.float32, sizes=SIZES, device="cpu"):
    return [torch.nn.Parameter(t.to(device)) for t in tensors(0, dtype, sizes)]


def gradients(params, seed):
    """Of magnitudes from 1e-6 to 10, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        size = 10.0 ** torch.randint(-6, 2, p.shape, generator=generator).double()
        grads.append((noise * size * (noise.abs() > 0.1)).to(p.device, p.dtype))
    return grads


def step(optimizer, params, grads):
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()


def lion(p, g, m, lr, beta1, beta2, weight_decay):
    """One step of float64 arrays, as the paper has it; and what the sign is taken of."""
    direction = beta1 * m + (1 - beta1) * g
    return p - lr * (np.sign(direction) + weight_decay * p), beta2 * m + (1 - beta2) * g, direction


@every_backend
@every_dtype
@pytest.mark.parametrize("maximize", [False, True])
def test_every_step_is_the_formula_in_float64_rounded_once(backend, dtype, maximize, device):
    """From what each step finds: signs of what cancels may differ, and would then go their own way."""
    device = device if backend == "triton" else "cpu"
    params = parameters(dtype, device=device)
    options = {"lr": 0.25, "weight_decay": 0.125, "betas": (0.75, 0.875)}
    optimizer = Lion(params, maximize=maximize, backend=backend, **options)
    optimizer.init_state()
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    for seed in range(1, 4):
        grads = gradients(params, seed)
        before = [(p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in params]
        step(optimizer, params, grads)
        for (p, m), g, new in zip(before, grads, params):
            p, m, g = (t.double().cpu().numpy() for t in (p, m, g))
            g = -g if maximize else g
            exact_p, exact_m, direction = lion(p, g, m, 0.25, 0.75, 0.875, 0.125)
            doubtful = np.abs(direction) <= 4 * arithmetic * (np.abs(m) + np.abs(g))
            doubtful &= direction != 0.0
            assert doubtful.sum() <= 0.01 * direction.size
            ours_p, ours_m = (t.detach().double().cpu().numpy() for t in (new, optimizer.state[new]["exp_avg"]))
            tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            for ours, exact, size, sure in (
                (ours_p, exact_p, np.abs(p) + 0.25, ~doubtful),
                (ours_m, exact_m, np.abs(m) + np.abs(g), np.ones_like(doubtful)),
            ):
                allowed = 4 * arithmetic * size + rounding * np.abs(exact) + tiny
                assert (np.abs(ours - exact) <= allowed)[sure].all()
    assert all(optimizer.state[p]["step"] == 3.0 for p in params)


@every_backend
def test_the_defaults_are_those_of_the_reference_implementation(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Lion([p], backend=backend)
    step(optimizer, [p], [torch.tensor([2.0, 0.0, -1.0])])
    torch.testing.assert_close(p.detach(), torch.tensor([1 - 1e-4, 1.0, 1 + 1e-4]), rtol=0, atol=6e-8)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([0.02, 0.0, -0.01]), rtol=1e-6, atol=0)
    # The average is 0.9 * -0.01 + 0.1 * 0.08 = -0.001: it has the last word, not the gradient.
    step(optimizer, [p], [torch.tensor([0.0, 0.0, 0.08])])
    assert p[2] > 1 + 1.5e-4


@every_backend
@every_dtype
def test_zero_moves_nothing_and_nan_stays_nan(backend, dtype, device):
    device = device if backend == "triton" else "cpu"
    values = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).smallest_normal]
    p = torch.nn.Parameter(torch.full((len(values),), 2.0, dtype=dtype, device=device))
    optimizer = Lion([p], lr=0.5, betas=(0.5, 0.5), backend=backend)
    step(optimizer, [p], [torch.tensor(values, dtype=dtype, device=device)])
    expected = torch.tensor([2.0, 2.0, torch.nan, 1.5, 2.5, 1.5], dtype=dtype)
    torch.testing.assert_close(p.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True)
    moments = optimizer.state[p]["exp_avg"].cpu()
    assert moments[2].isnan() and moments[3] == torch.inf and moments[4] == -torch.inf


@every_dtype
@pytest.mark.parametrize("grad_dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_kernels_equal_the_rule_on_numpy_bit_for_bit(dtype, grad_dtype, device):
    pytest.importorskip("triton")
    params = parameters(dtype, device=device)
    lr, (beta1, beta2), decay = 3e-2, (0.85, 0.97), 0.1
    optimizer = Lion(params, lr=lr, betas=(beta1, beta2), weight_decay=decay, backend="triton")
    expected = [(p.detach().cpu().clone(), torch.zeros_like(p, device="cpu")) for p in params]
    wide = torch.promote_types(dtype, torch.float32)
    f = {torch.float32: np.float32, torch.float64: np.float64}[wide]
    for seed in range(1, 3):
        grads = [g.to(grad_dtype or dtype) for g in gradients(params, seed)]
        grads[3][:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
        optimizer.apply_gradients(zip(grads, params), scale=0.25)
        with np.errstate(all="ignore"):
            for (p, m), g in zip(expected, grads):
                p_, m_, g_ = (t.to(wide).cpu().numpy() for t in (p, m, g))
                g_ = g_ * f(0.25)
                direction = rules.running_average(m_, g_, f(1.0 - beta1))
                p.copy_(torch.from_numpy(rules.lion_update(p_, direction, f(lr), f(decay), np.sign)))
                m.copy_(torch.from_numpy(rules.running_average(m_, g_, f(1.0 - beta2))))
        for i, (p, (new, m)) in enumerate(zip(params, expected)):
            for what, ours, theirs in (("parameter", p.detach(), new), ("exp_avg", optimizer.state[p]["exp_avg"], m)):
                ours = ours.cpu()
                bits = torch.int16 if dtype.itemsize == 2 else torch.int32 if dtype.itemsize == 4 else torch.int64
                wrong = (ours.view(bits) != theirs.view(bits)) & ~(ours.isnan() & theirs.isnan())
                assert not wrong.any(), f"{what} {i}: {ours[wrong][:3]} instead of {theirs[wrong][:3]}"


@every_backend
def test_16_bits_are_rounded_once(backend, device):
    """2^-8 is half a unit of 1.0 in bfloat16: the update and the decay each would be lost in a tie; together not."""
    device = device if backend == "triton" else "cpu"
    p = torch.nn.Parameter(torch.ones(16, dtype=torch.bfloat16, device=device))
    optimizer = Lion([p], lr=2.0**-9, weight_decay=0.75, maximize=True, backend=backend)
    step(optimizer, [p], [torch.full_like(p, -1.0)])
    assert torch.equal(p.detach(), torch.full_like(p, 1.0 - 2.0**-8))


@pytest.mark.slow
def test_any_size_takes_the_same_step_on_the_cpu(monkeypatch):
    """Many small tensors come joined, large ones in pieces, those of another layout whole."""
    shapes = [(3,), (40, 30), (), (2, 3, 5, 7), (61, 67), (0, 3), (8, 16, 4, 4)]

    def run():
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        params.append(torch.nn.Parameter(torch.randn(50, 60, generator=generator).t()))
        params.append(torch.nn.Parameter(torch.randn(90, 60, generator=generator)[::2, 3:40]))
        params.append(torch.nn.Parameter(torch.randn(70, generator=generator).double()))
        optimizer = Lion(params, lr=0.1, weight_decay=0.1, backend="eager")
        for _ in range(3):
            optimizer.apply_gradients([(torch.randn(p.shape, generator=generator), p) for p in params], scale=0.5)
        return [t.detach() for p in params for t in (p, *optimizer.state[p].values())]

    whole = run()
    for size in (1, 16, 1000, 1 << 40):
        monkeypatch.setattr(elementwise, "_PIECE", size)
        for ours, expected in zip(run(), whole):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_both_backends_give_the_same_numbers(device):
    """Groups of their own options, a rate on the device, a parameter that misses gradients."""
    pytest.importorskip("triton")
    ours, theirs = parameters(device=device), parameters()
    optimizers = []
    for own, backend in ((ours, "triton"), (theirs, "eager")):
        groups = [
            {"params": own[:2], "lr": torch.tensor(0.25, device=own[0].device), "weight_decay": 0.5},
            {"params": own[2:4], "betas": (0.0, 0.5), "maximize": True},
            {"params": own[4:]},
        ]
        optimizers.append(Lion(groups, lr=1e-2, max_grad_norm=1.0, backend=backend))
        for seed in range(1, 4):
            grads = gradients(own, seed)
            grads[seed] = None
            step(optimizers[-1], own, grads)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p.cpu(), q, rtol=2e-6, atol=2e-6)
        for name, value in optimizers[1].state[q].items():
            torch.testing.assert_close(optimizers[0].state[p][name].cpu(), value, rtol=1e-6, atol=1e-6)
    assert [float(optimizers[0].state[p]["step"]) for p in ours[:4]] == [3.0, 2.0, 2.0, 2.0]


@every_backend
def test_an_overflow_changes_nothing_and_a_scale_is_taken_out(backend, device):
    device = device if backend == "triton" else "cpu"
    params, same = parameters(device=device), parameters(device=device)
    optimizer, plain = Lion(params, lr=0.1, backend=backend), Lion(same, lr=0.1, backend=backend)
    for seed, found in ((1, 0.0), (2, 1.0), (3, 0.0)):
        grads = gradients(params, seed)
        optimizer.grad_scale = torch.tensor([1024.0], device=device)
        optimizer.found_inf = torch.tensor([found], device=device)
        step(optimizer, params, [1024.0 * g for g in grads])
        optimizer.forget_scaler()
        if not found:
            step(plain, same, grads)
    for p, q in zip(params, same):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])
        assert optimizer.state[p]["step"] == 2.0


@every_backend
def test_a_bad_batch_is_skipped_as_a_whole(backend, device):
    device = device if backend == "triton" else "cpu"
    params = parameters(device=device)
    optimizer = Lion(params, lr=0.1, skip_nonfinite=True, backend=backend)
    step(optimizer, params, gradients(params, 1))
    before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))
    grads = gradients(params, 2)
    grads[3][5] = torch.inf
    step(optimizer, params, grads)
    for p, old, (index, state) in zip(params, before[0], before[1].items()):
        assert torch.equal(p, old)
        for name, value in state.items():
            assert torch.equal(optimizer.state_dict()["state"][index][name], value)
    assert optimizer.skipped_steps == 1


@every_backend
def test_a_run_goes_on_from_its_checkpoint(backend, device, tmp_path):
    device = device if backend == "triton" else "cpu"
    stayed, moved = parameters(device=device), parameters(device=device)
    make = partial(Lion, lr=0.1, weight_decay=0.1, backend=backend)
    one, other = make(stayed), make(moved)
    for seed in (1, 2):
        step(one, stayed, gradients(stayed, seed))
        step(other, moved, gradients(moved, seed))
    torch.save(other.state_dict(), tmp_path / "checkpoint.pt")
    again = make(moved)
    again.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert set(again.state[moved[0]]) == {"step", "exp_avg"}
    step(one, stayed, gradients(stayed, 3))
    step(again, moved, gradients(moved, 3))
    for p, q in zip(stayed, moved):
        assert torch.equal(p, q) and torch.equal(one.state[p]["exp_avg"], again.state[q]["exp_avg"])


@every_backend
def test_a_step_in_the_backward_pass_is_the_step(backend, device):
    device = device if backend == "triton" else "cpu"
    models = [torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    plain, hooked = (Lion(m.to(device).parameters(), lr=0.1, backend=backend) for m in models)
    fusedopt.register_step_in_backward(hooked, models[1])
    x = torch.linspace(-1.0, 1.0, 20, device=device).reshape(4, 5)
    for _ in range(2):
        for model in models:
            model(x).square().sum().backward()
        for optimizer in (plain, hooked):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(p, q)


def test_a_parameter_of_another_size_is_told_from_its_state():
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Lion([p])
    step(optimizer, [p], [torch.ones(3, 4)])
    p.data = torch.ones(5, 4)
    p.grad = torch.ones(5, 4)
    with pytest.raises(RuntimeError, match=r"is of shape \(5, 4\) now, and its state was made for one of \(3, 4\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be finite and >= 0, got -1\.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1\.0"),
        ({"betas": 0.9}, r"betas must be a pair"),
        ({"weight_decay": -0.1}, r"weight_decay must be finite and >= 0, got -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        Lion([p], **options)
    with pytest.raises(ValueError, match=message):
        Lion([{"params": [p], **options}])
    with pytest.raises(TypeError, match="eps"):
        Lion([p], eps=1e-8)
