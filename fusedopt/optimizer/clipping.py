"""Clipping and skipping: nothing is written to gradients, nothing waits for a device.

`Guard` clips as `torch.nn.utils.clip_grad_norm_` does, and skips steps; `Clipping` clips as Keras does.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt import sharding
from fusedopt.backends.eager.norms import norms
from fusedopt.checks import finite_non_negative, flag, number
from fusedopt.interface import ReduceDims, StepArgs
from fusedopt_kernels import rules
from fusedopt_kernels.memory import outside_inference_mode

Gradients = list[list[Tensor | None]]
"""One row per param group, one place per parameter."""


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
        """Returns the option that needs all gradients at once, as `name=value`; None without one."""
        if self.max_grad_norm is not None:
            return f"max_grad_norm={self.max_grad_norm!r}"
        return "skip_nonfinite=True" if self.skip_nonfinite else None

    def __call__(self, squares: list[Tensor], args: StepArgs) -> StepArgs:
        """Returns the arguments for a step whose gradients have these sums of squares, one tensor per device."""
        home = squares[0].device
        total = squares[0].sum() if len(squares) == 1 else torch.stack([s.sum().to(home) for s in squares]).sum()
        norm = total.sqrt()
        for factor in (args.scale, None if args.grad_scale is None else 1.0 / args.grad_scale.double()):
            if isinstance(factor, Tensor):
                norm = norm * factor.to(home, torch.float64, non_blocking=True).abs()
            elif factor is not None and factor != 1.0:
                norm = norm * abs(factor)
        with outside_inference_mode():
            self.grad_norm = norm.clone() if norm.is_inference() else norm
        if self.skip_nonfinite:
            args = args._replace(found_inf=self._skips(norm, args.found_inf))
        if self.max_grad_norm is not None and self.max_grad_norm < math.inf:
            factor = rules.clip_factor(norm, self.max_grad_norm, torch.clamp_max)
            scale = args.scale.to(home, non_blocking=True) if isinstance(args.scale, Tensor) else args.scale
            args = args._replace(scale=factor * scale)
        return args

    def _skips(self, norm: Tensor, found_inf: Tensor | None) -> Tensor:
        skips = (~norm.isfinite()).to(torch.float32)
        if self.skipped_steps is None:
            with outside_inference_mode():
                self.skipped_steps = torch.zeros_like(norm)
        self.skipped_steps += skips
        return skips if found_inf is None else skips + found_inf.to(norm.device, torch.float32, non_blocking=True)


class Clipping(NamedTuple):
    """The clippings that a step applies, in this order; None leaves one out.

    Attributes:
        clipvalue: every element is brought into [-clipvalue, clipvalue].
        clipnorm: every tensor's norm is brought down to it.
        global_clipnorm: the norm of all gradients together is brought down to it.
    """

    clipvalue: float | None = None
    clipnorm: float | None = None
    global_clipnorm: float | None = None

    def check(self) -> None:
        """Raises ValueError for a negative bound and for both norms at once."""
        for name, bound in self._asdict().items():
            if bound is not None:
                finite_non_negative(name, bound)
        if self.clipnorm is not None and self.global_clipnorm is not None:
            raise ValueError(
                f"clipnorm={self.clipnorm!r} and global_clipnorm={self.global_clipnorm!r} exclude each other: pass one"
            )

    def clip(self, grads: Gradients, args: StepArgs) -> tuple[Gradients, StepArgs]:
        """Returns the gradients and the arguments that a step uses instead of these."""
        if all(bound is None for bound in self):
            return grads, args
        scale = args.scale if args.grad_scale is None else args.scale / args.grad_scale
        grads, scale = self(grads, scale)
        return grads, args._replace(scale=scale, grad_scale=None)

    def __call__(self, grads: Gradients, scale: float | Tensor = 1.0) -> tuple[Gradients, float | Tensor]:
        """The gradients and the factor on them that a step works with instead of `grads` and `scale`.

        The clipped gradients are those of `scale * grads`. Clipping by the common norm changes the factor and leaves
        the gradients; by value or by tensor, they are copied (in float32 where they have 16 bits).

        Args:
            grads: dense gradients, which are not written to.
            scale: their factor, a number or a tensor of one element.

        Returns:
            Gradients and factor; the factor is a tensor where it depends on a norm.

        Example:
            >>> g = torch.tensor([3.0, 4.0])
            >>> Clipping(global_clipnorm=1.0)([[g, None]])
            ([[tensor([3., 4.]), None]], tensor(0.2000, dtype=torch.float64))
            >>> Clipping(clipvalue=3.5)([[g, None]])
            ([[tensor([3.0000, 3.5000]), None]], 1.0)
        """
        flat = [g for row in grads for g in row if g is not None]
        if not flat or all(bound is None for bound in self):
            return grads, scale
        over: list[ReduceDims] = [()] * len(flat)
        if sharding.any_sharded(flat):
            over, flat = [sharding.spread(g) for g in flat], [sharding.shard(g) for g in flat]
        homes = {g.device for g in flat}
        if isinstance(scale, Tensor):
            scale = scale.item() if scale.device.type == "cpu" else scale.reshape(())
        copied = flat
        if isinstance(scale, Tensor) and homes != {scale.device}:
            copied, scale = _scaled(flat, scale), 1.0
        if self.clipvalue is not None:
            copied, scale = _clip_values(_wide(copied), scale, self.clipvalue), 1.0
        if self.clipnorm is not None:
            factors = [_factor(norm, scale, self.clipnorm) for norm in _norms(copied, over)]
            copied, scale = list(torch._foreach_mul(_wide(copied), factors)), 1.0
        if self.global_clipnorm is not None:
            each = _norms(copied, over)
            together = torch.stack([norm.to(each[0].device, non_blocking=True) for norm in each])
            scale = _factor(torch.linalg.vector_norm(together), scale, self.global_clipnorm)
            if len(homes) > 1:
                copied, scale = _scaled(copied, scale), 1.0
        if copied is flat:
            return grads, scale
        remaining = iter(copied)
        return [[g if g is None else next(remaining) for g in row] for row in grads], scale


def _scaled(grads: list[Tensor], scale: Tensor) -> list[Tensor]:
    """For gradients on several devices: a factor is read on the device of the gradient that it is for."""
    return [g * scale.to(g.device, non_blocking=True) for g in _wide(grads)]


def _wide(grads: list[Tensor]) -> list[Tensor]:
    """float32 for 16-bit gradients, which clipping would round a second time; the others as they are."""
    return [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]


def _norms(grads: list[Tensor], over: Sequence[ReduceDims]) -> list[Tensor]:
    """Each tensor's norm, 0-d float64, over all processes that have a share of it."""
    own = norms(grads)
    return (
        [square.sqrt() for square in sharding.all_reduce_sums(list(zip(map(torch.square, own), over)))]
        if any(over)
        else own
    )


def _clip_values(grads: list[Tensor], scale: float | Tensor, bound: float) -> list[Tensor]:
    if isinstance(scale, Tensor) or scale != 1.0:
        grads = list(torch._foreach_mul(grads, scale))
    clipped = list(torch._foreach_clamp_min(grads, -bound))
    torch._foreach_clamp_max_(clipped, bound)
    return clipped


def _factor(norm: Tensor, scale: float | Tensor, bound: float) -> Tensor:
    """The factor that brings gradients of this norm, times `scale`, down to `bound`; NaN if not finite, as in Keras."""
    size = norm * scale
    largest = size.abs().clamp_min(max(bound, torch.finfo(norm.dtype).tiny))
    return scale * (bound / largest) + (size - size)
