"""The float32 weights of a model in 16 bits: read as a state dict, and loaded from one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt import sharding
from fusedopt.backends.eager.storage import read_weight, write_weight
from fusedopt.optimizer.base import FusedOptimizer
from fusedopt.optimizer.state import make_states, settle_states
from fusedopt.precision import Precision, master_state
from fusedopt.wrappers import unwrapped_optimizer


@torch.no_grad()
def float32_parameters(optimizer: FusedOptimizer, model: torch.nn.Module) -> dict[str, Any]:
    """Returns a copy of the model's state dict with its weights as the optimizer knows them, in at least float32.

    For evaluating, averaging and saving. With `master_weights=True` the weights of 16 bits are those that updates work
    on; without, they are the model's own, widened. Buffers, and weights of other optimizers, are the model's.

    Args:
        optimizer: an optimizer of this package, or Accelerate's or Lightning's wrapper around one.
        model: the module that holds its parameters. Sharded ones (DTensor) give sharded weights.

    Returns:
        The keys of `model.state_dict()`; tensors of the same shapes, all of them copies.

    Example:
        >>> import fusedopt, torch
        >>> model = torch.nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
        >>> optimizer = fusedopt.Lion(model.parameters(), lr=1e-5, master_weights=True)
        >>> before = fusedopt.float32_parameters(optimizer, model)["weight"]
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> after = fusedopt.float32_parameters(optimizer, model)["weight"]
        >>> torch.allclose(after, before - 1e-5, rtol=0, atol=1e-7), torch.equal(model.weight.float(), before)
        (True, True)
    """
    optimizer = unwrapped_optimizer(optimizer)
    completed = _completed(optimizer)
    params = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        p = params.get(name)
        if p is None:
            weights[name] = value.detach().clone() if isinstance(value, Tensor) else value
        else:
            master = optimizer.state.get(p, {}).get(completed.get(p))
            weight = read_weight(sharding.shard(p.detach()), None if master is None else sharding.shard(master))
            weights[name] = sharding.with_shard(p.detach(), weight.clone() if weight.dtype == p.dtype else weight)
    return weights


def _completed(optimizer: FusedOptimizer) -> dict[Tensor, str]:
    """The parameters with master weights, and the name of the state that completes each."""
    return {
        p: name
        for group in optimizer.param_groups
        if Precision.of(group, 0).master_weights
        for p in group["params"]
        if (name := master_state(p.dtype))
    }


@torch.no_grad()
def load_float32_parameters(optimizer: FusedOptimizer, model: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads what `float32_parameters` returned, or any state dict of the model in float32, into a model in 16 bits.

    Weights of 16 bits are rounded to nearest; with `master_weights=True` what they lose is kept in the optimizer's
    state, which is made if there is none yet. So a model can start from float32 weights without losing a bit.

    Args:
        optimizer: as for `float32_parameters`.
        model: as there.
        state_dict: the keys of `model.state_dict()`, and tensors of the same shapes.

    Raises:
        ValueError: keys or shapes do not fit; nothing was changed.

    Example:
        >>> import fusedopt, torch
        >>> model = torch.nn.Linear(4, 1, dtype=torch.bfloat16)
        >>> optimizer = fusedopt.AdamW(model.parameters(), master_weights=True)
        >>> weights = {"weight": torch.full((1, 4), 1 / 3), "bias": torch.full((1,), 1 / 7)}
        >>> fusedopt.load_float32_parameters(optimizer, model, weights)
        >>> torch.equal(fusedopt.float32_parameters(optimizer, model)["weight"], weights["weight"])
        True
    """
    optimizer = unwrapped_optimizer(optimizer)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(map(str, state_dict.keys() - own.keys()))
    if missing or unexpected:
        raise ValueError(f"the state dict does not fit the model: missing {missing}, unexpected {unexpected}")
    for name, value in own.items():
        new = state_dict[name]
        if isinstance(value, Tensor) and (not isinstance(new, Tensor) or new.shape != value.shape):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"{name} of the state dict is {got}, expected a tensor of shape {tuple(value.shape)}")
    groups = optimizer.param_groups
    completed = _completed(optimizer)
    settle_states(optimizer, groups)  # options may have been switched on
    make_states(optimizer, groups, [[p if p in completed else None for p in group["params"]] for group in groups])
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, value in own.items():
        p = params.get(name)
        if p is not None:
            weight = sharding.shard(sharding.sharded_like(state_dict[name].detach().to(p.device), p))
            mine = sharding.shard(p.detach())
            wide = weight.to(torch.promote_types(p.dtype, torch.float32), copy=True)
            master = optimizer.state[p].get(completed[p]) if p in completed else None
            write_weight(mine, None if master is None else sharding.shard(master), wide, None)
        elif isinstance(value, Tensor):
            value.copy_(state_dict[name])
