# mypy: allow-untyped-defs
"""Whether a step is skipped: one launch of one program, between the norm of the gradients and the update."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels import rules
from fusedopt_kernels.device import device_function, maximum, minimum, sqrt_rn, where

_skip_verdict = device_function(rules.skip_verdict)

_REASONS = tl.constexpr(len(rules.REASONS))


@triton.jit(do_not_specialize_on_alignment=["norm", "found_inf", "ledger", "flag"])
def judge(norm, found_inf, ledger, flag, LIMITS: tl.constexpr):
    """The verdict on one norm, which goes into the ledger."""
    found = tl.full([], 0.0, tl.float32)
    if found_inf is not None:
        found = tl.load(found_inf)
    moments = ledger + _REASONS
    reason, count, mean, variance = _skip_verdict(
        tl.load(norm),
        found == 0.0,
        tl.load(moments),
        tl.load(moments + 1),
        tl.load(moments + 2),
        tl.full([], LIMITS.above, tl.float64),
        tl.full([], LIMITS.deviations, tl.float64),
        tl.full([], LIMITS.warm_up, tl.float64),
        tl.full([], LIMITS.least_weight, tl.float64),
        tl.full([], LIMITS.least_spread, tl.float64),
        where,
        sqrt_rn,
        minimum,
        maximum,
    )
    skipped = ledger + tl.maximum(reason.to(tl.int32) - 1, 0)
    number = tl.load(skipped) + (reason > 0.0).to(tl.float64)
    tl.debug_barrier()  # All threads have read what one of them now writes.
    tl.store(skipped, number)
    tl.store(moments, count)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, variance)
    tl.store(flag, tl.where(reason > 0.0, reason.to(tl.float32), found))


def verdict(
    norm: Tensor, found_inf: Tensor | None, ledger: Tensor, limits: rules.Limits, flag: Tensor | None = None
) -> Tensor:
    """Returns a 0-d float32 tensor that is not 0 if the step is skipped: the reason, else what `found_inf` has.

    Args:
        norm: of the gradients, 0-d float64.
        found_inf: 0-d float32; None for 0.
        ledger: float64, how many steps were skipped for each of `rules.REASONS`, and the count, mean and variance of
            norms; brought up to date.
        limits: what the verdict goes by.
        flag: memory for what is returned; None: it is made.
    """
    if flag is None:
        flag = torch.empty((), dtype=torch.float32, device=norm.device)
    judge[(1,)](norm, found_inf, ledger, flag, limits, num_warps=1, enable_fp_fusion=False)
    return flag
