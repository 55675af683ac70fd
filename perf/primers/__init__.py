"""Four questions, each with a run that anyone can repeat: `python -m perf.primers NAME`; pages: `docs/primers`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Primer(NamedTuple):
    """What a run found: rows of a table, and a picture."""

    rows: Sequence[Mapping[str, str]]
    figure: "Figure"
