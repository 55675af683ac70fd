"""What a step hands from an optimizer to a backend."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt_kernels.rules import Convention


class AdamWHyper(NamedTuple):
    """Hyper-parameters of one batch of parameters, as the backends get them."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    correct_bias: bool
    amsgrad: bool
    maximize: bool
    convention: Convention


class Batch(NamedTuple):
    """Parameters that one step updates with the same hyper-parameters.

    Attributes:
        hyper: the hyper-parameters, a NamedTuple that the rule's backends know.
        params: all parameters of the batch, those without gradient included, so that their place does not change.
        grads: one gradient per parameter, or None: that parameter and its state are left alone.
        states: one dict per parameter (names to tensors); empty for a parameter that never had a gradient.
    """

    hyper: Any
    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[dict[str, Tensor]]

    def on(self, device: torch.device) -> "Batch":
        """The part of this batch whose parameters live on `device`."""
        rows = [row for row in zip(self.params, self.grads, self.states) if row[0].device == device]
        return Batch(self.hyper, *(list(column) for column in zip(*rows))) if rows else Batch(self.hyper, [], [], [])


class Control(NamedTuple):
    """What is asked of one step beside the hyper-parameters.

    Attributes:
        scale: gradients are multiplied by it on the way into the update; never written back. A tensor of one element
            is read on its device.
    """

    scale: float | Tensor = 1.0
