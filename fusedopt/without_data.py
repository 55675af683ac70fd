"""Parameters without data: on "meta", fake, or lazy ones before their first forward pass.

A step makes their state, so that its size can be known, and has nothing to update.
"""

import sys
from typing import Any

from torch.nn.parameter import is_lazy

__all__ = ["has_data", "is_lazy"]


def has_data(p: Any) -> bool:
    """True if there are numbers to update now."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return not (p.device.type == "meta" or is_lazy(p) or (fakes is not None and isinstance(p, fakes.FakeTensor)))
