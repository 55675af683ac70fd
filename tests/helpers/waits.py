"""Counts waits for a device, where the CPU stands in for it."""

import sys
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device.

    Attributes:
        count: numbers that the host read.
        lists: tensors that the package read whole.
        copies: tensors made of numbers of the host, which a device gets by a copy that the host waits for.
    """

    def __init__(self):
        super().__init__()
        self.count = 0
        self.lists = 0
        self.copies = 0
        self._patches = ExitStack()

    def __enter__(self):
        for name in ("cpu", "tolist"):  # which a tensor on the CPU does without an operation
            self._patches.enter_context(
                mock.patch.object(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
            )
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def _counted(self, method):
        def counted(t):
            # Triton's interpreter copies all tensors of a launch.
            self.lists += sys._getframe(1).f_globals["__name__"].startswith("fusedopt")
            return method(t)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        self.copies += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))
