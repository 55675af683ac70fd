"""The eager backend: torch operations, the readable path that serves every device."""

from fusedopt.backends.eager.adafactor import EagerAdafactor
from fusedopt.backends.eager.adamw import EagerAdamW
from fusedopt.backends.eager.grad_norm import GradNorm
from fusedopt.backends.eager.lion import EagerLion
from fusedopt.backends.eager.verdict import Verdict

STEPPERS = {
    "adafactor": EagerAdafactor,
    "adamw": EagerAdamW,
    "lion": EagerLion,
    "squares": GradNorm,
    "verdict": Verdict,
}
