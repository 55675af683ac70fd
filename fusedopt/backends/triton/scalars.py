"""Numbers that a kernel reads: by value out of its table, or at an address on its device."""

import torch
from torch import Tensor

from fusedopt.backends.graphs import capturing


class DeviceScalars:
    """The numbers of one step on one device.

    Attributes:
        kept: tensors whose addresses were handed out; to be kept until the step is queued, or as long as its graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kept: list[Tensor] = []

    def number(self, name: str, number: float | Tensor) -> tuple[float, int, int]:
        """Returns a number as a `record.NUMBER`: value, address of a float32, address of a float64 (0: none).

        Nothing waits for a device. A tensor on the CPU is read now.

        Raises:
            RuntimeError: during a capture, for a tensor that is not on this device: a graph would keep its value.
        """
        if not isinstance(number, Tensor):
            return float(number), 0, 0
        if number.device != self._device:
            if capturing(self._device):
                raise RuntimeError(
                    f"{name} is a tensor on {number.device}, of which a CUDA graph would only keep the present value: "
                    f"make it a tensor on {self._device}, or a float if it is not to change"
                )
            if number.device.type == "cpu":
                return float(number), 0, 0
        wanted = torch.float32 if number.dtype is torch.float32 else torch.float64
        at = self._address(number, wanted)
        return (0.0, at, 0) if wanted is torch.float32 else (0.0, 0, at)

    def address(self, number: Tensor | None) -> int:
        """The address of a tensor of one element as a float32, 0 for None."""
        return 0 if number is None else self._address(number, torch.float32)

    def _address(self, number: Tensor, dtype: torch.dtype) -> int:
        number = number.detach().to(self._device, dtype, non_blocking=True)
        self.kept.append(number)
        return number.data_ptr()
