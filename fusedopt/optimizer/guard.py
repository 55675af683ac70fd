"""Guard: what a step learns of all gradients together before it updates anything: their norm, and whether to skip."""

import math

import torch
from torch import Tensor

from fusedopt.batch import Control
from fusedopt.checks import flag, number
from fusedopt_kernels import rules
from fusedopt_kernels.memory import outside_inference_mode


class Guard:
    """Clipping by the common norm of all gradients, and skipping of steps whose gradients are not finite.

    Everything stays on the device; nothing is written to the gradients.

    Attributes:
        max_grad_norm: bound on the norm; None: it is not computed for clipping.
        skip_nonfinite: whether a step with a norm that is not finite changes nothing.
        grad_norm: norm of the last step's gradients before clipping, unscaled; 0-d float64. None before the first.
        skipped_steps: how many steps were skipped by `skip_nonfinite`; 0-d float64. None before the first step.
    """

    def __init__(self, max_grad_norm: float | None = None, skip_nonfinite: bool = False) -> None:
        if max_grad_norm is not None and not number("max_grad_norm", max_grad_norm) > 0.0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm!r}; math.inf only measures")
        flag("skip_nonfinite", skip_nonfinite)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor | None = None

    def __bool__(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    def option(self) -> str | None:
        """The option that needs all gradients at once, as `name=value`; None if there is none."""
        if self.max_grad_norm is not None:
            return f"max_grad_norm={self.max_grad_norm!r}"
        return "skip_nonfinite=True" if self.skip_nonfinite else None

    def __call__(self, squares: list[Tensor], control: Control) -> Control:
        """The control of a step whose gradients have these sums of squares, one tensor per device."""
        home = squares[0].device
        total = squares[0].sum() if len(squares) == 1 else torch.stack([s.sum().to(home) for s in squares]).sum()
        norm = total.sqrt()
        for factor in (control.scale, None if control.grad_scale is None else 1.0 / control.grad_scale.double()):
            if isinstance(factor, Tensor):
                norm = norm * factor.to(home, torch.float64, non_blocking=True).abs()
            elif factor is not None and factor != 1.0:
                norm = norm * abs(factor)
        with outside_inference_mode():
            self.grad_norm = norm.clone() if norm.is_inference() else norm
        if self.skip_nonfinite:
            control = control._replace(found_inf=self._skips(norm, control.found_inf))
        if self.max_grad_norm is not None and self.max_grad_norm < math.inf:
            factor = rules.clip_factor(norm, self.max_grad_norm, torch.clamp_max)
            scale = control.scale.to(home, non_blocking=True) if isinstance(control.scale, Tensor) else control.scale
            control = control._replace(scale=factor * scale)
        return control

    def _skips(self, norm: Tensor, found_inf: Tensor | None) -> Tensor:
        skips = (~norm.isfinite()).to(torch.float32)
        if self.skipped_steps is None:
            with outside_inference_mode():
                self.skipped_steps = torch.zeros_like(norm)
        self.skipped_steps += skips
        return skips if found_inf is None else skips + found_inf.to(norm.device, torch.float32, non_blocking=True)
