"""AdamW in the three conventions in use: transformers', torch's and Keras'."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.elementwise import ElementwiseOptimizer
from fusedopt.interface import AdamWHyper
from fusedopt.optimizer.clipping import Guard
from fusedopt.optimizer.ranks import Ranks
from fusedopt.optimizer.tracking import Tracker
from fusedopt.precision import Precision
from fusedopt_kernels.rules import CONVENTIONS


class AdamW(ElementwiseOptimizer):
    r"""AdamW with the numbers of `transformers.AdamW` 4.34, of `torch.optim.AdamW` or of Keras' Adam with decay.

    With `convention="transformers"`, per parameter with gradient g, t counting its updates:

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g²
        p = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
        p = p - lr * weight_decay * p

    `"torch"` adds eps to sqrt(v / (1 - beta2^t)) and decays before the update; `"keras"` adds eps as transformers does,
    decays before the update, and counts t for the optimizer as a whole. The default values stay those of transformers
    whatever the convention: for torch's own defaults pass `eps=1e-8, weight_decay=1e-2`.

    On a GPU the update of all parameters is a few Triton launches without a host synchronisation; on a CPU it is
    torch's fused kernel wherever that is right. 16-bit parameters are updated in float32 arithmetic and rounded once,
    to nearest unless an option says otherwise; moments have the layout of their parameter. Gradients may have another
    floating dtype than their parameter.

    Args:
        params: parameters (float16, bfloat16, float32 or float64; any strides), named parameters, or param groups
            with options of their own.
        lr: learning rate; a float, or a tensor of one element that is read on its device at every step.
        betas: decay rates of the averages of g and g², each in [0, 1). Each of them, eps and the weight decay may be a
            tensor like lr; best in float64: 1 - beta of a float32 0.999 is off by 1e-5.
        eps: added to the root of v; >= 0.
        weight_decay: decoupled weight decay, >= 0, in units of lr.
        correct_bias: whether to correct the bias of the averages; False (as in the original BERT code) only with
            `convention="transformers"`.
        no_deprecation_warning: accepted for the original's callers, and ignored.
        amsgrad: divide by the largest v so far (state `max_exp_avg_sq`).
        maximize: ascend instead of descend.
        convention: "transformers", "torch" or "keras".
        backend: "auto" (Triton for CUDA and ROCm tensors, eager for the others), "triton" or "eager".
        max_grad_norm: clip the norm of all gradients together to it, as `torch.nn.utils.clip_grad_norm_` does but on
            the way into the update; `math.inf` only measures. The norm is `optimizer.grad_norm` afterwards.
        skip_nonfinite: skip steps whose gradients' norm is not finite, as a whole; `optimizer.skipped_steps` counts.
        skip_grad_norm_above: also skip steps whose norm is larger than this; > 0. As in the next option, the norm is
            that of `max_grad_norm`, and steps whose norm is not finite are skipped as well.
        skip_outliers: skip steps whose norm is more than so many standard deviations, > 1, above the mean of the norms
            before it. The first 100 norms only measure; then older ones weigh 1 % less with every step. A skipped norm
            enters the mean as the largest that is not skipped, so that training adapts to a lasting change of level: a
            tenfold one within about 100 steps at 3 deviations; use 3 or more. Checkpoints have mean and deviation,
            `grad_norm_average` of every group.
        master_weights: update 16-bit parameters in float32 and keep what rounding cuts off: two more bytes per
            bfloat16 parameter (state `remainder`, int16), a float32 copy of a float16 one (`master_weight`). The
            float32 weights are those of a float32 run; `fusedopt.float32_parameters` reads them.
        stochastic_rounding: round 16-bit weights up or down at random, in proportion to the distance, so that small
            updates are right on average. Excludes `master_weights`. Both change nothing for wider parameters.
        state_dtype: of the moments: torch.float32, torch.bfloat16, or None for float32 with master weights, else the
            parameter's. In 16 bits, v is rounded stochastically wherever one of these three options is used: to
            nearest, it freezes. These three can be options of a param group.
        seed: of random rounding, >= 0. The bits depend only on seed, parameter, step and element: they are the same on
            every backend, on any number of processes, and after resuming.
        track_statistics: measure every step, or every N-th for a number N: `optimizer.statistics`, see `Statistics`.
        check_ranks: before each step, have the processes that share the parameters compare gradients and options, in
            one small all-reduce, and all raise where something differs or one has raised; see the page on sharded
            models. Waits for the device. Without it, weights differ from then on where one process lacks a gradient,
            with no error unless the step adds up over processes.

    Raises:
        ValueError: an option is out of range, for the constructor or for a group, or a parameter cannot be updated.
        TypeError: an option that does not exist here, such as torch's `fused=`.

    State per parameter: `step` (0-d float64 tensor), `exp_avg`, `exp_avg_sq`, with amsgrad `max_exp_avg_sq`; what the
    options above add, and `number` (0-d int64) where rounding is random. Loads checkpoints of `torch.optim.AdamW` and
    `transformers.AdamW`.

    Sources: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101; Kingma & Ba, "Adam",
    arXiv:1412.6980; Reddi et al., "On the Convergence of Adam and Beyond", arXiv:1904.09237 (amsgrad); transformers
    4.34, `optimization.py`.

    Example:
        >>> import fusedopt, torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        >>> before = model(torch.ones(4)).item()
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> model(torch.ones(4)).item() < before
        True
    """

    rule = "adamw"
    state_options = {**ElementwiseOptimizer.state_options, "amsgrad": (False, True)}
    checks = {
        "lr": checks.learning_rate,
        "betas": checks.betas,
        "eps": checks.non_negative_option,
        "weight_decay": checks.non_negative_option,
        "correct_bias": checks.flag,
        "amsgrad": checks.flag,
        "maximize": checks.flag,
    }
    constructor_options: ClassVar[tuple[str, ...]] = (*ElementwiseOptimizer.constructor_options, "convention")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-6,
        weight_decay: float | Tensor = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        convention: str = "transformers",
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
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
        self.convention = convention
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        self.check_group(defaults)
        precision = Precision(master_weights, stochastic_rounding, state_dtype, seed)
        guard = Guard(max_grad_norm, skip_nonfinite, skip_grad_norm_above, skip_outliers)
        tracker, ranks = Tracker(track_statistics), Ranks(check_ranks)
        super().__init__(params, defaults, backend, unknown, guard, precision, tracker, ranks)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not group["correct_bias"] and self.convention != "transformers":
            raise ValueError(
                f"correct_bias=False goes with convention='transformers' alone, got convention={self.convention!r}"
            )

    def hyper(self, group: dict[str, Any]) -> AdamWHyper:
        beta1, beta2 = group["betas"]
        return AdamWHyper(
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["correct_bias"],
            group["amsgrad"],
            group["maximize"],
            CONVENTIONS[self.convention],
        )

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + group["amsgrad"]]

    def whole_options(self) -> dict[str, Any]:
        return {**super().whole_options(), "convention": self.convention}

    def shares_steps(self) -> bool:
        return CONVENTIONS[self.convention].shared_steps
