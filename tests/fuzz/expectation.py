"""What a step should leave of each parameter: which update, from which state, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fuzz import formulas
from fuzz.bounds import Bound, arithmetic_of, exact
from fuzz.setups import HALVES, options_of

if TYPE_CHECKING:
    from fuzz.training import Training


@dataclass
class Expected:
    """What a step should leave of one parameter."""

    weight: Bound
    state: dict[str, Any]
    """A `Bound` for what is updated, else a tensor that is to stay."""
    count: float
    old: Tensor | None = None
    grad_norm: Bound | None = None
    """Unscaled, before clipping."""
    moved: bool = False


def weight_of(p: Tensor, state: dict[str, Tensor], master_weights: bool) -> Tensor:
    """The weight that an update works on, at least in float32."""
    if p.dtype not in HALVES:
        return p.detach().clone()
    plain = p.detach().float()
    if not master_weights:
        return plain
    if p.dtype == torch.float16:
        copy_ = state.get("master_weight", plain)
        return torch.where(copy_.half() == p.detach(), copy_, plain)
    upper = p.detach().contiguous().view(torch.int16).numpy().astype(np.int64) << 16
    remainder = state["remainder"].contiguous().numpy().astype(np.int64) if "remainder" in state else 0
    joined = torch.from_numpy(np.asarray(upper + remainder).astype(np.uint32).view(np.float32))
    return torch.where(joined.isnan(), plain, joined)


def expected(
    training: Training, present: dict[Tensor, Tensor], factor: Bound, found_inf: bool
) -> tuple[dict[Tensor, Expected], Bound | None, bool]:
    """What each parameter is to become, the norm of all gradients, and whether the step is skipped."""
    raw = {p: Bound.of(exact(g), arithmetic_of(g.dtype)) for p, g in present.items()}
    norm = formulas.norm_of_all(list(raw.values())) * abs(factor) if raw else None
    limits = training.setup.options
    skipped = found_inf
    if norm is not None and training.options_of_all & {"skip"}:
        skipped = verdict(training, norm, found_inf)
    keras = {name: limits.get(name) for name in ("clipvalue", "clipnorm", "global_clipnorm")}
    if any(bound is not None for bound in keras.values()):
        copies = formulas.keras_clipped([g * factor for g in raw.values()], keras)
        clipped = {p: g.read_in(arithmetic_of(p.dtype)) for p, g in zip(raw, copies)}
    else:
        clipped = {p: g.read_in(arithmetic_of(p.dtype)) * factor for p, g in raw.items()}
    if norm is not None and limits.get("max_grad_norm") not in (None, np.inf):
        clip = formulas.clip_factor(norm, limits["max_grad_norm"])
        clipped = {p: g * clip for p, g in clipped.items()}
    begun = max(training.counts.values(), default=0.0) if training.shares_counts else 0.0
    advance = 1.0 if present and not skipped else 0.0
    expected = {}
    for p, group in training.pairs:
        state, options = settled(training, p, group, p in present), options_for(training, p, group)
        old = weight_of(p, state, options["master_weights"])
        exactly = Bound.of(exact(old), arithmetic_of(p.dtype))
        count = training.counts.get(p, begun)
        if p in present or (training.shares_counts and state):
            count += advance
        own = Expected(exactly, dict(state), count, old=old)
        if p in present:
            # Kernels measure in the parameter's arithmetic; of clipped copies, torch measures the gradients.
            by_kernels = training.optimizer.backend != "eager" and keras["clipvalue"] is keras["clipnorm"] is None
            seen = raw[p].read_in(arithmetic_of(p.dtype)) if by_kernels else raw[p]
            own.grad_norm = (seen.norm() * abs(factor)).kept_as_square()
            if not skipped:
                # What an infinite average becomes depends on the order of operations: inf, or inf - inf. A wider one,
                # as after `model.to`, is read in the arithmetic of the parameter.
                moments = {
                    name: Bound.of(exact(t), arithmetic_of(t.dtype), np.where(np.isinf(exact(t)), np.inf, 0.0)).read_in(
                        arithmetic_of(p.dtype)
                    )
                    for name, t in state.items()
                    if t.dtype.is_floating_point
                }
                update = formulas.UPDATES[training.setup.name]
                own.weight, new = update(exactly, clipped[p], moments, int(count), options)
                new = new if p.numel() else {}  # of nothing there are no averages
                own.state |= new
                own.moved = True
        expected[p] = own
        if state:
            training.counts[p] = count
    return expected, norm, skipped


def verdict(training: Training, norm: Bound, found_inf: bool) -> bool:
    """Whether the guard skips the step; counts why."""
    limits = training.setup.options
    above = formulas.scalar(limits.get("skip_grad_norm_above") or np.inf)
    usual = training.averages.usual(limits["skip_outliers"]) if limits.get("skip_outliers") else formulas.scalar(np.inf)
    reason = None
    if not formulas.is_finite(norm):
        reason = "nonfinite"
    elif formulas.is_above(norm, above):
        reason = "grad_norm_above"
    elif formulas.is_above(norm, usual):
        reason = "outliers"
    enters = not found_inf and reason != "nonfinite" and formulas.is_above(norm, formulas.scalar(0.0))
    if reason is not None:
        training.reasons[reason] += 1
    if enters:
        training.averages.enter(norm.minimum(above).minimum(usual))
    return found_inf or reason is not None


def options_for(training: Training, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The options of an update, as numbers."""
    options = {"convention": training.setup.options.get("convention", "transformers"), **options_of(group)}
    if training.setup.name == "AdamWeightDecay":
        options["convention"] = "keras"
        options["lr"] = options["lr"] / (1.0 + training.setup.options.get("decay", 0.0) * training.iterations)
        name = dict(zip(group["params"], group["param_names"]))[p]
        if "bias" in name and training.setup.options.get("exclude_from_weight_decay"):
            options["weight_decay"] = 0.0
    return options


