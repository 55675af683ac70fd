"""The Triton backend: the update of all parameters of a device in a handful of launches."""

from fusedopt.backends.triton_adafactor import TritonAdafactor
from fusedopt.backends.triton_adamw import TritonAdamW
from fusedopt.backends.triton_squares import Squares

STEPPERS = {"adafactor": TritonAdafactor, "adamw": TritonAdamW, "squares": Squares}
