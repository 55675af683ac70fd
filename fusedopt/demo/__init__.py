"""The demo: trains one small GPT twice on the same batches, with the original's optimizer loop and with ours."""

from fusedopt.demo.settings import Settings
from fusedopt.demo.training import Outcome, train

__all__ = ["Outcome", "Settings", "train"]
