"""Warnings that come once, however often their cause comes back."""

import warnings
from functools import cache


@cache
def warn_once(message: str) -> None:
    """Warns, unless this message has been given before."""
    warnings.warn(message, stacklevel=2)
