"""What steps leave behind, by name, and how far those of two backends may be apart."""

from collections.abc import Sequence
from typing import Any

import torch
from helpers.comparing import Tolerance, assert_near
from torch import Tensor

from fusedopt_kernels.measures import PLACES

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Outcome = dict[str, Tensor]

_PARAMETERS = {
    F32: Tolerance("a few float32 roundings per step", rtol=2e-6, atol=2e-6),
    F64: Tolerance("a few float64 roundings per step", rtol=1e-12, atol=1e-12),
    BF16: Tolerance("a tie may fall to the other side", ulps=1, of_largest=2**-13),
    F16: Tolerance("a tie may fall to the other side", ulps=1, of_largest=2**-16),
}
_STATES = {
    F32: Tolerance("sums in another order, which may cancel", rtol=2e-6, of_largest=2e-6, ulps=1),
    F64: Tolerance("sums in another order, which may cancel", rtol=1e-12, of_largest=1e-12),
    BF16: Tolerance("a tie may fall to the other side, and again at the next step", ulps=2, of_largest=2**-13),
    F16: Tolerance("a tie may fall to the other side", ulps=1, of_largest=2**-16),
}
_STATISTICS_READ = Tolerance("norms of float32 numbers, which eager steps add up in float32 by pieces", rtol=5e-7)
_SUM_OF_SQUARES = Tolerance("float32 squares, summed in another order", rtol=1e-6)


def _of_updates(statistics: Tensor) -> Tolerance:
    """For what is measured of a parameter, whose weights are no larger than their norm."""
    unit = 2**-23 * statistics[PLACES.weight].nan_to_num(0.0, 0.0).item()
    return Tolerance("updates are differences of float32 weights: one unit of a weight", rtol=2e-5, atol=unit + 1e-30)


def assert_agree(actual: Outcome, expected: Outcome, parameters: Tolerance | None = None) -> None:
    """Asserts that two backends did the same; parameters may have a tolerance of their own."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = _STATES.get(value.dtype) if "." in name else parameters or _PARAMETERS.get(value.dtype)
        if name == "statistics":
            read = slice(None), [PLACES.gradient, PLACES.weight]
            assert_near(actual[name][read], value[read], _STATISTICS_READ, name=name, equal_nan=True)
            for k, (row, right) in enumerate(zip(actual[name], value)):
                assert_near(row, right, _of_updates(right), name=f"{name}[{k}]", equal_nan=True)
            continue
        if name == "grad_norm":
            tolerance = _SUM_OF_SQUARES
        elif name.endswith(".remainder"):  # part of a weight, which is compared as a whole
            continue
        assert_near(actual[name], value, tolerance, name=name, equal_nan=True)


def states_of(optimizer: Any, params: Sequence[Tensor]) -> Outcome:
    """Parameters and what is kept of them, by name."""
    found = {f"p{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        for name, value in optimizer.state.get(p, {}).items():
            found[f"p{i}.{name}"] = torch.as_tensor(value).clone()
    return with_float32_weights(found)


def with_float32_weights(outcome: Outcome) -> Outcome:
    """Adds the weights that bfloat16 parameters and remainders make."""
    weights = {}
    for name, value in outcome.items():
        if name.endswith(".remainder"):
            p = outcome[name.removesuffix(".remainder")].contiguous()
            bits = (p.view(torch.int16).to(torch.int64) << 16) + value.contiguous().to(torch.int64)
            weight = (((bits + 2**31) % 2**32) - 2**31).to(torch.int32).view(F32)
            weights[name.removesuffix("remainder") + "weight"] = torch.where(p.isnan(), torch.nan, weight)
    return outcome | weights
