"""Lion on the eager backend."""

from typing import Any

from torch import Tensor

from fusedopt.backends.eager.elementwise import ElementwiseStepper, sign
from fusedopt_kernels import rules


class EagerLion(ElementwiseStepper):
    """The stepper of Lion for one device."""

    states = ("exp_avg",)

    def rule(self, hyper: Any, p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        direction = rules.running_average(m, g, 1.0 - hyper.beta1)
        m = rules.running_average(m, g, 1.0 - hyper.beta2)
        return rules.lion_update(p, direction, hyper.lr, hyper.weight_decay, sign), m
