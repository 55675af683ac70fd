"""The primers: launches are counted as torch counts them, and each page shows what its run prints."""

import doctest
import re

import pytest
from helpers.precision import FROZEN

from perf import report, results
from perf.primers import clipping, launches, second_moment, weight_decay
from perf.primers.__main__ import PRIMERS
from perf.primers.launches import Limits

OLD = Limits("4 KB", [110, 64, 48, 36, 30], [320] * 5, 65_536)
NEW = Limits("32 KB", [770, 448, 336, 252, 210], [2240] * 5, 65_536)


def documented(name: str) -> str:
    page = (results.ROOT / "docs" / "primers" / f"{name}.md").read_text()
    return re.findall(r"(?s)<!-- numbers -->\n(.*?)<!-- /numbers -->", page)[0].strip()


def test_the_limits_are_those_of_the_installed_torch():
    assert [limit[1:] for limit in launches.limits()] == [NEW[1:], OLD[1:]]


@pytest.mark.parametrize(
    ("sizes", "lists", "expected"),
    [
        ([], 4, 0),
        ([0, 0], 4, 0),
        ([1] * 36, 4, 1),
        ([1] * 37, 4, 2),
        ([65_536 * 320], 1, 1),
        ([65_536 * 320 + 1], 1, 2),
        ([65_536 * 319] + [1] * 36, 4, 2),  # the first is full of blocks, the second of what is left
        ([65_536 * 400] + [1] * 35, 4, 2),  # a tensor that is cut in two counts in both launches
        ([65_536 * 400] + [1] * 36, 4, 3),
    ],
)
def test_launches_of_torch(sizes, lists, expected):
    assert launches.launches(sizes, lists, OLD) == expected


def test_clipping_has_more_launches_than_fused_adamw():
    for workload in launches.MODELS.values():
        sizes = launches.sizes_of(workload)
        for limit in (OLD, NEW):
            assert launches.clipping(sizes, limit) >= 2 * launches.fused_adamw(sizes, limit)


@pytest.mark.parametrize("name", ["launches", "clipping"])
def test_what_is_counted_is_in_the_page(name):
    assert documented(name) == report.table(PRIMERS[name].run().rows, markdown=True)


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
@pytest.mark.parametrize("name", ["weight-decay", "second-moment"])
def test_what_is_run_is_in_the_page(name):
    assert documented(name) == report.table(PRIMERS[name].run().rows, markdown=True)


@pytest.mark.filterwarnings(FROZEN)
def test_a_hundred_steps_show_where_it_goes():
    left = {name: weight_decay.shares(make, dtype, 100)[0][-1] for name, (make, dtype, _) in weight_decay.RUNS.items()}
    right = (1 - 1e-4) ** 100
    assert list(left.values()) == pytest.approx([right, 1.0, 1.0, right, right], abs=2e-4)
    excess = [second_moment.excess(options, 100)[-1] for options, _ in second_moment.RUNS.values()]
    assert excess == pytest.approx([1.05, 1.0, 1.0, 1.0], abs=0.005)


def test_times_are_those_of_a_run():
    row = clipping.run().rows[-1]
    assert float(row["clip_grad_norm_"]) > 0.5 * float(row["fused AdamW"])


def test_examples_in_docstrings():
    found = doctest.testmod(launches)
    assert found.attempted and not found.failed
