"""How many steps were skipped, and why."""

from collections.abc import Iterator

from torch import Tensor

from fusedopt_kernels.rules import REASONS


class SkippedSteps:
    """How many steps the options `skip_...` skipped in this process, by reason; each step has one.

    Conversions and comparisons wait for the device, nothing else does. All but `dict()` go by the sum.

    Attributes:
        names: "nonfinite": the norm of the gradients was NaN or inf. "grad_norm_above": it was larger than
            `skip_grad_norm_above`. "outliers": it was one for `skip_outliers`.
        tensor: their numbers, float64 [3], on the device of the gradients. It goes on counting; clone it to keep them.

    Example:
        >>> import fusedopt, torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.AdamW([w], skip_grad_norm_above=10.0)
        >>> for size in (1.0, 100.0, torch.nan):
        ...     optimizer.apply_gradients([(torch.full((2,), size), w)])
        >>> int(optimizer.skipped_steps)
        2
        >>> dict(optimizer.skipped_steps)
        {'nonfinite': 1, 'grad_norm_above': 1, 'outliers': 0}
    """

    names: tuple[str, ...] = REASONS

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return zip(self.names, map(int, self.tensor.tolist()))

    def __int__(self) -> int:
        return int(self.tensor.sum())

    __index__ = __int__

    def __bool__(self) -> bool:
        return int(self) > 0

    def __float__(self) -> float:
        return float(int(self))

    def __lt__(self, other: float) -> bool:
        return int(self) < other

    def __gt__(self, other: float) -> bool:
        return int(self) > other

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SkippedSteps):
            return dict(self) == dict(other)
        return int(self) == other if isinstance(other, (int, float)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SkippedSteps({', '.join(f'{name}={number}' for name, number in self)})"
