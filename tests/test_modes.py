"""Inference mode and fake tensors: what is made in a mode is not kept beyond it."""

import copy
import gc
import types
from typing import Any

import pytest
import torch
from helpers.comparing import assert_same
from helpers.surroundings import (
    DEVICE,
    MAKE,
    both_backends,
    every_optimizer,
    in_a_thread,
    outcome,
    parameters,
    step,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedopt import AdamW, GradientAccumulator
from fusedopt.backends import scratch
from fusedopt.backends.triton import capture


def reachable(*roots: Any) -> list[Tensor]:
    """All tensors that are kept by these objects."""
    seen: set[int] = set()
    found, todo = [], list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (types.ModuleType, type, types.FunctionType)):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
        else:
            todo.extend(gc.get_referents(one))
    return found


@every_optimizer
@both_backends
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_steps_in_inference_mode_and_outside_of_it_follow_each_other(name, backend, dtype):
    def run(modes: list[bool]) -> list[Tensor]:
        optimizer = MAKE[name](parameters(backend, dtype), backend=backend)
        for number, mode in enumerate(modes):
            with torch.inference_mode(mode):
                step(optimizer, number, dtype)
        if modes[0]:
            optimizer.zero_grad()
            kept = reachable(optimizer.__dict__, scratch.scratch._flat, capture._reserves)
            assert kept and not any(t.is_inference() for t in kept)
        return outcome(optimizer)

    assert_same(in_a_thread(lambda: run([True, False, True, False])), in_a_thread(lambda: run([False] * 4)))


@both_backends
def test_sums_that_began_in_inference_mode_go_on_outside_of_it(backend):
    accumulator = GradientAccumulator(backend=backend)
    for mode in (True, False):
        with torch.inference_mode(mode):
            accumulator([torch.ones(3, device=DEVICE)])
    assert accumulator.gradients[0].tolist() == [2.0] * 3


@both_backends
def test_a_state_loaded_in_inference_mode_can_be_updated_outside_of_it(backend):
    optimizer = AdamW(parameters(backend), backend=backend)
    step(optimizer, 1)
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, 2)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@every_optimizer
@both_backends
def test_parameters_made_in_inference_mode_are_updated_there_and_refused_elsewhere(name, backend):
    with torch.inference_mode():
        optimizer = MAKE[name](parameters(backend), backend=backend)
        step(optimizer, 1)
    expected = MAKE[name](parameters(backend), backend=backend)
    step(expected, 1)
    assert_same(outcome(optimizer), outcome(expected))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was made in torch"):
            step(optimizer, 2)
    assert_same(outcome(optimizer), outcome(expected))


def test_scratch_memory_made_under_a_mode_of_fake_tensors_is_not_kept():
    def work() -> list[Tensor]:
        with FakeTensorMode():
            scratch.scratch.like(torch.empty(3, dtype=torch.float32, device="cpu"), "gradient", torch.float32)
        assert not scratch.scratch._flat
        optimizer = AdamW(parameters(dtype=torch.bfloat16), lr=0.1, max_grad_norm=0.1, backend="eager")
        step(optimizer, 1, torch.bfloat16)
        return outcome(optimizer)

    expected = AdamW(parameters(dtype=torch.bfloat16), lr=0.1, max_grad_norm=0.1, backend="eager")
    step(expected, 1, torch.bfloat16)
    assert_same(in_a_thread(work), outcome(expected))


def test_a_launch_table_that_could_not_be_copied_is_copied_at_the_next_step():
    from fusedopt_kernels.table import LaunchTable, np, upload

    failing = [True]

    def copied(host: Any, device: torch.device) -> Tensor:
        if failing.pop():
            raise torch.OutOfMemoryError("no memory")
        return upload(host, device)

    failing = [False, True]
    table = LaunchTable(torch.device(DEVICE), copied)
    rows, hyper = np.ones((1, 2), np.int64), np.full((1, 2), 7, np.int64)
    with pytest.raises(torch.OutOfMemoryError):
        table.update(rows, hyper)
    table.update(rows, hyper)
    assert table.hyper.tolist() == [[7, 7]]
