"""One optimizer may update its parameters by several rules: matrices by one, vectors by another."""

import pytest
import torch
from torch import Tensor

from fusedopt import Adafactor, AdamW, register_step_in_backward
from fusedopt.optimizer.engine import Part

ADAFACTOR = {**Adafactor([torch.ones(1)], lr=0.01, beta1=0.9, relative_step=False).defaults, "rule": "adafactor"}


class AdafactorWithAdamW(AdamW):
    """Adafactor for matrices, AdamW for what has fewer dimensions."""

    def parts(self, group):
        matrices = [i for i, p in enumerate(group["params"]) if p.dim() >= 2]
        vectors = [i for i, p in enumerate(group["params"]) if p.dim() < 2]
        parts = [Part("adafactor", matrices, ADAFACTOR), Part("adamw", vectors)]
        return [part for part in parts if part.places]

    def hyper(self, group):
        return (Adafactor if group.get("rule") == "adafactor" else AdamW).hyper(self, group)

    def moments(self, p, group):
        return Adafactor.moments(self, p, ADAFACTOR) if p.dim() >= 2 else super().moments(p, group)


def model(device: torch.device) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(device)


def train(m: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).to(next(m.parameters()).device)
    for _ in range(3):
        m(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().cpu() for p in m.parameters()]


def one_optimizer_each(m: torch.nn.Module, backend: str) -> list[torch.optim.Optimizer]:
    given = {name: value for name, value in ADAFACTOR.items() if name in ("lr", "beta1", "relative_step")}
    return [
        Adafactor([p for p in m.parameters() if p.dim() >= 2], backend=backend, **given),
        AdamW([p for p in m.parameters() if p.dim() < 2], lr=0.1, weight_decay=0.5, backend=backend),
    ]


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_backward", [False, True])
def test_matrices_by_adafactor_and_vectors_by_adamw_are_as_with_one_optimizer_each(backend, in_backward, device):
    device = device if backend == "triton" else torch.device("cpu")
    m, other = model(device), model(device)
    optimizer = AdafactorWithAdamW(m.parameters(), lr=0.1, weight_decay=0.5, backend=backend)
    if in_backward:
        register_step_in_backward(optimizer, m)
    torch.testing.assert_close(train(m, [optimizer]), train(other, one_optimizer_each(other, backend)), rtol=0, atol=0)


def test_a_second_rule_is_skipped_with_the_first_and_goes_through_a_checkpoint():
    m = model(torch.device("cpu"))
    optimizer = AdafactorWithAdamW(m.parameters(), lr=0.1, skip_nonfinite=True)
    train(m, [optimizer])
    before = [p.detach().clone() for p in m.parameters()]
    optimizer.apply_gradients((torch.full_like(p, torch.inf if p.dim() < 2 else 1.0), p) for p in m.parameters())
    torch.testing.assert_close([p.detach() for p in m.parameters()], before, rtol=0, atol=0)
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    other = model(torch.device("cpu"))
    other.load_state_dict(m.state_dict())
    resumed = AdafactorWithAdamW(other.parameters(), lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(train(other, [resumed]), train(m, [optimizer]), rtol=0, atol=0)
