"""Pictures of schedules, checked by the data in their Axes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.schedules import CLOSED_FORMS, EVERY_NAME, METRIC_DRIVEN, advance, by_name, sgd

from fusedopt import schedules
from fusedopt.keras.schedules import PolynomialDecay, WarmUp
from fusedopt.schedules import SchedulerType, example_arguments
from fusedopt.schedules.curves import example_metric
from fusedopt.schedules.plotting import plot_gallery, plot_schedule, plot_verification
from fusedopt.schedules.recorder import LRRecorder


def lines(figure: Any, axes: int = 0) -> dict[str, Any]:
    return {line.get_label(): line for line in figure.axes[axes].get_lines()}


def texts(figure: Any, axes: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[axes].texts]


def legend(figure: Any, axes: int = 0) -> list[str]:
    owner = figure.axes[axes].get_legend() or figure.legends[0]
    return [text.get_text() for text in owner.get_texts()]


def shaded(figure: Any, axes: int = 0) -> list[tuple[float, float]]:
    patches = [patch for patch in figure.axes[axes].patches if patch.get_label() == "warm-up"]
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in patches]


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_curve_is_the_schedule(name: str) -> None:
    schedule = CLOSED_FORMS[name]
    figure = plot_schedule(schedule, num_steps=50, lr=0.02)
    line = lines(figure)[name]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(51))
    np.testing.assert_allclose(line.get_ydata(), [0.02 * schedule(step) for step in range(51)], rtol=1e-12, atol=1e-17)
    assert shaded(figure) == ([] if name == "constant" else [(0, 5)])


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_name_with_its_arguments(name: str) -> None:
    specific = example_arguments(name, 40, lr=0.1)
    figure = plot_schedule(name, lr=0.1, num_warmup_steps=5, num_training_steps=40, **specific)
    line = lines(figure)[name]
    optimizer = sgd(0.1)
    scheduler = by_name(name, optimizer)
    metric = example_metric(len(line.get_xdata()) - 1)
    for step, rate in zip(line.get_xdata(), line.get_ydata()):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-17), f"step {step}"
        advance(scheduler, float(metric[step]))
    if name in METRIC_DRIVEN:
        (curve,) = figure.axes[1].get_lines()
        np.testing.assert_array_equal(curve.get_ydata(), metric)
        assert figure.axes[1].get_ylabel() == "metric" and curve.get_label() in legend(figure)


def test_titles_labels_units_and_legend() -> None:
    figure = plot_schedule("cosine", num_warmup_steps=10, num_training_steps=100)
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == "cosine"
    assert texts(figure) == ["num_warmup_steps=10, num_training_steps=100, num_cycles=0.5"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "learning rate (× initial rate)")
    assert legend(figure) == ["cosine", "warm-up"]
    ax = plot_schedule("cosine", lr=0.05, num_warmup_steps=10, num_training_steps=100).axes[0]
    assert ax.get_ylabel() == "learning rate (per step)"
    ax = plot_schedule("cosine", lr=3e-4, num_warmup_steps=10, num_training_steps=2000, title="mine").axes[0]
    assert ax.get_ylabel() == "learning rate ($10^{-4}$ per step)" and ax.get_title(loc="left") == "mine"
    assert ax.yaxis.get_major_formatter()(3e-4, 0) == "3" and ax.xaxis.get_major_formatter()(1500, 0) == "1,500"


def test_several_to_compare() -> None:
    figure = plot_schedule(
        ["linear", ("cosine", {"num_cycles": 1.0}), schedules.LinearSchedule(5, 80), schedules.ConstantSchedule()],
        num_warmup_steps=5,
        num_training_steps=40,
    )
    drawn = lines(figure)
    assert list(drawn) == ["linear (num_training_steps=40)", "cosine", "linear (num_training_steps=80)", "constant"]
    assert drawn["cosine"].get_ydata()[20] == pytest.approx(schedules.CosineSchedule(5, 40, 1.0)(20))
    assert len({line.get_color() for line in drawn.values()}) == 4
    assert legend(figure) == [*drawn, "warm-up"]
    assert shaded(figure) == [(0, 5)]
    assert drawn["cosine"].get_xdata()[-1] == 84  # the longest, and a little more


def test_different_warm_ups_are_marked_in_their_colours() -> None:
    figure = plot_schedule({"short": schedules.LinearSchedule(3, 40), "long": schedules.LinearSchedule(9, 40)})
    ends = [line for line in figure.axes[0].get_lines() if line.get_label() == "end of its warm-up"]
    assert [line.get_xdata()[0] for line in ends] == [3, 9] and shaded(figure) == []
    drawn = lines(figure)
    assert [line.get_color() for line in ends] == [drawn["short"].get_color(), drawn["long"].get_color()]
    assert legend(figure) == ["short", "long", "end of its warm-up"]


def test_a_live_scheduler_shows_its_groups_and_where_it_is() -> None:
    optimizer = sgd(0.3, 0.1, 0.3)
    scheduler = schedules.get_linear_schedule_with_warmup(optimizer, 5, 40)
    for _ in range(12):
        advance(scheduler)
    drawn = lines(plot_schedule(scheduler))
    assert set(drawn) == {"linear", "linear, group 1", "linear now: step 12", "linear, group 1 now: step 12"}
    assert drawn["linear, group 1"].get_ydata()[5] == pytest.approx(0.1)
    assert drawn["linear now: step 12"].get_xydata().tolist() == [pytest.approx([12, 0.3 * 28 / 35])]
    assert scheduler.last_epoch == 12


@pytest.mark.parametrize("name", METRIC_DRIVEN)
def test_a_live_metric_driven_scheduler_is_not_disturbed(name: str) -> None:
    optimizer = sgd(0.1)
    scheduler = by_name(name, optimizer)
    for _ in range(7):
        advance(scheduler, 0.5)
    before, rate = copy.deepcopy(scheduler.state_dict()), optimizer.param_groups[0]["lr"]
    figure = plot_schedule(scheduler, metrics=[1.0] * 20)
    rates = lines(figure)[name].get_ydata()
    assert len(rates) == 20 and rates[0] == rate and rates[-1] < rate
    fresh = by_name(name, sgd(rate))
    expected = [rate]
    for _ in range(19):
        fresh.step(1.0)
        expected += fresh.get_last_lr()
    assert rates.tolist() == expected
    assert scheduler.state_dict() == before and optimizer.param_groups[0]["lr"] == rate


def test_any_function_of_the_step_and_long_runs() -> None:
    def halving(step: int) -> float:
        return 0.5 ** (step // 1000)

    line = lines(plot_schedule(halving, num_steps=1_000_000))["halving"]
    assert line.get_xdata()[0] == 0 and line.get_xdata()[-1] == 1_000_000
    np.testing.assert_array_equal(line.get_ydata(), [halving(int(step)) for step in line.get_xdata()])
    line = lines(plot_schedule(schedules.LinearSchedule(0, 1)))["linear"]
    assert line.get_ydata().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("total", [10, 1_000, 100_000, 10_000_000])
@pytest.mark.parametrize("warm_up", [1, 3, 137])
@pytest.mark.parametrize("known", [True, False], ids=["schedule", "function"])
def test_the_peak_after_a_short_warm_up_is_in_the_picture_however_long_the_run(
    total: int, warm_up: int, known: bool
) -> None:
    schedule = schedules.LinearSchedule(min(warm_up, total // 2), total)
    figure = plot_schedule(schedule if known else lambda step: schedule(step), num_steps=total, lr=1e-4)
    (line,) = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 2]
    assert max(line.get_ydata()) == 1e-4
    assert len(line.get_xdata()) <= 20_001
    np.testing.assert_allclose(line.get_ydata(), 1e-4 * schedule(line.get_xdata()), rtol=1e-12)
    assert figure.axes[0].get_ylabel() == "learning rate ($10^{-4}$ per step)"


def test_restarts_of_a_long_run_fall_from_one_step_to_the_next() -> None:
    schedule = schedules.CosineWithRestartsSchedule(100, 5_000_000, num_cycles=4)
    line = lines(plot_schedule(schedule))["cosine_with_restarts"]
    steps, rates = line.get_xdata(), line.get_ydata()
    (jumps,) = np.nonzero(np.diff(rates) > 0.5)
    restarts = [100 + (5_000_000 - 100) * cycle / 4 for cycle in (1, 2, 3)]
    assert steps[jumps + 1].tolist() == [int(np.ceil(step)) for step in restarts]
    assert steps[jumps].tolist() == [int(np.ceil(step)) - 1 for step in restarts]


def test_a_wave_is_not_mistaken_for_a_line() -> None:
    """Its period is the spacing of evenly spread points, half of it, or twice."""
    for cycles in (800, 1_200, 1_997, 2_000, 4_000):
        figure = plot_schedule(lambda step, cycles=cycles: np.cos(2 * np.pi * cycles * step / 10**7), num_steps=10**7)
        rates = figure.axes[0].get_lines()[0].get_ydata()
        assert rates.min() < -0.99 and rates.max() > 0.99


@pytest.mark.parametrize("lr", [1e-4, 9.4e-4, 9.999e-4, 1e-3, 3e-7, 0.0])
def test_no_tick_of_the_rates_reads_ten(lr: float) -> None:
    (ax, *_) = plot_schedule("cosine", lr=lr, num_warmup_steps=10, num_training_steps=100).axes
    low, high = ax.get_ylim()
    shown = [tick for tick in ax.yaxis.get_majorticklocs() if low <= tick <= high]
    assert max(abs(float(ax.yaxis.get_major_formatter()(tick, 0))) for tick in shown) < 10


def many(number: int, kind: str) -> Any:
    """Returns something that is drawn as `number` curves."""
    if kind == "param groups":
        optimizer = sgd(*[1e-4 * 0.9**group for group in range(number)])
        scheduler = schedules.get_cosine_schedule_with_warmup(optimizer, 5, 40)
        for _ in range(12):
            advance(scheduler)
        return scheduler
    name = "a name that somebody has typed into a configuration file, " * 4
    return {f"_{name}{run}": schedules.LinearSchedule(run, 100 + run) for run in range(number)}


@pytest.mark.parametrize("kind", ["param groups", "long names"])
@pytest.mark.parametrize("number", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8, 26, 100))])
def test_the_legend_of_many_curves_fits_on_the_page_and_covers_no_curve(number: int, kind: str) -> None:
    figure = plot_schedule(many(number, kind), title="a title as long as a configuration " * 6)
    figure.draw_without_rendering()
    (legend,), (ax,) = figure.legends, figure.axes
    place, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= place.x0 and place.x1 <= page.x1 and page.y0 <= place.y0 and place.y1 <= page.y1
    assert not place.overlaps(ax.get_window_extent())
    assert ax.get_window_extent().height > 0.35 * page.height and figure.get_figheight() < 9
    assert ax.title.get_window_extent().x1 <= page.x1 and ax._left_title.get_window_extent().x1 <= page.x1
    curves = ax.get_lines()[: number if kind == "long names" else 2 * number]
    looks = {
        (tuple(np.atleast_1d(line.get_color())), line.get_linestyle())
        for line in curves
        if line.get_linestyle() != "None"
    }
    assert len(looks) == number
    named = [text.get_text() for text in legend.get_texts()]
    if number <= 28:
        assert len(named) >= number
    else:
        assert legend.get_title().get_text() == f"10 of {number} curves, coloured in their order"


@pytest.mark.parametrize("number", [1, 26, pytest.param(3, marks=pytest.mark.slow)])
def test_the_legend_in_given_axes_covers_no_curve(number: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    plot_schedule(many(number, "param groups"), ax=axes[0, 0])
    plot_schedule("constant", ax=axes[0, 1], lr=1e-3, num_steps=50)
    plot_schedule("greedy", ax=axes[1, 0], num_steps=100, lr=1e-3)
    figure.draw_without_rendering()
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0]):
        legend = ax.get_legend().get_window_extent()
        assert legend.y1 <= ax.bbox.y1 and legend.x0 >= ax.bbox.x0
        for each in [other for other in figure.axes if other.bbox.bounds == ax.bbox.bounds]:
            for line in each.get_lines():
                points = each.transData.transform(line.get_xydata())
                assert points[:, 1].max() < legend.y0, line.get_label()


def test_curves_drawn_one_after_the_other_all_fit_and_given_limits_stay() -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    plot_schedule("constant", ax=ax, lr=1e-3, num_steps=50)
    plot_schedule("constant", ax=ax, lr=5e-3, num_steps=50)
    assert ax.get_ylim()[1] > 5e-3
    ax.set_ylim(0, 1)
    plot_schedule("constant", ax=ax, lr=5e-3, num_steps=50)
    assert ax.get_ylim() == (0, 1)


def test_the_legend_of_many_param_groups_verified_fits_on_the_page() -> None:
    recorder, scheduler = recorded(mistake=True, lrs=tuple(0.1 * 0.9**group for group in range(26)))
    figure = plot_verification(recorder, scheduler)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert figure.bbox.y0 <= place.y0 and place.x0 >= 0 and place.x1 <= figure.bbox.x1
    assert not place.overlaps(figure.axes[0].get_window_extent())
    assert [text.get_text() for text in legend.get_texts()][-3:] == ["used, as meant", "used, differs", "warm-up"]


def test_labels_are_not_read_as_formulas_and_all_are_shown() -> None:
    figure = plot_schedule(
        {"_mine $a$ $\\nonsense$": schedules.ConstantSchedule(), "other": schedules.ConstantSchedule()}
    )
    figure.draw_without_rendering()
    assert [text.strip() for text in legend(figure)] == ["_mine $a$ $\\nonsense$", "other"]


def test_a_schedule_that_gives_the_rate_itself() -> None:
    schedule = WarmUp(0.4, PolynomialDecay(0.4, decay_steps=20, end_learning_rate=0.1), warmup_steps=5)
    figure = plot_schedule(schedule)
    line = lines(figure)["WarmUp"]
    np.testing.assert_array_equal(line.get_ydata(), [schedule(int(step)) for step in line.get_xdata()])
    assert figure.axes[0].get_ylabel() == "learning rate (per step)" and shaded(figure) == [(0, 5)]


def test_drawing_in_given_axes() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_schedule(CLOSED_FORMS["linear"], ax=right) is figure
    assert not left.get_lines() and right.get_lines()


def test_the_gallery_has_every_schedule() -> None:
    figure = plot_gallery(num_warmup_steps=10, num_training_steps=100)
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert list(panels) == [kind.value for kind in SchedulerType]
    for name, ax in panels.items():
        drawn = {line.get_label(): line for line in ax.get_lines()}
        assert len(drawn["learning rate"].get_xdata()) == 121
        assert drawn["last step"].get_xdata()[0] == 100
        specific = example_arguments(name, 100, lr=1.0)
        if name in CLOSED_FORMS:
            schedule = schedules.get_scheduler(name, sgd(default=1.0), 10, 100, specific).lr_lambdas[0]  # type: ignore[union-attr]
            np.testing.assert_array_equal(drawn["learning rate"].get_ydata(), schedule(np.arange(121)))
    assert legend(figure) == ["learning rate", "warm-up", "last step", "example loss"]
    assert len(figure.axes) == 12 + len(METRIC_DRIVEN)


def recorded(mistake: bool, lrs: tuple[float, ...] = (0.1,), first_step: int = 0) -> tuple[LRRecorder, Any]:
    optimizer = sgd(*lrs)
    recorder = LRRecorder(optimizer, first_step)
    scheduler = schedules.get_linear_schedule_with_warmup(optimizer, 5, 20)
    for _ in range(first_step):
        scheduler.step()
    for step in range(20 - first_step):
        optimizer.step()
        scheduler.step()
        if mistake and step == 9:
            scheduler.step()
    return recorder, scheduler


def test_verification_of_a_run_as_meant() -> None:
    recorder, scheduler = recorded(mistake=False)
    figure = plot_verification(recorder, scheduler)
    drawn = lines(figure)
    assert list(drawn) == ["schedule", "used, as meant"]
    np.testing.assert_array_equal(drawn["used, as meant"].get_ydata(), recorder.rates[:, 0])
    assert figure.axes[0].get_title(loc="left") == "the run followed the schedule"
    assert texts(figure) == ["all 20 steps used the rate of the schedule"] and shaded(figure) == [(0, 5)]


def test_verification_marks_the_steps_that_differ() -> None:
    recorder, scheduler = recorded(mistake=True, lrs=(0.1, 0.1, 0.02))
    figure = plot_verification(recorder, scheduler)
    drawn = lines(figure)
    assert len(drawn) == 6  # the second group is the first again
    off, right = drawn["used, differs"].get_ydata(), drawn["used, as meant"].get_ydata()
    assert np.flatnonzero(~np.isnan(off)).tolist() == list(range(10, 20))
    np.testing.assert_array_equal(off[10:], recorder.rates[10:, 0])
    np.testing.assert_array_equal(np.isnan(off), ~np.isnan(right))
    expected = [0.02 * schedules.LinearSchedule(5, 20)(step) for step in range(20)]
    np.testing.assert_allclose(drawn["schedule, group 2"].get_ydata(), expected, rtol=1e-12)
    assert "from step 10 on the scheduler is 1 step ahead" in texts(figure)[0].replace("\n", " ")
    assert "used, differs" in legend(figure)


@pytest.mark.filterwarnings("ignore:Detected call of")  # the test itself winds the scheduler forward
def test_verification_of_a_resumed_run_shows_its_own_steps() -> None:
    recorder, scheduler = recorded(mistake=False, first_step=7)
    figure = plot_verification(recorder, scheduler, legend=False)
    assert lines(figure)["schedule"].get_xdata().tolist() == list(range(7, 20))
    assert shaded(figure) == [] and figure.axes[0].get_legend() is None


@pytest.mark.slow
def test_pictures_do_not_touch_pyplot() -> None:
    code = "import sys; from fusedopt import *; plot_gallery(1, 9); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        pytest.param(lambda: plot_schedule("lineal"), "choose one of linear", id="unknown name"),
        pytest.param(lambda: plot_schedule("linear"), "needs num_warmup_steps", id="no counts"),
        pytest.param(
            lambda: plot_schedule(CLOSED_FORMS["linear"], lr=float("nan")), "lr must be finite", id="nan rate"
        ),
        pytest.param(lambda: plot_schedule([]), "nothing to plot; give a schedule", id="nothing"),
        pytest.param(lambda: plot_schedule(3), "cannot plot 3; give a schedule, the name", id="a number"),
        pytest.param(
            lambda: plot_schedule(CLOSED_FORMS["linear"], num_training_steps=9), "num_training_steps go", id="extra"
        ),
        pytest.param(
            lambda: plot_schedule(CLOSED_FORMS["linear"], num_steps=0), "num_steps must be >= 1", id="no steps"
        ),
        pytest.param(lambda: plot_verification(LRRecorder(sgd()), CLOSED_FORMS["linear"]), "no step", id="empty"),
    ],
)
def test_what_makes_no_picture_is_refused(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_run_on_an_optimizer_with_tensor_rates_can_be_drawn() -> None:
    optimizer = sgd(torch.tensor(0.1))
    recorder = LRRecorder(optimizer)
    scheduler = schedules.get_linear_schedule_with_warmup(optimizer, 2, 10)
    for _ in range(5):
        advance(scheduler)
    assert "now: step 5" in " ".join(lines(plot_schedule(scheduler)))
    assert plot_verification(recorder, scheduler).axes[0].get_title(loc="left") == "the run followed the schedule"
