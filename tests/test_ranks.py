"""`check_ranks`: where processes disagree about a step, all of them raise, and none has taken it."""

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


@pytest.mark.parametrize("name", two.OPTIMIZERS)
def test_a_process_that_failed_before_the_comparison_is_found_at_its_next_step(results, name):
    (first, first_loaded), (second, second_loaded) = of_all(results, "lost", name, "before")
    assert second[0] == "RuntimeError: out of memory"
    assert first == second[1:] and "the number of this step is 1 on rank 0 and 2 on rank 1" in first[0]
    assert first_loaded is second_loaded is None


@pytest.mark.parametrize("name", [name for name in two.OPTIMIZERS if name != "Adafactor"])
def test_a_process_that_failed_after_the_comparison_does_not_go_on(results, name):
    """Nor does it send anything, which others could take for what they wait for."""
    (first, first_loaded), (second, second_loaded) = of_all(results, "lost", name, "after")
    assert (first, second[0]) == ([None], "RuntimeError: out of memory")
    assert second[1].startswith("RuntimeError: a step of this process failed after all processes had compared")
    assert first_loaded is second_loaded is None


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
