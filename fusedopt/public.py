"""Everything that `import fusedopt` offers, by its public name."""

from fusedopt.accumulate import GradientAccumulator
from fusedopt.adafactor import Adafactor
from fusedopt.adafactor_schedule import AdafactorSchedule, get_adafactor_schedule
from fusedopt.adamw import AdamW
from fusedopt.decay_groups import decay_groups
from fusedopt.float32 import float32_parameters, load_float32_parameters
from fusedopt.in_backward import register_step_in_backward
from fusedopt.keras import AdamWeightDecay
from fusedopt.keras.recipe import create_optimizer
from fusedopt.keras.schedules import PolynomialDecay, WarmUp
from fusedopt.lion import Lion
from fusedopt.schedules import *  # noqa: F403
from fusedopt.schedules import __all__ as _schedules
from fusedopt.schedules.plotting import plot_gallery, plot_schedule, plot_verification
from fusedopt.schedules.recorder import LRRecorder
from fusedopt.schedules.verification import Verification, verify_schedule
from fusedopt.statistics.plotting import plot_statistics
from fusedopt.statistics.recorder import StatisticsRecorder

__all__ = [
    "Adafactor",
    "AdafactorSchedule",
    "AdamW",
    "AdamWeightDecay",
    "GradientAccumulator",
    "LRRecorder",
    "Lion",
    "PolynomialDecay",
    "StatisticsRecorder",
    "Verification",
    "WarmUp",
    "create_optimizer",
    "decay_groups",
    "float32_parameters",
    "get_adafactor_schedule",
    "load_float32_parameters",
    "plot_gallery",
    "plot_schedule",
    "plot_statistics",
    "plot_verification",
    "register_step_in_backward",
    "verify_schedule",
    *_schedules,
]