def state_specs(training: Training, p: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """The tensors of a state without its step, and the dtype of a new one."""
    wide = torch.promote_types(p.dtype, torch.float32)
    chosen = group["state_dtype"]
    if training.setup.name == "Adafactor":
        names = ["exp_avg_sq_row", "exp_avg_sq_col"] if p.dim() >= 2 else ["exp_avg_sq"]
        specs = dict.fromkeys(["RMS", *names], wide)
        if group["beta1"] is not None:
            specs["exp_avg"] = chosen or wide
    else:
        dtype = chosen or (wide if group["master_weights"] else p.dtype)
        names = ["exp_avg"] if training.setup.name == "Lion" else ["exp_avg", "exp_avg_sq"]
        specs = dict.fromkeys([*names, *["max_exp_avg_sq"] * bool(group.get("amsgrad"))], dtype)
    if group["master_weights"] and p.dtype in HALVES:
        specs |= {"remainder": torch.int16} if p.dtype == torch.bfloat16 else {"master_weight": torch.float32}
    random = group["stochastic_rounding"] and p.dtype in HALVES
    if random or (rounds_moments(group) and specs.get("exp_avg_sq") in HALVES):
        specs["number"] = torch.int64
    return specs


def rounds_moments(group: dict[str, Any]) -> bool:
    """True if a 16-bit average of squares is rounded at random."""
    return bool(group["master_weights"] or group["stochastic_rounding"] or group["state_dtype"] is not None)


def settled(training: Training, p: Tensor, group: dict[str, Any], wanted: bool) -> dict[str, Tensor]:
    """The state that an update finds: made if there is none, completed and converted if options ask for it."""
    state = {name: t.clone() for name, t in training.optimizer.state.get(p, {}).items() if name != "step"}
    if not state and not wanted:
        return {}
    specs = state_specs(training, p, group)
    converts = training.setup.name == "Adafactor" or rounds_moments(group)
    for name, dtype in specs.items():
        if name not in state:
            shape = tuple(p.shape)
            if name in ("RMS", "number"):
                shape = ()
            elif name == "exp_avg_sq_row":
                shape = shape[:-1]
            elif name == "exp_avg_sq_col":
                shape = shape[:-2] + shape[-1:]
            state[name] = torch.full(shape, -1 if name == "number" else 0, dtype=dtype)
            if name == "master_weight":
                state[name].copy_(p.detach())
        elif converts and dtype.is_floating_point:
            state[name] = state[name].to(dtype)
    return state
