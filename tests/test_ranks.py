"""`check_ranks`: where processes disagree about a step, all of them raise, and none has taken it."""

import math

import pytest
import ranks_on_two_processes as two
import torch
from helpers.comparing import assert_near, assert_same
from helpers.processes import run_together

from fusedopt import AdamW, register_step_in_backward

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]  # one start of the processes

SAYS = {
    "a gradient is missing": "the gradient of parameter first, of shape (4, 3), is there on rank 0 and missing on",
    "a parameter is frozen": "the gradient of parameter second, of shape (4, 3), is there on rank 0 and missing on",
    "another rate": "of group 0 is 0.1 on rank 0 and 0.3 on rank 1",
    "an option that is refused": "what keeps a process from the step is None on rank 0 and ValueError: weight_decay",
    "no state": "the state of parameter first, of shape (4, 3), is there on rank 0 and missing on rank 1",
    "another limit": "skip_grad_norm_above is None on rank 0 and 5.0 on rank 1",
    "NaN": "the sum of squares of the gradients that they share is [2",
    "another gradient": "the sum of squares of the gradients that they share is [2",
    "one group more": "the number of groups is 1 on rank 0 and 2 on rank 1",
    "a load": "the number of this step is 2 on rank 0 and 1 on rank 1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two_processes")


@pytest.fixture(scope="module")
def results(folder):
    """What each of two processes has seen."""
    run_together(two.__file__, 2, folder, timeout=300, killed=1)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def of_all(results, *key):
    return [each[key] for each in results]


@pytest.mark.parametrize("name, spoilt, layout", two.cases())
def test_processes_that_differ_raise_together_or_do_the_same(results, name, spoilt, layout):
    first, second = each = of_all(results, name, spoilt, layout)
    if spoilt in ("NaN", "another gradient") and layout == "rows":  # A shard is of one process alone.
        assert first["error"] is second["error"] is None
        if (name, spoilt) == ("AdamW-skipping", "NaN"):  # Its NaN is in the norm of all.
            for one in each:
                assert_same(one["after"], one["before"])
        return
    assert first["error"].startswith("RuntimeError: the processes disagree about a step: ")
    assert SAYS[spoilt] in first["error"]
    if spoilt == "an option that is refused":
        assert second["error"].startswith("ValueError: weight_decay must be finite and >= 0, got -1.0")
    else:
        assert second["error"] == first["error"]
    for one in each:
        assert_same(one["after"], one["before"], equal_nan=True)


@pytest.mark.parametrize("name", two.OPTIMIZERS)
@pytest.mark.parametrize("layout", two.LAYOUTS)
def test_the_check_changes_nothing_and_costs_one_all_reduce(results, name, layout):
    for (checked, more), (plain, calls) in of_all(results, "undisturbed", name, layout):
        assert_same(checked, plain)
        assert more == calls + 3


@pytest.mark.parametrize("where", two.RAISES)
@pytest.mark.parametrize("name", two.OPTIMIZERS)
def test_what_one_process_raises_before_the_comparison_is_told_at_once(results, name, where):
    """And all of them can take the step then."""
    first, second = each = of_all(results, "raised", name, where)
    assert not second["error"].startswith("RuntimeError: the processes")
    theirs = second["error"].partition("\n")[0]
    assert first["error"].startswith(
        f"RuntimeError: the processes disagree about a step: what keeps a process from the step is None on rank 0 and "
        f"{theirs} on rank 1, where that error itself stands; no process has taken the step"
    )
    for one in each:
        assert one["seconds"] < 30  # half the timeout of the process group
        assert one["again"] is None
        assert_same(one["after"], one["before"])
    assert first["end"] == second["end"]


FAILED = "RuntimeError: a step of this process failed after all processes had compared gradients and options, so that"


