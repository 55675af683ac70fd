"""The eager backend: torch operations, the readable path that serves every device."""

from fusedopt.backends.eager_adafactor import EagerAdafactor
from fusedopt.backends.eager_adamw import EagerAdamW
from fusedopt.backends.eager_squares import Squares

STEPPERS = {"adafactor": EagerAdafactor, "adamw": EagerAdamW, "squares": Squares}
