"""GradientAccumulator: the recorded sequences, the right means, what is kept and what is not, two processes."""

import weakref
from importlib import import_module
from pathlib import Path

import accumulate_on_two_processes as two
import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.keras import BACKENDS, device_of, recorded
from helpers.optimizers import OPTIMIZERS, every_optimizer
from helpers.processes import run_together, run_without_interpreter

import fusedopt
from fusedopt.accumulate import GradientAccumulator

ROOT = Path(__file__).parent.parent
CASES = recorded("tf_gradient_accumulator")["cases"]
ERRORS = {"ValueError": ValueError, "InvalidArgumentError": ValueError}


def tensors(values, device="cpu", dtype=torch.float32):
    return [None if value is None else torch.tensor(value, device=device, dtype=dtype) for value in values]


def assert_equal(actual, expected):
    assert [g is None for g in actual] == [g is None for g in expected]
    for ours, theirs in zip(actual, expected):
        if ours is not None:
            assert_same(ours.cpu(), theirs)


# The recorded sequences.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case, backend):
    """Bit for bit: sums of float32 in the same order."""
    accumulator = GradientAccumulator(backend=backend)
    kept = None

    def run(operation):
        nonlocal kept
        if operation["op"] == "call":
            return accumulator(tensors(operation["gradients"], device_of(backend)))
        if operation["op"] == "keep":
            kept = accumulator.gradients
        return {
            "step": lambda: accumulator.step,
            "reset": accumulator.reset,
            "gradients": lambda: accumulator.gradients,
            "keep": lambda: kept,
            "kept": lambda: kept,
        }[operation["op"]]()

    for operation in case["operations"]:
        if operation["error"]:
            with pytest.raises(ERRORS[operation["error"]["type"]]):
                run(operation)
        elif isinstance(operation.get("result"), list):
            assert_equal(run(operation), tensors(operation["result"]))
        else:
            assert run(operation) == operation.get("result")


# The mean.


