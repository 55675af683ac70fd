"""What is refused: each error names the argument and its value, and nothing has changed after it."""

import copy

import pytest
import torch
from helpers.comparing import assert_same

from fusedopt import AdamW, AdamWeightDecay, backends
from fusedopt.warn import warn_once

NAN, INF = float("nan"), float("inf")


def weight(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape or (2, 3), **kwargs))


OPTIONS = [
    ("lr", -1.0),
    ("lr", NAN),
    ("lr", INF),
    ("lr", "0.1"),
    ("lr", torch.tensor(-1.0)),
    ("lr", torch.ones(2)),
    ("lr", torch.tensor(1)),
    ("eps", -1e-8),
    ("eps", INF),
    ("weight_decay", -0.1),  # a departure: the original accepts and ignores it
    ("weight_decay", NAN),
    ("betas", (1.0, 0.9)),
    ("betas", (0.9, -0.1)),
    ("betas", (0.9, NAN)),
    ("betas", (0.9,)),
    ("betas", 0.9),
    ("correct_bias", "yes"),
    ("amsgrad", 1),
    ("maximize", None),
]


@pytest.mark.parametrize(("name", "value"), OPTIONS, ids=str)
def test_option_out_of_range(name, value):
    with pytest.raises(ValueError, match=name) as refused:
        AdamW([weight()], **{name: value})
    if isinstance(value, float):
        assert repr(value) in str(refused.value)


@pytest.mark.parametrize(("name", "value"), OPTIONS, ids=str)
def test_option_out_of_range_in_a_group(name, value):
    optimizer = AdamW([weight()])
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [weight()], name: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=name):
        AdamW([{"params": [weight()], name: value}])


@pytest.mark.parametrize("name", ["fused", "foreach", "capturable", "differentiable"])
def test_torchs_choices_of_implementation_point_to_backend(name):
    with pytest.raises(TypeError, match=rf"{name}=True.*backend="):
        AdamW([weight()], **{name: True})


@pytest.mark.parametrize("name", ["convention", "backend", "max_grad_norm", "skip_nonfinite"])
def test_options_of_the_whole_optimizer_in_a_group(name):
    with pytest.raises(TypeError, match=rf"{name}='x', which goes for the whole optimizer"):
        AdamW([{"params": [weight()], name: "x"}])


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm", "decay", "max_grad_norm"])
def test_options_of_the_whole_keras_optimizer_in_a_group(name):
    with pytest.raises(TypeError, match=rf"{name}=1\.0, which goes for the whole optimizer"):
        AdamWeightDecay([{"params": [weight()], name: 1.0}])


def test_unknown_option():
    with pytest.raises(TypeError, match="learning_rate"):
        AdamW([weight()], learning_rate=0.1)


@pytest.mark.parametrize("backend", ["cuda", None, "Triton"])
def test_unknown_backend(backend):
    with pytest.raises(ValueError, match="'auto', 'triton', 'eager'"):
        AdamW([weight()], backend=backend)


def test_triton_on_a_cpu_without_its_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    p = weight()
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], backend="triton")
    with pytest.raises(RuntimeError, match=r"cannot update parameters on cpu.*backend='auto'"):
        optimizer.step()
    assert_same(p.detach(), torch.ones(2, 3))
    assert not optimizer.state


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install 'fusedopt\[triton\]'"):
        AdamW([weight()], backend="triton")


def tritons(monkeypatch, version):
    """Another version of triton stands in, None for none; what was said once is forgotten."""
    monkeypatch.setattr(backends, "triton_version", lambda: version)
    warn_once.cache_clear()


@pytest.mark.parametrize(
    ("version", "what"), [("3.3.1", r"triton 3\.3\.1 is installed"), (None, "no triton is installed")]
)
def test_a_gpu_whose_triton_is_too_old_is_told_once_how_to_be_fast(version, what, monkeypatch):
    tritons(monkeypatch, version)
    gpu = torch.device("cuda", 0)
    with pytest.warns(
        UserWarning, match=rf"{what}, and the kernels need 3\.6 or newer: pip install -U torch"
    ) as warned:
        assert [backends.choose(gpu) for _ in range(3)] == ["eager"] * 3
    assert len(warned) == 1
    with pytest.raises(RuntimeError, match=rf"backend='triton' cannot work: {what}.*pip install"):
        AdamW([weight()], backend="triton")


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0", "3.10.0+git1a2b", "4.0"])
def test_a_newer_triton_serves_a_gpu_without_a_word(version, monkeypatch, recwarn):
    tritons(monkeypatch, version)
    assert backends.choose(torch.device("cuda", 0)) == "triton"
    assert backends.choose(torch.device("cpu")) == "eager" and not recwarn


def test_a_cpu_needs_no_triton_and_hears_nothing_of_it(monkeypatch, recwarn):
    tritons(monkeypatch, None)
    assert backends.choose(torch.device("cpu")) == backends.choose(torch.device("cuda", 0), "eager") == "eager"
    assert not recwarn


