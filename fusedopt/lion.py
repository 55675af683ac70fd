"""Lion: the sign of an average of gradients, and one state per parameter."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.elementwise import ElementwiseOptimizer
from fusedopt.interface import Number
from fusedopt.optimizer.clipping import Guard
from fusedopt.optimizer.ranks import Ranks
from fusedopt.optimizer.tracking import Tracker
from fusedopt.precision import Precision


class LionHyper(NamedTuple):
    """Hyper-parameters of one set of parameters, as the backends get them."""

    lr: Number
    beta1: Number
    beta2: Number
    weight_decay: Number
    maximize: bool


class Lion(ElementwiseOptimizer):
    r"""Lion. Per parameter with gradient g:

        p = p - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * p)
        m = beta2 * m + (1 - beta2) * g

    The sign of 0 is 0, that of NaN is NaN. All elements move by lr, so that it is three to ten times smaller than
    AdamW's, and the weight decay as much larger. 16-bit parameters are updated in float32 and rounded once, to
    nearest unless an option says otherwise.

    Args:
        params: parameters (float16 to float64; any strides), named parameters, or param groups with their own options.
        lr: learning rate; a float, or a tensor of one element that is read on its device at every step.
        betas: weights in [0, 1) of m where its sign is taken, and in the next m. Each, as the weight decay, may be a
            tensor as in `AdamW`.
        weight_decay: decoupled weight decay, >= 0, in units of lr.
        maximize: ascend instead of descend.
        backend, max_grad_norm, skip_nonfinite, skip_grad_norm_above, skip_outliers: as in `AdamW`.
        master_weights, stochastic_rounding, state_dtype, seed, track_statistics, check_ranks: as in `AdamW`.

    Raises:
        ValueError: an option is out of range, for the constructor or for a group, or a parameter cannot be updated.
        TypeError: an option that does not exist here.

    State per parameter: `step` (0-d float64 tensor) and `exp_avg`, in the parameter's shape and layout, and in its
    dtype unless an option says otherwise; what the options add, as in `AdamW`.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.

    Example:
        >>> import fusedopt, torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
        >>> w.grad = torch.tensor([3.0, 0.0, -0.5])
        >>> fusedopt.Lion([w], lr=0.25).step()
        >>> w.tolist()
        [0.75, 1.0, 1.25]
    """

    rule = "lion"
    checks = {
        "lr": checks.learning_rate,
        "betas": checks.betas,
        "weight_decay": checks.non_negative_option,
        "maximize": checks.flag,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
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
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        self.check_group(defaults)
        precision = Precision(master_weights, stochastic_rounding, state_dtype, seed)
        guard = Guard(max_grad_norm, skip_nonfinite, skip_grad_norm_above, skip_outliers)
        tracker, ranks = Tracker(track_statistics), Ranks(check_ranks)
        super().__init__(params, defaults, backend, unknown, guard, precision, tracker, ranks)

    def hyper(self, group: dict[str, Any]) -> LionHyper:
        beta1, beta2 = group["betas"]
        return LionHyper(group["lr"], beta1, beta2, group["weight_decay"], group["maximize"])

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg",)