def exact_problem():
    """Small integers: every product and sum below is a float32 number, in whatever order."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-4, 5, shape, generator=generator).float() for shape in ((16, 3), (16, 2)))
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
    return model, x, y


def inexact_problem():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2), torch.randn(16, 3), torch.randn(16, 2)


def squared_error(model, x, y):
    return ((model(x) - y) ** 2).sum() / len(x)


@pytest.mark.parametrize("backend", BACKENDS)
@every_optimizer
@pytest.mark.parametrize("problem", [exact_problem, inexact_problem])
def test_micro_batches_equal_one_large_batch(problem, name, backend):
    """Where sums are exact so is their mean, since 1/4 is a power of two; elsewhere float32 roundings differ."""
    device = device_of(backend)
    means, results = [], []
    for micro_batches in (1, 4):
        model, x, y = problem()
        model, x, y = model.to(device), x.to(device), y.to(device)
        optimizer, accumulator = OPTIMIZERS[name].at(0.1, model.parameters()), GradientAccumulator(backend=backend)
        for part in zip(x.chunk(micro_batches), y.chunk(micro_batches)):
            squared_error(model, *part).backward()
            accumulator.accumulate(model.parameters())
        means.append([g.cpu() / accumulator.step for g in accumulator.gradients])
        optimizer.apply_gradients(zip(accumulator.gradients, model.parameters()), scale=1 / accumulator.step)
        results.append([p.detach().cpu() for p in model.parameters()])
    assert_near(*means, atol=0.0 if problem is exact_problem else 1e-6)
    # On the CPU a step whose scale is 1 runs in another kernel, with roundings of its own.
    assert_near(*results, rtol=2**-22, atol=1e-7 if problem is exact_problem else 1e-5)


@pytest.mark.parametrize("how", ["means, by tokens", "sums, by hand", "tensor weights"])
@pytest.mark.parametrize("lengths", [[4, 4, 4, 4], [7, 1, 8], [16], [9, 0, 7]], ids=str)
def test_mean_over_all_tokens(lengths, how):
    """Whatever the micro-batches hold; an empty one (whose mean is NaN) counts for nothing."""
    model, x, y = inexact_problem()
    squared_error(model.double(), x.double(), y.double()).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    accumulator = GradientAccumulator()
    for rows, targets in zip(x.double().split(lengths), y.double().split(lengths)):
        error = ((model(rows) - targets) ** 2).sum()
        if how == "sums, by hand":
            error.backward()
            accumulator.accumulate(model.parameters())
        else:
            (error / len(rows)).backward()
            tokens = len(rows)
            accumulator.accumulate(model.parameters(), torch.tensor(tokens) if how == "tensor weights" else tokens)
    assert accumulator.step == len(lengths)
    scale = 1 / 16 if how == "sums, by hand" else accumulator.scale
    for total, mean in zip(accumulator.gradients, expected):
        assert_near(total * scale, mean, rtol=1e-12, atol=1e-12)


def test_last_window_is_incomplete():
    """Ten micro-batches in windows of four: the last mean is over two."""
    p = torch.nn.Parameter(torch.zeros(1))
    accumulator, means = GradientAccumulator(), []
    for i in range(10):
        p.grad = torch.tensor([float(i)])
        accumulator.accumulate([p])
        if accumulator.step == 4 or i == 9:
            means.append((accumulator.gradients[0] * accumulator.scale).item())
            accumulator.reset()
    assert means == [1.5, 5.5, 8.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights(dtype, backend):
    """Each addition is float32 arithmetic (float64 for float64), rounded once; 1001 is no bfloat16 number."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    shapes, weights = ((1,), (3, 7), (1025,)), (1001.0, 1003.0, 0.1)
    grads = [[torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes] for _ in weights]
    accumulator = GradientAccumulator(backend=backend)
    for row, weight in zip(grads, weights):
        accumulator(row, weight)
    assert accumulator.weight == sum(weights)
    wide = torch.promote_types(dtype, torch.float32)
    for total, *terms in zip(accumulator.gradients, *grads):
        expected = torch.zeros_like(total)
        for weight, g in zip(weights, terms):
            expected = (weight * g.to(wide) + expected.to(wide)).to(dtype)
        # In float32 and float64 itself, the product may be rounded or not before it is added.
        largest = expected.abs().max().item()
        atol = 0.0 if dtype.itemsize == 2 else 2 * torch.finfo(dtype).eps * largest
        assert_near(total, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_no_weight_adds_nothing(as_tensor, backend):
    """Through the adders, since the accumulator reads tensors on the CPU: on a GPU it hands them down."""
    device = torch.device(device_of(backend))
    adder = import_module(f"fusedopt.backends.{backend}.accumulation").Adder(device)
    nan, total = torch.full((20,), torch.nan, device=device), torch.ones(20, device=device)
    for weight, g in ((2.0, total.clone()), (0.0, nan), (0.5, total.clone())):
        adder([total], [g], [total], torch.tensor(weight, device=device) if as_tensor else weight)
    assert (total == 3.5).all()
    adder([total], [nan], [None], torch.tensor(0.0, device=device) if as_tensor else 0.0)
    assert (total == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_sums_of_bfloat16(backend):
    """1 + 2^-9 is no bfloat16 number: sums in bfloat16 stay at 1 for ever."""
    device = device_of(backend)
    sums = []
    for dtype in (None, torch.float32):
        accumulator = GradientAccumulator(dtype, backend=backend)
        accumulator([torch.ones(20, dtype=torch.bfloat16, device=device)])
        for _ in range(4):
            accumulator([torch.full((20,), 2.0**-9, dtype=torch.bfloat16, device=device)])
        sums.append(accumulator.gradients[0])
    assert sums[0].dtype == torch.bfloat16 and (sums[0] == 1).all()
    assert sums[1].dtype == torch.float32 and (sums[1] == 1 + 4 * 2.0**-9).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Sums keep the first gradient's layout; later gradients may lie in memory as they like."""
    device = device_of(backend)
    accumulator = GradientAccumulator(backend=backend)
    first = torch.arange(48.0, device=device).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last)
    strided = torch.arange(96.0, device=device)[::2]
    empty, scalar = torch.zeros(0, device=device), torch.tensor(2.0, device=device)
    for big in (first, first.contiguous(), first.expand(2, 3, 2, 4).transpose(0, 0)):
        accumulator([big, strided, empty, scalar])
    sums = accumulator.gradients
    assert sums[0].stride() == first.stride()
    assert_equal(sums, [3 * first.cpu(), 3 * strided.cpu(), empty.cpu(), 3 * scalar.cpu()])


# What is kept.


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_lent_without_a_copy_and_never_written_again(backend):
    device = device_of(backend)
    g = torch.arange(20.0, device=device)
    accumulator = GradientAccumulator(backend=backend)
    accumulator([g])
    (first,) = accumulator.gradients
    assert accumulator.gradients[0] is first
    accumulator([g])
    (second,) = accumulator.gradients
    accumulator.reset()
    accumulator([5 * g])
    (third,) = accumulator.gradients
    for total, times in ((first, 1), (second, 2), (third, 5)):
        assert_same(total, times * g)


def test_memory_is_reused_where_nothing_was_lent():
    accumulator = GradientAccumulator()
    accumulator([torch.ones(3)])
    memory = accumulator._positions[0].memory
    accumulator([torch.ones(3)])
    accumulator.reset()
    accumulator([torch.ones(3)])
    assert accumulator.gradients[0] is memory and (memory == 1).all()


def test_gradients_are_not_kept():
    g = torch.ones(3)
    accumulator = GradientAccumulator()
    accumulator([g])
    g.zero_()
    assert (accumulator.gradients[0] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_given_back(backend):
    """Gradients after the call, sums after the window: what is held on to is missing in the next backward pass."""
    accumulator = GradientAccumulator(backend=backend)
    for _ in range(2):
        g = torch.ones(20, device=device_of(backend))
        gone = weakref.ref(g)
        accumulator([g])
        del g
        assert gone() is None
    lent = weakref.ref(accumulator.gradients[0])
    accumulator.reset()
    accumulator([torch.ones(20, device=device_of(backend))])
    assert lent() is None


def test_accumulate_takes_and_clears():
    used, late, never = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    accumulator = GradientAccumulator()
    for grads in ((1.0, None), (2.0, 4.0)):
        for p, value in zip((used, late), grads):
            p.grad = None if value is None else torch.full((2,), value)
        accumulator.accumulate(iter([used, late, never]))
        assert used.grad is late.grad is never.grad is None
    assert_equal(accumulator.gradients, tensors([[3.0, 3.0], [4.0, 4.0], None]))
    # Without gradient in a window, a parameter is left alone and not fed zeros, which would decay it.
    accumulator.reset()
    used.grad = torch.ones(2)
    accumulator.accumulate([used, late, never])
    assert_equal(accumulator.gradients, tensors([[1.0, 1.0], None, None]))


def test_update_from_sums_reads_no_grad_and_writes_no_sum():
    p = torch.nn.Parameter(torch.ones(3))
    accumulator = GradientAccumulator()
    for _ in range(3):
        p.grad = torch.ones(3)
        accumulator.accumulate([p])
    p.grad = torch.full((3,), -100.0)
    sums = accumulator.gradients
    fusedopt.AdamW([p], lr=0.5).apply_gradients(zip(sums, [p]), scale=accumulator.scale)
    assert (p < 1).all() and (sums[0] == 3).all()


# Refusals.


def filled(grads=((1.0, 2.0),), **options):
    accumulator = GradientAccumulator(**options)
    accumulator(tensors(grads))
    return accumulator


P, Q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))


