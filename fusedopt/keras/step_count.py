"""StepCount: how many steps an optimizer has taken, where only its device knows which of them were skipped."""

import torch
from torch import Tensor


class StepCount:
    """A number of steps on a device, without the skipped ones, beside the number that the host counts.

    Whether a step is skipped is decided on the device, and a CUDA graph is replayed without Python: from the first such
    step on, the host's number is out of date until it asks the device.

    Attributes:
        ahead: whether the device may be ahead of the host, or behind it.

    Example:
        >>> count = StepCount()
        >>> count.on(torch.device("cpu"), taken=3)
        tensor(3., dtype=torch.float64)
        >>> count.advance(skips=torch.tensor(1.0))
        >>> count.advance(skips=torch.tensor(0.0))
        >>> count.read(), count.ahead
        (4, True)
    """

    def __init__(self) -> None:
        self._taken: Tensor | None = None
        self.ahead = False

    @property
    def exists(self) -> bool:
        """Whether there is a number on a device."""
        return self._taken is not None

    def on(self, device: torch.device, taken: int) -> Tensor:
        """The number, 0-d float64 on this device, always the same tensor; it begins with `taken`."""
        if self._taken is None:
            with torch.inference_mode(False):  # Steps in that mode and out of it advance one tensor.
                self._taken = torch.full((), float(taken), dtype=torch.float64, device=device)
        elif self._taken.device != device:
            self._taken = self._taken.to(device)
        return self._taken

    def advance(self, skips: Tensor | None, replayed: bool = False) -> None:
        """Counts a step unless `skips` is not 0; nothing waits. `replayed`: without Python, from now on."""
        assert self._taken is not None
        if skips is None:
            self._taken += 1.0
        else:
            self._taken += skips.to(self._taken.device, non_blocking=True) == 0.0
        self.ahead = self.ahead or replayed or skips is not None

    def read(self) -> int:
        """The number; waits for the device."""
        assert self._taken is not None
        return int(self._taken)
