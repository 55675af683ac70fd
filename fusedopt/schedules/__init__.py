"""The learning-rate schedules of transformers 4.34 and 5, by name or by function, for any torch optimizer."""

from fusedopt.schedules.registry import *  # noqa: F403
from fusedopt.schedules.registry import __all__ as __all__
