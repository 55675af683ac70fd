"""The demo's table and picture."""

import math

import pytest
from helpers.demo import TINY

from fusedopt.demo import Outcome, report


class TestReport:
    def records(self, eager, fused):
        return [
            {"run": run, "step": step, "train_loss": loss, "val_loss": loss, "lr": 0.1, "optimizer_ms": ms}
            for run, losses, ms in (("eager", eager, 3.0), ("fused", fused, 1.5))
            for step, loss in enumerate(losses, start=1)
        ]

    def outcome(self, *losses):
        return Outcome(TINY, 1000, 10, 64, "eager", self.records(*losses))

    def test_table(self):
        outcome = self.outcome([5.0, 4.0, 3.0], [5.0, 4.25, 3.125])
        lines = report.table(outcome).splitlines()
        rows = lines[2:10]
        assert len({len(row) for row in rows}) == 1, "columns do not line up"
        cells = {row[:32].strip(): row[32:].split() for row in rows}
        assert cells["train loss, last step"] == ["3.0000", "3.1250"]
        assert cells["validation loss, step 1"] == ["5.0000", "5.0000"]
        assert cells["optimizer, ms per step (median)"] == ["3.000", "1.500"]
        assert cells["optimizer, speed ratio"] == ["1.00", "2.00"]
        assert cells["device"] == ["cpu", "cpu"]
        assert lines[-1] == "largest difference between the two loss curves: 0.25, at step 2"

    def test_losses_that_are_not_finite_are_named(self):
        nan = math.nan
        lines = report.table(self.outcome([5.0, nan, nan], [5.0, 4.0, math.inf])).splitlines()
        assert "reference loop: the loss is not finite from step 2 on" in lines[-2]
        assert "fusedopt: the loss is not finite from step 3 on" in lines[-1]

    @pytest.mark.slow
    @pytest.mark.parametrize("losses", [[5.0, 4.0, 3.0], [5.0], [math.nan]], ids=["three", "one", "nan"])
    def test_picture(self, tmp_path, losses):
        outcome = self.outcome(losses, losses)
        assert len(report.figure(outcome).axes) == 3
        report.save_picture(outcome, tmp_path / "demo.png")
        assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("eager", "fused", "title"),
        [
            ([5.0, 4.0, 3.0], [5.0, 4.001, 3.0], "one curve on top of the other"),
            ([3.0], [3.0], "one curve on top of the other"),
            ([5.0, 4.0, 3.0], [5.0, 4.5, 3.1], "two curves, furthest apart at step 2"),
            ([math.nan] * 3, [math.inf] * 3, "no loss is finite"),
            ([5.0, math.nan, 3.0], [5.0, math.nan, 3.0], "not finite from step 2 on (reference loop and fusedopt)"),
            ([5.0, 4.0, 3.0], [5.0, 4.0, math.inf], "not finite from step 3 on (fusedopt)"),
        ],
        ids=["same", "one step", "apart", "nothing finite", "both broken", "one broken"],
    )
    def test_the_title_of_the_losses_says_what_there_is_to_see(self, eager, fused, title):
        figure = report.figure(self.outcome(eager, fused))
        assert figure.axes[0].get_title(loc="left") == f"Loss, nats per byte: {title}"
        assert "nan" not in " ".join(text.get_text() for text in figure.axes[0].texts)

    def test_the_legend_lies_beside_the_losses(self):
        rising = [1.0, 2.0, 3.0]
        figure = report.figure(self.outcome(rising, rising))
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend().get_window_extent()
        assert not legend.overlaps(figure.axes[0].bbox)
        assert figure.bbox.x1 >= legend.x1 and figure.bbox.y1 >= legend.y1
