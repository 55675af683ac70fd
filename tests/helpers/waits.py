"""Counts waits for a device, where the CPU stands in for it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device.

    Attributes:
        count: numbers that the host read.
        copies: tensors made of numbers of the host, which a device gets by a copy that the host waits for.
    """

    def __init__(self):
        super().__init__()
        self.count = 0
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        self.copies += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))
