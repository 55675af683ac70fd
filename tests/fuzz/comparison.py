"""Whether a step has left what it should, and everything else alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from helpers.comparing import assert_same
from torch import Tensor

from fuzz import formulas
from fuzz.bounds import FLOAT64, Bound, arithmetic_of, exact, misfit
from fuzz.expectation import Expected, rounds_moments, state_specs, weight_of
from fuzz.setups import HALVES, options_of

if TYPE_CHECKING:
    from fuzz.training import Training


def check(
    training: Training, expected: dict[Tensor, Expected], norm: Bound | None, skipped: bool, before: Snapshot
) -> None:
    training.calls += 1
    training.iterations += not skipped
    wrong: list[str | None] = []
    for i, (p, group) in enumerate(training.pairs):
        own, name = expected[p], f"parameter {i}"
        state = training.optimizer.state.get(p, {})
        if not own.state:
            if state:
                wrong.append(f"{name} has a state")
            continue
        if set(state) != {"step", *own.state}:
            wrong.append(f"{name} has the state {sorted(state)}, expected {sorted(own.state)}")
            continue
        if float(state["step"]) != own.count:
            wrong.append(f"{name} counts {float(state['step'])} updates, expected {own.count}")
        wrong += wrong_state(training, p, group, own, state, name)
    before.check_around(training, {p for p in expected if expected[p].moved})
    wrong_verdict(training, norm, wrong)
    if training.setup.name == "AdamWeightDecay" and training.optimizer.iterations != training.iterations:
        wrong.append(f"iterations are {training.optimizer.iterations}, expected {training.iterations}")
    wrong_statistics(training, expected, wrong, norm is not None)
    found = [message for message in wrong if message]
    assert not found, "\n".join(found)


def wrong_state(
    training: Training, p: Tensor, group: dict[str, Any], own: Expected, state: dict[str, Tensor], name: str
) -> list[str | None]:
    wrong: list[str | None] = []
    words = None
    if "number" in own.state:
        number = int(state["number"])
        if training.numbers.setdefault(p, number) != number or number < 0:
            wrong.append(f"{name} has the number {number}, had {training.numbers[p]}")
        words = formulas.random_words(training.optimizer.seed, number, int(own.count), p.numel()).reshape(p.shape)
    for key, value in own.state.items():
        if key in ("number", "remainder", "master_weight") and own.moved and key in state_specs(training, p, group):
            continue
        if not isinstance(value, Bound):
            if key != "number" and not (same_bits(state[key], value)):
                wrong.append(f"{key} of {name} was changed")
            continue
        bits = None
        if words is not None and key == "exp_avg_sq" and state[key].dtype in HALVES and rounds_moments(group):
            bits = words >> np.uint32(16) if state[key].dtype == torch.bfloat16 else words >> np.uint32(19)
        wrong.append(misfit(state[key], value, bits, f"{key} of {name}"))
        expected_dtype = dtype_of(training, p, group, key)
        if expected_dtype is not None and state[key].dtype != expected_dtype:
            wrong.append(f"{key} of {name} is {state[key].dtype}, expected {expected_dtype}")
    if not own.moved:
        return wrong
    if group["master_weights"] and p.dtype in HALVES:
        wrong.append(misfit(weight_of(p, state, True), own.weight, None, f"float32 weight of {name}"))
        if p.dtype == torch.float16 and not same_bits(p.detach(), state["master_weight"].half()):
            wrong.append(f"{name} is not its master weight rounded")
    elif group["stochastic_rounding"] and p.dtype in HALVES:
        assert words is not None
        bits = words & np.uint32(0xFFFF) if p.dtype == torch.bfloat16 else words & np.uint32(0x1FFF)
        wrong.append(misfit(p, own.weight, bits, name))
    else:
        wrong.append(misfit(p, own.weight, None, name))
    return wrong


def dtype_of(training: Training, p: Tensor, group: dict[str, Any], key: str) -> torch.dtype | None:
    """The dtype that a state must have; None where that depends on what was loaded."""
    if training.setup.name == "Adafactor" or rounds_moments(group):
        return state_specs(training, p, group).get(key)
    return None


def wrong_verdict(training: Training, norm: Bound | None, wrong: list[str | None]) -> None:
    guarded = training.options_of_all & {"max_grad_norm", "skip"}
    if norm is not None and guarded:
        wrong.append(misfit(training.optimizer.grad_norm, norm, None, "grad_norm"))
    counted = training.optimizer.skipped_steps
    if counted is not None and dict(counted) != training.reasons:
        wrong.append(f"skipped steps are {dict(counted)}, expected {training.reasons}")
    if norm is not None and training.setup.options.get("skip_outliers"):
        saved = training.optimizer.state_dict()["param_groups"][0]["grad_norm_average"]
        for name, value in zip(("count", "mean", "variance"), saved, strict=True):
            expected = getattr(training.averages, name)
            wrong.append(misfit(torch.tensor(value, dtype=torch.float64), expected, None, f"{name} of norms"))
        training.averages = formulas.Averages(*saved)


def wrong_statistics(
    training: Training, expected: dict[Tensor, Expected], wrong: list[str | None], measured: bool
) -> None:
    every = training.setup.options.get("track_statistics")
    if not every or not measured or (training.calls - 1) % int(every):
        return
    rows = training.optimizer.statistics.tensor.numpy()
    for i, (p, group) in enumerate(training.pairs):
        own, row = expected[p], rows[i]
        if own.grad_norm is None:
            if not np.isnan(row).all():
                wrong.append(f"statistics of parameter {i}, which had no gradient, are {row}")
            continue
        old = Bound.of(exact(own.old), arithmetic_of(p.dtype))
        change = own.weight - old if own.moved else Bound.of(np.zeros_like(old.value), old.kind)
        update, weight = change.norm(), old.norm()
        largest = abs(change.value).max(initial=0.0), change.error.max(initial=0.0)
        for name, value, bound in zip(
            ("grad_norm", "weight_norm", "update_norm", "largest_update", "update_to_weight"),
            row,
            (
                own.grad_norm,
                weight,
                update,
                Bound(np.asarray(largest[0]), np.asarray(largest[1]), update.kind),
                update / weight,
            ),
        ):
            actual = torch.tensor(value, dtype=torch.float64)
            if bound.kind is not FLOAT64 and not np.isnan(bound.value):
                bound = bound * 1.0
            wrong.append(misfit(actual, bound, None, f"{name} of parameter {i}"))
        low = high = 0.0
        if own.moved and p.dtype in HALVES and not group["master_weights"] and p.numel():
            kept = exact(p) == exact(own.old)
            low = float((kept & (abs(change.value) > change.error)).mean())
            high = float((kept & ((change.value != 0.0) | (change.error > 0.0))).mean())
        if not low - 1e-12 <= row[5] <= high + 1e-12:
            wrong.append(f"lost of parameter {i} is {row[5]}, expected {low} to {high}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if shape, dtype and bits agree; NaN equals NaN."""
    try:
        assert_same(a, b, equal_nan=True)
    except AssertionError:
        return False
    return True


