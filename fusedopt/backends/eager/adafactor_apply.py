"""The end of an update of Adafactor by the rules, for a stack of whole parameters as for one shard."""

from typing import Any

import torch
from torch import Tensor

from fusedopt.batch import AdafactorHyper, number_maximum
from fusedopt_kernels import rules


def applied(
    hyper: AdafactorHyper, step: float, p: Tensor, update: Tensor, update_rms: Tensor, rms: Any, average: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The new parameter, and the update that is taken off it but for the decay: the new average, where there is one.

    Args:
        hyper: the hyper-parameters.
        step: number of the update, from 1.
        p: the parameter, at least in float32.
        update: before clipping.
        update_rms: its root mean square, in a shape that broadcasts with it.
        rms: that of the parameter; any number without `scale_parameter`.
        average: of updates, None without `beta1`.
    """
    rate: Any = hyper.rate(step, rms, number_maximum=number_maximum)
    divisor = rules.clip_divisor(update_rms, hyper.clip_threshold, torch.clamp)
    update = update * ((-rate if hyper.maximize else rate) / divisor)
    if average is not None and hyper.beta1 is not None:
        update = rules.running_average(average, update, 1.0 - hyper.beta1)
    return rules.adafactor_apply(p, update, rate * hyper.weight_decay), update