def taking():
    accumulator = GradientAccumulator()
    accumulator.accumulate([P])
    return accumulator


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: GradientAccumulator(torch.int32), "dtype must be a floating torch.dtype or None, got torch.int32"),
        (lambda: GradientAccumulator("float32"), "dtype must be a floating torch.dtype or None, got 'float32'"),
        (lambda: GradientAccumulator(backend="cuda"), "backend must be one of"),
        (lambda: GradientAccumulator().scale, "the weights of 0 calls add up to 0, so there is no mean"),
        (lambda: filled()([torch.ones(2)], -1.0), "weight must be finite and >= 0, got -1.0"),
        (lambda: filled()([torch.ones(2)], float("nan")), "weight must be finite and >= 0, got nan"),
        (lambda: filled()([torch.ones(2)], torch.ones(2)), "weight as a tensor must hold one real number"),
        (lambda: filled()([torch.ones(3)]), r"gradient 0 of shape \(3,\) on cpu does not fit its sum of shape \(2,\)"),
        (lambda: filled()([torch.ones(2).to_sparse()]), "gradient 0 is torch.sparse_coo"),
        (lambda: filled()([torch.ones(2, dtype=torch.int64)]), "gradient 0 is torch.strided, torch.int64"),
        (lambda: filled().accumulate([P]), "this accumulator takes lists of gradients"),
        (lambda: taking()([torch.ones(2)]), "this accumulator takes the gradients of parameters"),
        (lambda: taking().accumulate([Q]), "the parameters are not those of before"),
        (lambda: taking().accumulate([P, Q]), "expected 1 parameters, as in the first call, got 2"),
    ],
)
def test_refuses(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_a_refused_call_changes_nothing():
    accumulator = filled([[1.0, 2.0], [3.0]])
    for bad in ([torch.ones(2), torch.ones(2)], [torch.ones(2)], [torch.ones(2), torch.ones(1).to_sparse()]):
        with pytest.raises(ValueError):
            accumulator(bad)
    assert accumulator.step == accumulator.weight == 1
    assert_equal(accumulator.gradients, tensors([[1.0, 2.0], [3.0]]))


# The kernel, as a compiler for a GPU sees it.


@pytest.mark.slow
def test_one_launch_adds_all_tensors():
    pytest.importorskip("triton")
    found = run_without_interpreter("compiled_accumulate.py")
    assert found["launches"] == {"1,000 aligned": [1, 1, 1], "odd ones among them": [2, 2, 2]}
    # With and without a sum so far, aligned and not; nothing for another weight, nor for one that is a tensor.
    assert found["compilations"] == 4
    aligned = found["aligned"]
    assert aligned["spilled"] == 0 and aligned["shared"] == 0
    # A thread's 8 elements, four at a time, in the float32 sum and in the bfloat16 gradient.
    assert aligned["reads"]["128"] == 2 and aligned["reads"]["64"] >= 2 and aligned["writes"] == {"128": 2}


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradients_with_the_negative_bit(backend):
    """Their memory holds the other sign."""
    accumulator = GradientAccumulator(backend=backend)
    for _ in range(2):
        accumulator([torch._neg_view(torch.tensor([1.0, -2.0]))])
    assert accumulator.gradients[0].tolist() == [-2.0, 4.0]


# Two processes.


@pytest.mark.slow
def test_two_processes_under_ddp(tmp_path):
    """Sums stay local until asked; then both hold the mean over all tokens, however many micro-batches each had."""
    run_together(two.__file__, 2, tmp_path, timeout=100)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    # One process with all tokens in one batch.
    model = two.model()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)
    for window in range(2):
        parts = [[(x, rank) for x in two.micro_batches(rank)] for rank in (0, 1)]
        for rank, part in enumerate(parts):
            model.zero_grad()
            sum(len(x) * two.loss(model, x, r) for x, r in part).backward()
            kept = results[rank]["windows"][window]
            for p, local in zip(model.parameters(), kept["local"]):
                assert (p.grad is None) == (local is None)
                if local is not None:
                    assert_near(local, p.grad, rtol=1e-7, atol=1e-7)
            assert (kept["step"], kept["weight"]) == (5, 20.0)
        model.zero_grad()
        sum(len(x) / 20 * two.loss(model, x, r) for part in parts for x, r in part).backward()
        optimizer.step()
    for result in results:
        for name, p in model.named_parameters():
            assert_near(result["params"][name], p.detach(), rtol=1e-10, atol=1e-12)
        for refusal, words in zip(
            result["refused"], ("gradient 1 was None", "already those of all", "have [0, 1]"), strict=True
        ):
            assert words in refusal


def test_zeros_that_somebody_wrote_to_are_handed_out_no_more():
    accumulator = GradientAccumulator()
    accumulator([torch.ones(2)])
    accumulator.reset()
    zeros = accumulator.gradients[0]
    assert accumulator.gradients[0] is zeros
    zeros.mul_(torch.nan)  # as clipping by a norm that is NaN does
    assert accumulator.gradients[0].tolist() == [0.0, 0.0]