class Snapshot:
    """Everything that a step could change, as it was."""

    def __init__(self, training: Training) -> None:
        optimizer = training.optimizer
        self.params = [p.detach().clone() for p in training.params]
        self.states = {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items() if s}
        self.options = [options_of(group) for group in optimizer.param_groups]
        self.members = [list(map(id, group["params"])) for group in optimizer.param_groups]
        self.places = [(p.data_ptr(), p.stride(), p.shape, p.dtype) for p in training.params]
        self.memory = {p.untyped_storage().data_ptr(): (p, flat_of(p).clone()) for p in training.params}
        self.reasons = None if optimizer.skipped_steps is None else dict(optimizer.skipped_steps)

    def check_same(self, training: Training) -> None:
        """Fails if anything has changed since."""
        optimizer = training.optimizer
        assert_same([p.detach() for p in training.params], self.params, "parameters", equal_nan=True)
        self.check_states(training)
        self.check_around(training, set())
        reasons = None if optimizer.skipped_steps is None else dict(optimizer.skipped_steps)
        assert reasons == self.reasons

    def check_states(self, training: Training) -> None:
        """Fails if a state has changed since."""
        now = {p: s for p, s in training.optimizer.state.items() if s}
        assert now.keys() == self.states.keys(), "states were made, or dropped"
        for i, (p, state) in enumerate(self.states.items()):
            assert_same(now[p], state, f"state {i}", equal_nan=True)

    def check_around(self, training: Training, moved: set[Tensor]) -> None:
        """Fails if options, places, or what lies in memory beside the parameters that moved, have changed."""
        options = [options_of(group) for group in training.optimizer.param_groups]
        for now, then in zip(options, self.options, strict=True):
            ignored = {"iterations", "grad_norm_average", *(["lr"] if training.scheduled else [])}
            assert {k: v for k, v in now.items() if k not in ignored} == {
                k: v for k, v in then.items() if k not in ignored
            }
        assert [list(map(id, group["params"])) for group in training.optimizer.param_groups] == self.members
        places = [(p.data_ptr(), p.stride(), p.shape, p.dtype) for p in training.params]
        assert places == self.places, "a parameter has another place in memory"
        for _, (p, then) in self.memory.items():
            written = torch.zeros(then.shape, dtype=torch.bool)
            for q in training.params:
                if q in moved and q.untyped_storage().data_ptr() == p.untyped_storage().data_ptr():
                    written.as_strided(q.shape, q.stride(), q.storage_offset()).fill_(True)
            assert_same(flat_of(p)[~written], then[~written], "memory beside a parameter", equal_nan=True)


def flat_of(p: Tensor) -> Tensor:
    """The whole storage of a parameter."""
    return torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())  # type: ignore[call-overload]
