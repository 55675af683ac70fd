"""Clipping and skipping: nothing is written to gradients, nothing waits for a device.

`Guard` clips as `torch.nn.utils.clip_grad_norm_` does, and skips steps; `Clipping` clips as Keras does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedopt import sharding
from fusedopt.backends.eager.norms import norms
from fusedopt.backends.graphs import capturing
from fusedopt.checks import finite_non_negative, flag, number
from fusedopt.interface import ReduceDims, StepArgs
from fusedopt.optimizer.skipped import SkippedSteps
from fusedopt.without_data import has_data
from fusedopt_kernels import rules
from fusedopt_kernels.memory import outside_inference_mode

Gradients = list[list[Tensor | None]]
"""One row per param group, one place per parameter."""


AVERAGE = "grad_norm_average"
"""Where the groups of an optimizer with `skip_outliers` keep the count, mean and variance of norms for checkpoints."""

_MOMENTS = 3
"""Those are so many numbers."""

_SKIPPING = {"skip_nonfinite": False, "skip_grad_norm_above": None, "skip_outliers": None}
"""The options that skip steps, by name; their values that skip none."""


class Verdict(Protocol):
    """Whether a step is skipped."""

    def prepare(
        self, norm: Tensor, found_inf: Tensor | None, ledger: Tensor, limits: rules.Limits
    ) -> tuple[Tensor, Callable[[], object]]:
        """Returns where the verdict will stand, see `fusedopt_kernels.verdict`, and what writes it."""


class Guarded(NamedTuple):
    """What a `Guard` makes of a step.

    Attributes:
        args: the arguments of the step.
        write: brings `grad_norm` and the ledger up to date, and what makes the step skip; takes no memory.
        undo: takes that back.
    """

    args: StepArgs
    write: Callable[[], object]
    undo: Callable[[], object]


class Guard:
    """Clipping by the common norm of all gradients, and skipping of steps by it.

    Everything stays on the device; nothing is written to the gradients. The norm is the root of a float64 sum of
    squares: above 1e154, where only float64 gradients can be, it is inf.

    Attributes:
        max_grad_norm: bound on the norm; None: it is not computed for clipping.
        skip_nonfinite: whether a step with a norm that is not finite changes nothing.
        skip_grad_norm_above: the same for a larger norm than this; None: for none.
        skip_outliers: the same for a norm that is more than so many standard deviations above the mean; None: for none.
        grad_norm: norm of the last step's gradients before clipping, unscaled; 0-d float64. None before the first.
    """

    def __init__(
        self,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm_above: float | None = None,
        skip_outliers: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not number("max_grad_norm", max_grad_norm) > 0.0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm!r}; math.inf only measures")
        flag("skip_nonfinite", skip_nonfinite)
        if skip_grad_norm_above is not None:
            _finite_above("skip_grad_norm_above", skip_grad_norm_above, 0)
        if skip_outliers is not None:
            _finite_above("skip_outliers", skip_outliers, 1)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.skip_grad_norm_above = skip_grad_norm_above
        self.skip_outliers = skip_outliers
        self.grad_norm: Tensor | None = None
        self._ledger: Tensor | None = None  # see `fusedopt_kernels.verdict`

    def __setstate__(self, state: dict[str, Any]) -> None:
        Guard.__init__(self)  # an older pickle lacks some options
        self.__dict__.update({name: value for name, value in state.items() if name in self.__dict__})

    def __bool__(self) -> bool:
        return self.option() is not None

    @property
    def skips(self) -> bool:
        """True if there is a norm with which a step is skipped."""
        return self.skip_nonfinite or self.skip_grad_norm_above is not None or self.skip_outliers is not None

    @property
    def skipped_steps(self) -> SkippedSteps | None:
        """How many steps were skipped, and why; None before the first step."""
        return None if self._ledger is None else SkippedSteps(self._ledger[: len(rules.REASONS)])

    def option(self) -> str | None:
        """Returns the option that needs all gradients at once, as `name=value`; None without one."""
        for name, off in (("max_grad_norm", None), *_SKIPPING.items()):
            value = getattr(self, name)
            if value is not off:
                return f"{name}={value!r}"
        return None

    def options(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {name: getattr(self, name) for name in ("max_grad_norm", *_SKIPPING)}

    def __call__(
        self,
        squares: list[Tensor],
        args: StepArgs,
        verdict_on: Callable[[torch.device], Verdict],
        undoable: bool = False,
    ) -> Guarded:
        """Returns a step whose gradients have these sums of squares, one tensor per device; it is not written yet.

        `verdict_on` returns what judges norms on a device; with `undoable`, the ledger can be brought back.
        """
        home = squares[0].device
        total = squares[0].sum() if len(squares) == 1 else torch.stack([s.sum().to(home) for s in squares]).sum()
        norm = total.sqrt()
        for factor in (args.scale, None if args.grad_scale is None else 1.0 / args.grad_scale.double()):
            if isinstance(factor, Tensor):
                norm = norm * factor.to(home, torch.float64, non_blocking=True).abs()
            elif factor is not None and factor != 1.0:
                norm = norm * abs(factor)
        with outside_inference_mode():
            kept_norm = norm.clone() if norm.is_inference() else norm
        before = self.grad_norm, self._ledger
        ledger = saved = None
        write_verdict: Callable[[], object] | None = None
        if self.skips:
            found = args.found_inf
            found = None if found is None else found.to(home, torch.float32, non_blocking=True)
            ledger = self._ledger_on(home)
            saved = ledger.clone() if undoable else None
            flag, write_verdict = verdict_on(home).prepare(kept_norm, found, ledger, self._limits())
            args = args._replace(found_inf=flag)
        if self.max_grad_norm is not None and self.max_grad_norm < math.inf:
            factor = rules.clip_factor(norm, self.max_grad_norm, torch.clamp_max)
            scale = args.scale.to(home, non_blocking=True) if isinstance(args.scale, Tensor) else args.scale
            args = args._replace(scale=factor * scale)

        def write() -> None:
            self.grad_norm, self._ledger = kept_norm, before[1] if ledger is None else ledger
            if write_verdict is not None:
                write_verdict()

        def undo() -> None:
            if ledger is not None and saved is not None:
                ledger.copy_(saved)
            self.grad_norm, self._ledger = before

        return Guarded(args, write, undo)

    def _limits(self) -> rules.Limits:
        above, deviations = (
            math.inf if limit is None else float(limit) for limit in (self.skip_grad_norm_above, self.skip_outliers)
        )
        return rules.Limits(above, deviations)

    def _ledger_on(self, device: torch.device) -> Tensor:
        ledger = self._ledger
        if ledger is None or ledger.device != device:
            if capturing(device):
                raise RuntimeError(
                    "a CUDA graph is being captured before the optimizer counts skipped steps on its device, and every "
                    "replay would begin anew: take one step before the capture"
                )
            with outside_inference_mode():
                size = len(rules.REASONS) + _MOMENTS
                new = torch.zeros(size, dtype=torch.float64, device=device)
                ledger = new if ledger is None else new.copy_(ledger)
        return ledger

    # The averages of norms in checkpoints.

    def save(self, groups: list[dict[str, Any]]) -> None:
        """Brings the averages in the groups up to date, for `skip_outliers`; waits for the device."""
        if self.skip_outliers is not None:
            moments = [0.0] * _MOMENTS if self._ledger is None else self._ledger[-_MOMENTS:].tolist()
            for group in groups:
                group[AVERAGE] = tuple(moments)

    def loaded(self, groups: list[dict[str, Any]]) -> Callable[[], object]:
        """Returns what goes on from the averages in the groups, if there are any; it takes no memory."""
        saved = groups[0].get(AVERAGE) if groups else None
        if saved is None or self.skip_outliers is None:
            return lambda: None
        # Not later: a capture may come next.
        params = [p for group in groups for p in group["params"]]
        home = params[0].device if params and has_data(params[0]) else torch.device("cpu")
        ledger = self._ledger_on(home) if self._ledger is None else self._ledger
        moments = torch.tensor(saved, dtype=torch.float64, device="cpu")

        def load() -> None:
            self._ledger = ledger
            with torch.no_grad():
                ledger[-_MOMENTS:].copy_(moments)

        return load


def _finite_above(name: str, value: Any, least: int) -> None:
    if not least < number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and > {least}, or None, got {value!r}")


def check_average(group: dict[str, Any]) -> None:
    """Raises ValueError for averages of norms that no steps can have left in a group."""
    saved = group.get(AVERAGE, (0.0,) * _MOMENTS)
    if (
        not isinstance(saved, (tuple, list))
        or len(saved) != _MOMENTS
        or any(type(x) not in (int, float) or not 0.0 <= x < math.inf for x in saved)
    ):
        raise ValueError(f"{AVERAGE} must be the count, mean and variance of norms, got {saved!r}")


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
        scale = args.scale if args.grad_scale is None else args.scale / args.grad_scale.double()
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
