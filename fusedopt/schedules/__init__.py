"""The learning-rate schedules of transformers 4.34 and 5, by name or by function, for any torch optimizer."""

from fusedopt.schedules import forms, functions, metric, registry
from fusedopt.schedules.base import Schedule as Schedule
from fusedopt.schedules.forms import *  # noqa: F403
from fusedopt.schedules.functions import *  # noqa: F403
from fusedopt.schedules.metric import *  # noqa: F403
from fusedopt.schedules.registry import *  # noqa: F403

__all__ = ["Schedule", *forms.__all__, *functions.__all__, *metric.__all__, *registry.__all__]
