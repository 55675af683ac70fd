"""How tests are built: comparisons that say what differs, one table of optimizers, no test file that needs another."""

import ast
from pathlib import Path

import pytest
import torch
from helpers.comparing import Tolerance, assert_near, assert_same, same
from helpers.optimizers import OPTIMIZERS, VARIANTS

import fusedopt

TESTS = Path(__file__).parent
ONES, NAN = torch.ones(2, 2), torch.full((2,), torch.nan)
LAST = torch.tensor([[1.0, 1.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ({"a": [ONES, ONES]}, {"a": [ONES, LAST]}, "w['a'][1][1, 1] is 1.0, expected 2.0 (1 of 4 elements differ)"),
        (ONES, ONES.double(), "w is of torch.float32, expected torch.float64"),
        (ONES, ONES[0], "w has shape (2, 2), expected (2,)"),
        (torch.zeros(1), -torch.zeros(1), "w[0] is 0.0, expected -0.0 (1 of 1 elements differ)"),
        (NAN, NAN, "w[0] is nan, expected nan, where no NaN may be (2 of 2 elements differ)"),
        ([1.5, True], [1.5, False], "w[1] is True, expected False"),
        ([ONES], [ONES, ONES], "w has 1 elements, expected 2"),
        ({"a": 1}, {"b": 1}, """w lacks ["'b'"] and has ["'a'"] besides"""),
        (1, torch.tensor(1), "w is 1, expected tensor(1)"),
    ],
)
def test_the_first_difference_is_named(actual, expected, message):
    with pytest.raises(AssertionError) as failure:
        assert_same(actual, expected, "w")
    assert str(failure.value) == message
    assert not same(actual, expected)


def test_what_is_equal_to_the_bit_is_the_same():
    model = torch.nn.Linear(2, 2)
    values = {"model": model, "list": [ONES, 3, None, "a"], "empty": torch.zeros(0), "bools": ONES > 0}
    assert_same(values, {**values, "list": (ONES.clone(), 3, None, "a")})
    assert_same(NAN, -NAN, equal_nan=True)
    with pytest.raises(AssertionError, match=r"^\['weight'\]\[0, 0\] is "):
        assert_same(model, torch.nn.Linear(2, 2))


def test_the_element_that_is_furthest_from_its_tolerance_is_named():
    expected = torch.tensor([1.0, 2.0, 4.0])
    assert_near(expected + 1e-3, expected, atol=1.1e-3)
    assert_near([0.1 + 0.2], [0.3], rtol=1e-15)
    message = r"^w\[1\] is 2.5, expected 2.0: 0.5 apart, 2.5 times what is allowed for 'a reason' \(2 of 3 elements"
    with pytest.raises(AssertionError, match=message):
        assert_near(torch.tensor([1.2, 2.5, 4.1]), expected, Tolerance("a reason", rtol=0.1), name="w")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_near_itself_alone(wrong):
    value = torch.tensor([1.0, wrong])
    assert_near(value, value, rtol=0.1, equal_nan=True)
    for one, other in ((value, torch.ones(2)), (torch.ones(2), value), (value, -value.nan_to_num(0.0))):
        with pytest.raises(AssertionError, match=r"^the value\[1\]"):
            assert_near(one, other, rtol=0.1, atol=1.0, equal_nan=True)


def test_every_optimizer_has_a_row():
    classes = {
        name
        for name in fusedopt.__all__
        if isinstance(cls := getattr(fusedopt, name), type) and issubclass(cls, torch.optim.Optimizer)
    }
    assert {row.cls.__name__ for row in OPTIMIZERS.values()} == classes - {"FusedOptimizer"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_makes_new_options_for_every_optimizer(name):
    """One that writes into its learning rate, or into a list, changes no other."""
    one, other = (VARIANTS[name](torch.nn.Linear(2, 3)) for _ in range(2))
    for group, second in zip(one.param_groups, other.param_groups):
        shared = [key for key, value in group.items() if isinstance(value, torch.Tensor) and second[key] is value]
        assert type(one) is VARIANTS[name].cls and not shared


@pytest.mark.parametrize("path", sorted(TESTS.glob("test_*.py")), ids=lambda path: path.stem)
def test_no_test_file_imports_another(path):
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in found for alias in node.names} | {getattr(node, "module", None) for node in found}
    assert not {name for name in names if name and (TESTS / f"{name}.py").exists() and name.startswith("test_")}
