"""The report of the demo: a table and a picture of the records of its steps."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fusedopt.columns import aligned
from fusedopt.files import save_figure
from fusedopt.statistics.plotting import draw_statistics, height_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fusedopt.demo.training import Outcome

STYLES = {"eager": ("reference loop", "#e8a33d"), "fused": ("fusedopt", "#1f4e79")}
"""Label and color of each run."""

INK = "#333b45"


class Curves:
    """The records of one run as columns.

    Attributes:
        median_ms: median of the optimizer's times: the first steps allocate the state, or compile.
        broken_at: first step whose loss is not finite; None if there is none.
    """

    def __init__(self, records: list[dict[str, Any]], run: str) -> None:
        self.label, self.color = STYLES[run]
        of_run = [record for record in records if record["run"] == run]
        measured = [record for record in of_run if "val_loss" in record]
        self.steps = [record["step"] for record in of_run]
        self.train_loss = [record["train_loss"] for record in of_run]
        self.val_steps = [record["step"] for record in measured]
        self.val_loss = [record["val_loss"] for record in measured]
        self.lr = [record["lr"] for record in of_run]
        self.optimizer_ms = [record["optimizer_ms"] for record in of_run]
        self.median_ms = median(self.optimizer_ms)
        self.broken_at = next((r["step"] for r in of_run if not math.isfinite(r["train_loss"])), None)


def largest_difference(eager: Curves, fused: Curves) -> tuple[float, int]:
    """Returns the largest difference of the training losses and its step; NaN and 0 if no two losses are finite."""
    gaps = [(abs(a - b), step) for a, b, step in zip(eager.train_loss, fused.train_loss, eager.steps)]
    return max((gap for gap in gaps if math.isfinite(gap[0])), default=(math.nan, 0))


def table(outcome: Outcome) -> str:
    """Returns the result as text; losses are in nats per byte.

    Example:
        >>> import tempfile
        >>> from fusedopt.demo import Settings, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     outcome = train(Settings(steps=1, batch_size=2, layers=1, width=8, device="cpu", out=folder))
        >>> print(table(outcome).splitlines()[0])
        adamw on 3,416 float32 parameters in 14 tensors, 1 step of 2 x 64 bytes
    """
    eager, fused = (Curves(outcome.records, run) for run in STYLES)
    difference, at = largest_difference(eager, fused)
    device = outcome.settings.torch_device.type
    rows = [
        ("", eager.label, fused.label),
        ("train loss, last step", f"{eager.train_loss[-1]:.4f}", f"{fused.train_loss[-1]:.4f}"),
        (f"validation loss, step {eager.val_steps[0]}", f"{eager.val_loss[0]:.4f}", f"{fused.val_loss[0]:.4f}"),
        ("validation loss, last step", f"{eager.val_loss[-1]:.4f}", f"{fused.val_loss[-1]:.4f}"),
        ("optimizer, ms per step (median)", f"{eager.median_ms:.3f}", f"{fused.median_ms:.3f}"),
        ("optimizer, speed ratio", "1.00", f"{eager.median_ms / fused.median_ms:.2f}"),
        ("backend", "plain torch", outcome.backend),
        ("device", device, device),
    ]
    lines = [
        _what(outcome),
        "",
        *aligned(rows, "<>>"),
        "",
        f"largest difference between the two loss curves: {difference:.2g}" + (f", at step {at}" if at else ""),
    ]
    lines += [
        f"{run.label}: the loss is not finite from step {run.broken_at} on; try a smaller lr, or another dtype"
        for run in (eager, fused)
        if run.broken_at
    ]
    return "\n".join(lines)


def _what(outcome: Outcome) -> str:
    settings = outcome.settings
    batch = f"{settings.accumulate} x {settings.batch_size}" if settings.accumulate > 1 else f"{settings.batch_size}"
    return (
        f"{settings.optimizer} on {outcome.parameters:,} {settings.dtype} parameters in {outcome.tensors} tensors, "
        f"{settings.steps:,} step{'s' if settings.steps > 1 else ''} of {batch} x {outcome.context} bytes"
    )


def save_picture(outcome: Outcome, path: Path) -> None:
    """Writes `figure(outcome)` as a PNG."""
    save_figure(figure(outcome), path, dpi=150)


def figure(outcome: Outcome) -> Figure:
    """Draws both loss curves in one plot, the learning rate, the optimizer's time per step, and statistics if any."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    eager, fused = (Curves(outcome.records, run) for run in STYLES)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12, hspace=0.06, wspace=0.06)
    more = 0.0 if outcome.statistics is None else height_of(outcome.statistics)
    fig = Figure(figsize=(10, 7 + more), layout=layout, facecolor="white")
    upper: Any = fig
    if more:
        parts: Any = fig.subfigures(2, 1, height_ratios=(7, more))
        upper, lower = parts
    grid = upper.add_gridspec(2, 2, height_ratios=(1.7, 1))
    title = f"{_what(outcome)} on {outcome.settings.torch_device.type}"
    upper.suptitle(title, x=0.012, ha="left", fontsize=11, color=INK)
    _draw_loss(upper.add_subplot(grid[0, :]), eager, fused)
    _draw_rate(upper.add_subplot(grid[1, 0]), fused)
    _draw_time(upper.add_subplot(grid[1, 1]), eager, fused)
    if outcome.statistics is not None:
        draw_statistics(lower, outcome.statistics)
    return fig


