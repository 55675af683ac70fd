"""How an optimizer keeps numbers: weights of 16 bits, and the tensors of a parameter's state.

An update rule sees float32 weights (float64 for float64 parameters) and returns new ones. `Precision` and `StateSpec`
declare what is kept of them between two steps; one module per backend reads and writes it: `backends/eager/storage.py`,
and `fusedopt_kernels/storage.py` for the kernels. Which tensors a state has, `FusedOptimizer.state_specs` puts together
from them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import checks

_MASTER_STATES = {torch.bfloat16: "remainder", torch.float16: "master_weight"}
"""States that complete a 16-bit parameter to its float32 weight: the lower half of its bits, int16, or a copy."""


def master_state(dtype: torch.dtype) -> str | None:
    """The name of the state that may complete a parameter of this dtype."""
    return _MASTER_STATES.get(dtype)


_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def name_of_dtype(value: Any) -> Any:
    """The name of a dtype, which is what configs and checkpoints hold, since JSON has no dtypes; else the value."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def named_dtype(value: Any) -> Any:
    """The dtype for the name of one that a moment may have, with or without "torch."; else the value.

    Example:
        >>> named_dtype(name_of_dtype(torch.bfloat16))
        torch.bfloat16
    """
    return _STATE_DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


COUNTS = torch.float64
"""The dtype of step counts, which float32 would stop at 2^24: 2^24 + 1 is not one of its numbers."""

NUMBER = "number"
"""State of a parameter whose rounding is random: an int64 that tells it from the optimizer's other parameters."""

FLOAT32_COPIES = ("master_weight", "master_param")
"""States that are a float32 copy of the weight, here and in other implementations."""

WEIGHT_STATES = frozenset((*_MASTER_STATES.values(), *FLOAT32_COPIES, NUMBER))
"""States that belong to the weight, whatever the rule is."""

FREEZING = frozenset({"exp_avg_sq"})
"""States that change by less than half a unit of bfloat16 at a step, for which rounding to nearest leaves them as they
are: with beta2 = 0.999, sqrt(v) is 1.63 and 4.11 times too large 1,000 and 3,000 steps after gradients fell tenfold."""


class Precision(NamedTuple):
    """The precision options of a param group, and the optimizer's seed."""

    master_weights: bool = False
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None
    seed: int = 0

    @classmethod
    def of(cls, group: dict[str, Any], seed: int) -> "Precision":
        """The precision of a param group; asked for each parameter when states are made or loaded, so no loop."""
        return cls(
            group.get("master_weights", False), group.get("stochastic_rounding", False), group.get("state_dtype"), seed
        )

    def options(self) -> dict[str, Any]:
        """The options of a param group."""
        return {name: value for name, value in self._asdict().items() if name != "seed"}

    @property
    def is_plain(self) -> bool:
        """True if weights and states are rounded to nearest, in the dtype of their parameter."""
        return not (self.master_weights or self.stochastic_rounding) and self.state_dtype is None

    def check(self) -> None:
        """Raises ValueError for options that make no sense."""
        checks.flag("master_weights", self.master_weights)
        checks.flag("stochastic_rounding", self.stochastic_rounding)
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "master_weights=True and stochastic_rounding=True exclude each other: the first keeps float32 weights, "
                "the second does without them; pass one of the two"
            )
        if self.state_dtype not in (None, *_STATE_DTYPES.values()):
            raise ValueError(f"state_dtype must be None, torch.float32 or torch.bfloat16, got {self.state_dtype!r}")

    def rounds_stochastically(self, dtype: torch.dtype) -> bool:
        """True if weights of this dtype are rounded to one of their two neighbours at random."""
        return self.stochastic_rounding and dtype.itemsize == 2

    def moment(self, dtype: torch.dtype, *, stochastic: bool = False) -> "StateSpec":
        """Returns how a moment of the shape of a parameter of this dtype is kept.

        Args:
            dtype: of the parameter.
            stochastic: whether a 16-bit one freezes when it is rounded to nearest, as averages of squares do.
        """
        own = self.state_dtype or (torch.promote_types(dtype, torch.float32) if self.master_weights else dtype)
        return StateSpec(own, keeps_loaded_dtype=self.is_plain, stochastic=stochastic and not self.is_plain)

    def weight_states(self, dtype: torch.dtype) -> dict[str, "StateSpec"]:
        """The states that complete a weight of this dtype."""
        name = master_state(dtype) if self.master_weights else None
        return {name: StateSpec(torch.int16 if name == "remainder" else torch.float32)} if name else {}


PLAIN = Precision()
"""Rounding to nearest, and states in the dtype of their parameter."""


class StateSpec(NamedTuple):
    """How one tensor of a parameter's state is kept.

    Attributes:
        dtype: of a new one.
        without: the dimension of the parameter, -1 or -2, that it lacks; None for all dimensions, "all" for a 0-d one.
        keeps_loaded_dtype: True if one that is loaded stays in the dtype that it was saved in.
        stochastic: True if it is rounded to 16 bits at random, by the upper half of the element's random word.
    """

    dtype: torch.dtype
    without: int | str | None = None
    keeps_loaded_dtype: bool = False
    stochastic: bool = False

    @property
    def needs_number(self) -> bool:
        """True if its rounding is random."""
        return self.stochastic and self.dtype.itemsize == 2

    def shape(self, p: Tensor) -> torch.Size:
        """Its shape, for a parameter or one shard of it."""
        if self.without is None:
            return p.shape
        if self.without == "all":
            return torch.Size()
        return torch.Size([n for d, n in enumerate(p.shape) if d - p.dim() != self.without])
