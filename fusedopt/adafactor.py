"""Adafactor with the numbers of transformers': a second moment of one row and one column per matrix."""

import math
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.interface import AdafactorHyper, Reads, fmax
from fusedopt.optimizer.base import FusedOptimizer
from fusedopt.optimizer.clipping import Guard
from fusedopt.optimizer.ranks import Ranks
from fusedopt.optimizer.tracking import Tracker
from fusedopt.precision import Precision, StateSpec


def _eps(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(
            f"{name} must be a pair (added to the squared gradient, smallest root mean square of a parameter), "
            f"got {value!r}"
        )
    for i, one in enumerate(value):
        checks.non_negative_option(f"{name}[{i}]", one)


def _clip_threshold(name: str, value: Any) -> None:
    if checks.number(name, value) <= 0.0 or math.isnan(value):
        raise ValueError(f"{name} must be > 0, got {value!r}; math.inf never clips")


def _decay_rate(name: str, value: Any) -> None:
    if not -math.inf < checks.number(name, value) <= 0.0:
        raise ValueError(f"{name} must be finite and <= 0 (the average keeps 1 - step**{name}), got {value!r}")


def _beta1(name: str, value: Any) -> None:
    if value is not None:
        checks.beta_option(name, value)


class Adafactor(FusedOptimizer):
    r"""Adafactor with the numbers of `transformers.Adafactor`, whose arguments it takes.

    Per parameter with gradient g, k counting its updates from 1:

        rate = min(1e-2, 1 / sqrt(k))                    # relative_step; min(1e-6 * k, ...) with warmup_init; else lr
        rate = rate * max(eps[1], RMS(p))                # scale_parameter
        w    = k^decay_rate                              # 1 at the first update
        R    = (1 - w) * R + w * mean(g² + eps[0], over columns)
        C    = (1 - w) * C + w * mean(g² + eps[0], over rows)
        u    = g / sqrt(C) * sqrt(mean(R) / R)           # fewer than two dimensions: g / sqrt(average of g² + eps[0])
        u    = rate * u / max(1, RMS(u) / clip_threshold)
        m    = beta1 * m + (1 - beta1) * u;  u = m       # beta1 is not None
        p    = p - rate * weight_decay * p - u

    Rows and columns are the last two dimensions; leading ones are a batch of matrices that share RMS and clipping.
    The state is a row and a column per matrix: nothing of the parameter's size unless `beta1` is set or the parameter
    has fewer than two dimensions. 16-bit parameters are updated in float32 and rounded once, to nearest unless an
    option says otherwise; their state is float32 and stays float32 through a checkpoint.

    Args:
        params: parameters (float16, bfloat16, float32 or float64; any strides), named parameters, or param groups
            with options of their own.
        lr: learning rate, a float or a tensor of one element; needs `relative_step=False`, which needs it. None:
            relative steps.
        eps: pair (added to the squared gradient; smallest root mean square of a parameter that `scale_parameter`
            uses), both >= 0. Each of them, beta1 and the weight decay may be a tensor as in `AdamW`.
        clip_threshold: largest root mean square of an update before the rate; > 0, `math.inf` never clips.
        decay_rate: exponent <= 0 of the weight that a new square has in its average; 0 keeps no average.
        beta1: decay rate in [0, 1) of the average of updates, rate included, without bias correction; None: no
            average, and no state for it. 0.0 counts as set.
        weight_decay: decoupled weight decay, >= 0, in units of the rate.
        scale_parameter: whether the rate is multiplied by the parameter's root mean square.
        relative_step: whether the rate is that of the formula above instead of lr.
        warmup_init: with `relative_step`: rates that rise from 1e-6.
        maximize: ascend instead of descend.
        backend: "auto" (Triton for CUDA and ROCm tensors, eager for the others), "triton" or "eager".
        max_grad_norm: clip the norm of all gradients together to it, as in `AdamW`. The paper's authors leave it out:
            `clip_threshold` does that job here, after the second moment.
        skip_nonfinite, skip_grad_norm_above, skip_outliers: skip steps by that norm, as in `AdamW`.
        master_weights, stochastic_rounding, seed, track_statistics, check_ranks: as in `AdamW`.
        state_dtype: of the average of updates, as in `AdamW`; the averages of squares, which are small, stay float32.

    Raises:
        ValueError: an option is out of range, or a combination makes no sense, for the constructor or for a group; or
            a parameter cannot be updated.
        TypeError: an option that does not exist here, such as torch's `foreach=`.

    State per parameter, of shape [...batch, n, m]: `step` and `RMS` (0-d; RMS is that of the parameter before the last
    update and is kept up to date where `scale_parameter` is set), `exp_avg_sq_row` [...batch, n], `exp_avg_sq_col`
    [...batch, m], or `exp_avg_sq` for fewer than two dimensions; with beta1 `exp_avg`. float32, for float64 parameters
    float64 (`step` is always float64). Loads the checkpoints of the original.

    Departures from the original: values it accepts and that make no sense are refused (lr < 0, eps < 0 or not a pair,
    clip_threshold None or <= 0, decay_rate > 0, beta1 outside [0, 1), weight_decay < 0, relative_step=False without
    lr), in param groups too; RMS is computed only where `scale_parameter` needs it; the state of 16-bit parameters is
    not rounded to 16 bits when it is loaded; an update does not become NaN because the product of its two factors
    overflows; a closure runs with gradients enabled.

    Sources: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235;
    transformers 4.34, `optimization.py`.

    Example:
        >>> import fusedopt, torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = fusedopt.Adafactor(model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)
        >>> before = model(torch.ones(4)).item()
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> model(torch.ones(4)).item() < before
        True
    """

    rule = "adafactor"
    adds_up_over_shards = True
    state_options = {**FusedOptimizer.state_options, "beta1": (None, 0.0)}
    checks = {
        "eps": _eps,
        "clip_threshold": _clip_threshold,
        "decay_rate": _decay_rate,
        "beta1": _beta1,
        "weight_decay": checks.non_negative_option,
        "scale_parameter": checks.flag,
        "relative_step": checks.flag,
        "warmup_init": checks.flag,
        "maximize": checks.flag,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        eps: tuple[float | Tensor, float | Tensor] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | Tensor | None = None,
        weight_decay: float | Tensor = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        maximize: bool = False,
        backend: str = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm_above: float | None = None,
        skip_outliers: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        track_statistics: bool | int = False,
        check_ranks: bool = False,
        **unknown: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "maximize": maximize,
        }
        _check_lr_is_meant(defaults)
        # Each group may bring the lr that the constructor lacks.
        self.check_group({**defaults, "lr": 0.0} if lr is None else defaults)
        precision = Precision(master_weights, stochastic_rounding, state_dtype, seed)
        guard = Guard(max_grad_norm, skip_nonfinite, skip_grad_norm_above, skip_outliers)
        tracker, ranks = Tracker(track_statistics), Ranks(check_ranks)
        super().__init__(params, defaults, backend, unknown, guard, precision, tracker, ranks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            _check_lr_is_meant({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError("warmup_init=True needs relative_step=True: it says how relative steps begin")
        if group["relative_step"]:
            return  # an lr here is what a schedule shows or a checkpoint tool left, and has no effect
        if group["lr"] is None:
            raise ValueError("relative_step=False needs an lr, got lr=None; pass one, such as lr=1e-3")
        checks.learning_rate("lr", group["lr"])

    def hyper(self, group: dict[str, Any]) -> AdafactorHyper:
        return AdafactorHyper(
            None if group["relative_step"] else group["lr"],
            group["eps"][0],
            group["eps"][1],
            group["clip_threshold"],
            group["decay_rate"],
            group["beta1"],
            group["weight_decay"],
            group["scale_parameter"],
            group["warmup_init"],
            group["maximize"],
        )

    def moments(self, p: Tensor, group: dict[str, Any]) -> dict[str, StateSpec]:
        dtype = torch.promote_types(p.dtype, torch.float32)
        specs = {"RMS": StateSpec(dtype, without="all")}
        if p.dim() >= 2:
            specs |= {"exp_avg_sq_row": StateSpec(dtype, without=-1), "exp_avg_sq_col": StateSpec(dtype, without=-2)}
        else:
            specs["exp_avg_sq"] = StateSpec(dtype)
        # The averages of squares are small; the average of updates has the size of the parameter.
        return specs if group["beta1"] is None else {**specs, "exp_avg": StateSpec(group["state_dtype"] or dtype)}

    def reads(self, group: dict[str, Any]) -> Reads:
        # Gradients for their sums, the size of the update, and the update; weights for their size and the update.
        return Reads(gradient=3, weight=2 if group["scale_parameter"] else 1)

    def effective_lr(self, p: Tensor, before: float = 0.0) -> float | Tensor:
        """The learning rate that the last update of `p` used, parameter scale included.

        Args:
            p: a parameter of this optimizer.
            before: what to return if `p` was never updated.

        Returns:
            A float for a parameter on the CPU; elsewhere a 0-d float32 tensor on its device, so that asking does not
            synchronise. With a given lr that was changed since the update, it is the rate of the present lr.

        Raises:
            ValueError: `p` is not a parameter of this optimizer.

        Example:
            >>> import fusedopt, torch
            >>> w = torch.nn.Parameter(torch.full((2, 2), 0.5))
            >>> w.grad = torch.ones(2, 2)
            >>> optimizer = fusedopt.Adafactor([w])
            >>> optimizer.step()
            >>> optimizer.effective_lr(w)
            0.005
        """
        for group in self.param_groups:
            if any(p is q for q in group["params"]):
                return self.rate_in(group, p, before)
        raise ValueError(f"a tensor of shape {tuple(p.shape)} is not a parameter of this optimizer")

    def rate_in(self, group: dict[str, Any], p: Tensor, before: float) -> float | Tensor:
        """`effective_lr` of a parameter whose group is known."""
        state = self.state.get(p)
        if not state:
            return before
        hyper = self.hyper(group)
        if p.device.type != "cpu":
            return rate_on_device(hyper, state["step"], state["RMS"], before)
        step = state["step"].item()
        return float(hyper.rate(step, state["RMS"].item())) if step > 0.0 else before


def rate_on_device(hyper: AdafactorHyper, step: Tensor, rms: Tensor, before: float) -> Tensor:
    """The rate of update number `step` as a 0-d tensor, `before` if it is 0. Waits for no device."""
    rate = hyper.rate(step, rms.double(), torch.sqrt, torch.minimum, fmax)
    rate = torch.as_tensor(rate, dtype=torch.float32, device=step.device)
    return torch.where(step > 0.0, rate.reshape(()), before)


def _check_lr_is_meant(options: dict[str, Any]) -> None:
    """Raises for an lr with relative steps. Not asked again: tools that save and show set `group["lr"]` later."""
    if options["relative_step"] and options["lr"] is not None:
        raise ValueError(
            f"lr={options['lr']!r} has no effect with relative_step=True: pass relative_step=False with it, or lr=None"
        )
