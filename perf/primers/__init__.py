"""Four questions, each with a run that anyone can repeat: `python -m perf.primers NAME`; pages: `docs/primers`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Primer(NamedTuple):
    """What a run found: rows of a table, and a picture."""

    rows: Sequence[Mapping[str, str]]
    figure: "Figure"


def lines(title: str, xlabel: str, curves: Mapping[str, tuple[Sequence[int], Sequence[float], str]]) -> "Figure":
    """Draws curves by name: x, y and colour. Each is thinner than the one before, so that all show."""
    from matplotlib.figure import Figure

    from perf.report import INK

    figure = Figure((8.0, 3.9), dpi=100, layout="constrained", facecolor="white")
    ax: Axes = figure.subplots()
    for index, (name, (x, y, color)) in enumerate(curves.items()):
        ax.plot(x, y, color=color, linewidth=2.0 * (len(curves) - index) - 0.5, label=name, solid_capstyle="butt")
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.set_xlabel(xlabel, color=INK)
    ax.tick_params(colors=INK, length=0)
    ax.grid(axis="y", color="#E3E6EA", lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure
