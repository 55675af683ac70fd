"""The Triton backend: the update of all parameters of a device in a handful of launches."""

from fusedopt.backends.triton_adamw import TritonAdamW

STEPPERS = {"adamw": TritonAdamW}
