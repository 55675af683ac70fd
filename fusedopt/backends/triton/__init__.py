"""The Triton backend: the update of all parameters of a device in a handful of launches."""

from fusedopt.backends.triton.adafactor import TritonAdafactor
from fusedopt.backends.triton.adamw import TritonAdamW
from fusedopt.backends.triton.grad_norm import Squares

STEPPERS = {"adafactor": TritonAdafactor, "adamw": TritonAdamW, "squares": Squares}