def test_unknown_convention():
    with pytest.raises(ValueError, match="'transformers', 'torch', 'keras'"):
        AdamW([weight()], convention="jax")


@pytest.mark.parametrize("convention", ["torch", "keras"])
def test_no_bias_correction_outside_transformers(convention):
    with pytest.raises(ValueError, match="correct_bias=False"):
        AdamW([weight()], correct_bias=False, convention=convention)
    with pytest.raises(ValueError, match="correct_bias=False"):
        AdamW([{"params": [weight()], "correct_bias": False}], convention=convention)


PARAMETERS = {
    "complex": lambda: torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)),
    "integer": lambda: torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
    "expanded": lambda: torch.nn.Parameter(torch.ones(1, 3).expand(2, 3)),
    "overlapping": lambda: torch.nn.Parameter(torch.ones(5).as_strided((3, 2), (1, 1))),
    "sparse": lambda: torch.nn.Parameter(torch.ones(2).to_sparse()),
    "float8": lambda: torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_that_cannot_be_updated(kind):
    with pytest.raises(ValueError, match="a parameter of shape"):
        AdamW([weight(), PARAMETERS[kind]()])
    optimizer = AdamW([weight()])
    with pytest.raises(ValueError, match="a parameter of shape"):
        optimizer.add_param_group({"params": [PARAMETERS[kind]()]})
    assert len(optimizer.param_groups) == 1


def test_empty_parameter_list():
    with pytest.raises(ValueError, match="empty"):
        AdamW([])


def test_sparse_gradient_changes_nothing():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    dense = weight()
    optimizer = AdamW([dense, embedding.weight])
    (embedding(torch.tensor([1])).sum() + dense.sum()).backward()
    before = copy.deepcopy((dense, embedding.weight))
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(dense, before[0])
    assert_same(embedding.weight, before[1])
    assert not optimizer.state


@pytest.mark.parametrize(
    "gradient",
    [torch.ones(3, 2), torch.ones(2, 3, device="meta"), torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3) * 1j],
    ids=["shape", "device", "integer", "complex"],
)
def test_gradient_that_does_not_fit_changes_nothing(gradient):
    p, q = weight(), weight()
    optimizer = AdamW([p, q])
    with pytest.raises(RuntimeError, match="does not fit its parameter"):
        optimizer.apply_gradients([(torch.ones(2, 3), p), (gradient, q)])
    assert_same(p.detach(), torch.ones(2, 3))
    assert not optimizer.state


def test_gradients_for_a_stranger_or_twice():
    p = weight()
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        optimizer.apply_gradients([(torch.ones(2, 3), weight())])
    with pytest.raises(ValueError, match="twice"):
        optimizer.apply_gradients([(torch.ones(2, 3), p), (torch.ones(2, 3), p)])


def stepped(*shapes, **options):
    params = [weight(*shape) for shape in shapes]
    optimizer = AdamW(params, **options)
    optimizer.apply_gradients([(torch.ones_like(p), p) for p in params])
    return optimizer


def broken_checkpoints():
    good = stepped((2, 3), (4,)).state_dict()
    missing, unknown, negative, count, counts, integers = (copy.deepcopy(good) for _ in range(6))
    decaying = copy.deepcopy(good)
    decaying["param_groups"][0].update(decoupled_weight_decay=False, weight_decay=0.5)
    count["state"][0]["step"], counts["state"][0]["step"] = -1.0, torch.ones(2)
    integers["state"][0]["exp_avg"] = torch.ones(2, 3, dtype=torch.int64)
    del missing["state"][0]["exp_avg_sq"]
    unknown["state"][1]["momentum_buffer"] = torch.ones(4)
    negative["param_groups"][0]["eps"] = -1.0
    return {
        "another shape": (stepped((3, 2), (4,)).state_dict(), "exp_avg of shape"),
        "fewer parameters": (stepped((2, 3)).state_dict(), "1 parameters, here it has 2"),
        "other groups": ({"state": {}, "param_groups": []}, "0 param groups"),
        "missing state": (missing, "missing .'exp_avg_sq'."),
        "unknown state": (unknown, "unknown .'momentum_buffer'."),
        "no checkpoint": ({"model": {}}, "'state' is NoneType"),
        "Adam that decays its gradients": (decaying, "added to the gradients"),
        "no count": (count, "step=-1.0"),
        "no counts": (counts, "step=tensor"),
        "integer moments": (integers, "exp_avg of dtype torch.int64"),
        "option out of range": (negative, "eps must be"),
    }


@pytest.mark.parametrize("kind", broken_checkpoints())
def test_checkpoint_that_does_not_fit_changes_nothing(kind):
    checkpoint, message = broken_checkpoints()[kind]
    optimizer = stepped((2, 3), (4,), lr=0.25)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    assert_same(optimizer.state_dict(), before)