def loss_title(eager: Curves, fused: Curves) -> str:
    """Returns a title for the picture of the losses: it says if there is one curve to see, two, or none.

    Two curves look like one if they differ by less than the width of a line, a hundredth of their height.
    """
    losses = [loss for curves in (eager, fused) for loss in curves.train_loss if math.isfinite(loss)]
    if not losses:
        return "no loss is finite"
    difference, at = largest_difference(eager, fused)
    first = min((run.broken_at for run in (eager, fused) if run.broken_at), default=None)
    if first is not None:
        broken = " and ".join(run.label for run in (eager, fused) if run.broken_at == first)
        return f"not finite from step {first:,} on ({broken})"
    if difference <= max(0.01 * (max(losses) - min(losses)), 1e-6 * max(map(abs, losses))):
        return "one curve on top of the other"
    return f"two curves, furthest apart at step {at:,}"


def _draw_loss(axes: Axes, eager: Curves, fused: Curves) -> None:
    difference, _ = largest_difference(eager, fused)
    gap = "none can be told" if math.isnan(difference) else f"{difference:.2g}"
    _style(axes, f"Loss, nats per byte: {loss_title(eager, fused)}", below="lines: training, dots: validation; "
           f"largest difference: {gap}")  # fmt: skip
    axes.plot(eager.steps, eager.train_loss, color=eager.color, lw=4.5, alpha=0.6, solid_capstyle="round")
    axes.plot(fused.steps, fused.train_loss, color=fused.color, lw=0.9)
    axes.plot(eager.val_steps, eager.val_loss, "o", color=eager.color, ms=9)
    axes.plot(fused.val_steps, fused.val_loss, "o", color=fused.color, ms=4)
    if len(eager.steps) > 1:
        axes.set_xlim(eager.steps[0] - 0.01 * len(eager.steps), eager.steps[-1] + 0.01 * len(eager.steps))
    axes.plot([], [], "o-", color=eager.color, lw=4.5, ms=9, label=eager.label)
    axes.plot([], [], "o-", color=fused.color, lw=0.9, ms=4, label=fused.label)
    # To the right of the title, above all curves.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.3, ncols=2, frameon=False, labelcolor=INK)


def _draw_rate(axes: Axes, fused: Curves) -> None:
    if fused.lr[0] is None:
        _style(axes, "Learning rate: the optimizer's own")
        return
    _style(axes, "Learning rate")
    axes.plot(fused.steps, fused.lr, color=fused.color, lw=1.8)
    axes.set_ylim(bottom=0)


def _draw_time(axes: Axes, eager: Curves, fused: Curves) -> None:
    from matplotlib.patheffects import withStroke

    ratio = eager.median_ms / fused.median_ms
    _style(axes, f"Optimizer, ms per step: {ratio:.1f} times as fast")
    for run, other in ((eager, fused), (fused, eager)):
        above = run.median_ms >= other.median_ms
        axes.plot(run.steps, run.optimizer_ms, ".", color=run.color, ms=4, alpha=0.5, mew=0)
        axes.axhline(run.median_ms, color=run.color, lw=1.8)
        axes.annotate(
            f"{run.label} {run.median_ms:.2f}",
            (1, run.median_ms),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 4 if above else -4),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color=run.color,
            weight="bold",
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )
    # A few slow steps would otherwise press all the others onto the axis.
    axes.set_ylim(0, 2 * max(eager.median_ms, fused.median_ms))


def _style(axes: Axes, title: str, below: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, weight="bold", pad=22 if below else 6)
    if below:
        axes.annotate(below, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=9, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color="#e3e6ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aab2bd")