@pytest.mark.parametrize(
    "name, layout", [(n, at) for n in two.OPTIMIZERS for at in ("whole", "rows") if (n, at) != ("Adafactor", "rows")]
)
def test_a_process_that_failed_after_the_comparison_is_found_at_the_next_step(results, name, layout):
    """A second try sends nothing, which others could take for what they wait for."""
    (first, retried, *others, first_loaded), (second, again, *more, second_loaded) = of_all(
        results, "lost", name, layout
    )
    assert first is retried is None
    assert second == f"RuntimeError: {two.PLANTED}"
    assert all(error.startswith(FAILED) for error in (again, *more))
    for error in others:
        assert f"what keeps a process from the step is None on rank 0 and {FAILED}" in error
    assert first_loaded is second_loaded is None


def test_a_process_that_others_wait_for_sends_nothing_but_their_sums(results):
    (error, norm), outcomes = of_all(results, "waited for")
    assert error is None
    assert norm == pytest.approx(math.sqrt(3.0 + 2 * 2 * 3), rel=1e-6)  # of two halves of two gradients of ones
    assert outcomes[0] == f"RuntimeError: {two.PLANTED}"
    assert all(outcome.startswith(FAILED) for outcome in outcomes[1:])


def test_a_process_that_was_interrupted_or_ran_out_of_memory_goes_on_with_other_gradients(results):
    """And counts that step once."""
    first, second = of_all(results, "went on")
    interrupted, unprintable, out_of_memory = first[:4], first[4:8], first[8:]
    assert interrupted[:3] == second[:3] == [None] * 3
    assert unprintable[0] is None and "UnprintableError on rank 1" in unprintable[1] and unprintable[2] is None
    assert second[4:6] == [None] * 2 and second[8].startswith("OutOfMemoryError")
    assert out_of_memory[:3] == [None] * 3 and second[-2] is None
    assert_same([first[3], first[7], first[-1]], [second[3], second[6], second[-1]])


@pytest.mark.parametrize("name", two.OPTIMIZERS)
def test_out_of_memory_in_one_process(results, name):
    """At any allocation: all raise, or the others have taken the step, and this one does too, or is found."""
    (first, straight), (second, also_straight) = of_all(results, "out of memory", name)
    assert_same(straight, also_straight)
    assert len(first) == len(second) > 3
    for one, other in zip(first, second):
        assert other["error"].startswith("OutOfMemoryError")
        if one["told"]:
            assert "OutOfMemoryError" in one["error"] and "where that error itself stands" in one["error"]
            assert one["again"] is other["again"] is one["next"] is other["next"] is None
            assert_same([one["end"], other["end"]], [straight, straight])
        elif one["goes_on"]:
            assert other["again"] is one["next"] is other["next"] is None
            assert_same([one["after"], other["end"]], [straight, straight])
        else:
            assert_same(one["after"], straight)
            assert other["next"].startswith(FAILED) and FAILED in one["next"]
    kinds = [(row["told"], row["goes_on"]) for row in first]
    assert {(True, False), (False, True)} <= set(kinds)


def test_a_process_that_is_killed_ends_the_steps_of_the_others(results, folder):
    """With an error of the process group, not after its timeout."""
    found = torch.load(folder / "killed.pt")
    for name, (error, seconds, before, after) in found.items():
        assert error is not None and error.startswith("RuntimeError"), name
        assert seconds < 30, name
        if "checked" in name:
            assert_same(after, before, name)


def test_nothing_is_compared_by_a_process_that_is_alone():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1, check_ranks=True)
    optimizer.apply_gradients([(torch.ones(3), p)])
    assert_near(p.detach(), torch.full((3,), 0.9), rtol=1e-5)
    assert optimizer.defaults["check_ranks"]


def test_a_check_of_ranks_is_refused_where_parameters_are_updated_one_by_one():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="check_ranks=True"):
        register_step_in_backward(AdamW(model.parameters(), check_ranks=True), model)
    with pytest.raises(ValueError, match="check_ranks must be True or False, got 1"):
        AdamW([torch.nn.Parameter(torch.ones(3))], check_ranks=1)
