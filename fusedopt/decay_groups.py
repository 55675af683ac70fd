"""Which parameters should decay, by the type of their module and their dimensions instead of by their names."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fusedopt import checks

# Every library has an RMSNorm of its own, so there is no list of types to compare with. At the end of the name: a
# PreNormBlock may own matrices that are to decay.
_NORM = re.compile(r"norm(act|alization)?\d*d?$", re.IGNORECASE)


def is_norm(module: nn.Module) -> bool:
    """True if a module normalizes: the name of its class, or of one that it derives from, ends like `RMSNorm`.

    Example:
        >>> [is_norm(module) for module in (nn.LayerNorm(2), nn.BatchNorm2d(2), nn.Linear(2, 2))]
        [True, True, False]
    """
    return any(_NORM.search(cls.__name__) for cls in type(module).__mro__)


def decay_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    never: Sequence[type[nn.Module]] = (),
    min_dim: int = 2,
    report: Callable[[str], Any] | None = print,
) -> list[dict[str, Any]]:
    """Two param groups for any torch optimizer: what decays, and what does not.

    A parameter decays if it has at least `min_dim` dimensions and no module that owns it is a norm (`is_norm`) or of a
    type in `never`: so matrices, convolutions and embeddings do; norms, biases, scales and other vectors do not. A
    parameter that several modules share comes once, under its first name. Frozen parameters
    (`requires_grad=False`) are left out.

    Args:
        module: whose parameters, its submodules' included.
        weight_decay: the first group's; the second's is 0.
        never: further types of modules whose parameters do not decay, for instance `[nn.Embedding]`.
        min_dim: parameters of fewer dimensions do not decay.
        report: gets one line per group and type of module; None for silence.

    Returns:
        Two groups, each with "params" (list of parameters), "param_names" (list of str) and "weight_decay"; a group may
        be without parameters.

    Raises:
        ValueError: `weight_decay` is negative, there is nothing to train, or a lazy parameter has no shape yet.

    Source of the rule: nanoGPT, `configure_optimizers`; the types in addition, since some norms have matrices.

    Example:
        >>> import fusedopt, torch
        >>> from fusedopt.decay_groups import decay_groups
        >>> model = torch.nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
        >>> optimizer = fusedopt.AdamW(decay_groups(model, 0.1), lr=1e-3)
        weight decay 0.1: 4 tensors, 512 parameters
          256 of 2 in Linear: linear1.weight, linear2.weight
          192 of 1 in MultiheadAttention: self_attn.in_proj_weight
          64 of 1 in NonDynamicallyQuantizableLinear: self_attn.out_proj.weight
        weight decay 0: 8 tensors, 88 parameters
          32 of 4 in LayerNorm: norm1.weight, norm1.bias, norm2.weight, ...
          24 of 1 in MultiheadAttention: self_attn.in_proj_bias
          24 of 2 in Linear: linear1.bias, linear2.bias
          8 of 1 in NonDynamicallyQuantizableLinear: self_attn.out_proj.bias
    """
    if not checks.number("weight_decay", weight_decay) >= 0.0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}")
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, owner in module.named_modules():
        for name, p in owner.named_parameters(prefix, recurse=False):
            if nn.parameter.is_lazy(p):
                raise ValueError(
                    f"parameter {name} has no shape yet: run the module once before sorting its parameters"
                )
            if p.requires_grad:
                owners.setdefault(p, []).append((name, owner))
    if not owners:
        raise ValueError(f"no parameter of {type(module).__name__} requires a gradient")

    groups = []
    for decays, rate in ((True, weight_decay), (False, 0.0)):
        chosen = {}
        for p, owned in owners.items():
            kept = p.dim() < min_dim or any(is_norm(owner) or isinstance(owner, tuple(never)) for _, owner in owned)
            if decays is not kept:
                chosen[p] = owned[0]
        groups.append({"params": [*chosen], "param_names": [name for name, _ in chosen.values()], "weight_decay": rate})
        if report is not None:
            for line in _lines(rate, chosen):
                report(line)
    return groups


def _lines(rate: float, chosen: dict[nn.Parameter, tuple[str, nn.Module]]) -> list[str]:
    sizes: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for p, (name, owner) in chosen.items():
        kind = type(owner).__name__
        sizes[kind] = sizes.get(kind, 0) + p.numel()
        names.setdefault(kind, []).append(name)
    plural = "" if len(chosen) == 1 else "s"
    lines = [f"weight decay {rate:g}: {len(chosen):,} tensor{plural}, {sum(sizes.values()):,} parameters"]
    for kind in sorted(sizes, key=lambda kind: -sizes[kind]):
        shown = ", ".join([*names[kind][:3], *["..."] * (len(names[kind]) > 3)])
        lines.append(f"  {sizes[kind]:,} of {len(names[kind]):,} in {kind}: {shown}")
    return lines
