"""Sums that statistics of a step are made of: names and order, which every backend keeps."""

from typing import Any, NamedTuple


class Measures(NamedTuple):
    """Sums over the elements of one tensor at one step, float64 each.

    Attributes:
        gradient: squares of the gradient.
        weight: squares of the weight before the update.
        update: squares of the update, the new weight less the old one before it is rounded to 16 bits.
        largest: the largest magnitude of an update; no sum, but a maximum.
        lost: how many updates are not 0, and yet left the weight what it was because it has 16 bits.
    """

    gradient: Any
    weight: Any
    update: Any
    largest: Any
    lost: Any


PLACES = Measures(*range(len(Measures._fields)))
"""The column of each of them."""
