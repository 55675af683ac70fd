"""The Triton backend: the update of all parameters of a device in a handful of launches."""

from functools import partial
from typing import Any

from fusedopt.backends.triton.adafactor import TritonAdafactor
from fusedopt.backends.triton.adamw import TritonAdamW
from fusedopt.backends.triton.elementwise import ElementwiseStepper
from fusedopt.backends.triton.grad_norm import GradNorm
from fusedopt.backends.triton.verdict import Verdict
from fusedopt_kernels.lion import LION

STEPPERS: dict[str, Any] = {
    "adafactor": TritonAdafactor,
    "adamw": TritonAdamW,
    "lion": partial(ElementwiseStepper, LION),
    "squares": GradNorm,
    "verdict": Verdict,
}
