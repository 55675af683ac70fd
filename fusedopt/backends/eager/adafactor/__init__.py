"""Adafactor on the eager backend."""

from fusedopt.backends.eager.adafactor.stepper import EagerAdafactor as EagerAdafactor
