"""Sharded parameters: an element-wise update of the local shards, and one sentence where that would be wrong."""

import pytest
import torch
from loop_cases import Net, sharded, train, whole

from fusedopt import Adafactor, AdamW, AdamWeightDecay

BACKENDS = ["eager", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convention", ["transformers", "keras"])
def test_a_sharded_model_trains_like_a_whole_one(backend, convention):
    plain = Net()
    train(plain, AdamW(plain.parameters(), lr=0.1, convention=convention, backend="eager"), 3)
    with sharded(Net()) as model:
        optimizer = AdamW(model.parameters(), lr=0.1, convention=convention, backend=backend)
        train(model, optimizer, 3)
        for p, q in zip(whole(model), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert {state["step"].item() for state in optimizer.state.values()} <= {1.0, 2.0, 3.0}
        assert all(hasattr(state["exp_avg"], "placements") for state in optimizer.state.values())


def test_scaled_gradients_of_shards():
    with sharded(Net()) as model:
        params = list(model.parameters())
        before = [p.clone() for p in whole(model)]
        AdamW(params, lr=0.1).apply_gradients([(torch.ones_like(p), p) for p in params], scale=0.5)
        for p, q in zip(whole(model), before):
            torch.testing.assert_close(p, q - 0.1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: AdamW(params, max_grad_norm=1.0), r"max_grad_norm=1\.0 does not work with sharded"),
        (lambda params: AdamW(params, skip_nonfinite=True), "skip_nonfinite=True does not work with sharded"),
        (
            lambda params: AdamWeightDecay(params, global_clipnorm=1.0),
            r"global_clipnorm=1\.0 does not work with sharded",
        ),
        (Adafactor, "Adafactor, whose sums run over whole tensors, does not work with sharded"),
    ],
    ids=["max_grad_norm", "skip_nonfinite", "global_clipnorm", "Adafactor"],
)
def test_what_needs_whole_tensors_is_refused_before_anything_changes(make, message):
    with sharded(Net()) as model:
        params = list(model.parameters())
        optimizer = make(params)
        before = [p.clone() for p in whole(model)]
        with pytest.raises(RuntimeError, match=message):
            optimizer.apply_gradients([(torch.ones_like(p), p) for p in params])
        assert all(torch.equal(p, q) for p, q in zip(whole(model), before)) and not optimizer.state


def test_a_gradient_that_is_not_sharded_like_its_parameter_is_refused():
    with sharded(Net()) as model:
        p = next(model.parameters())
        with pytest.raises(RuntimeError, match="placements"):
            AdamW([p]).apply_gradients([(torch.ones(p.shape), p)])
