"""The eager backend: torch operations, the readable path that serves every device."""

from fusedopt.backends.eager_adamw import EagerAdamW

STEPPERS = {"adamw": EagerAdamW}
