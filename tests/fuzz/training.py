"""A training run under test: an optimizer that takes steps, each of which is compared with what it should leave."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from helpers.comparing import assert_same
from torch import Tensor

from fusedopt import register_step_in_backward
from fuzz import expectation, formulas
from fuzz.comparison import Snapshot, check
from fuzz.interpreter import read_bfloat16_exactly
from fuzz.setups import CLASSES, LAYOUTS, Grads, Setup, drawn, made, name_of

REASONS = ("nonfinite", "grad_norm_above", "outliers")


@dataclass
class Training:
    """An optimizer, its parameters, and what is known of them beside them."""

    setup: Setup
    params: list[torch.nn.Parameter] = field(default_factory=list)
    calls: int = 0
    """Of `step`, since the optimizer was made or copied."""
    iterations: int = 0
    """Of AdamWeightDecay."""

    def __post_init__(self) -> None:
        self.cls = CLASSES[self.setup.name]
        self.counts: dict[Tensor, float] = {}
        self.numbers: dict[Tensor, int] = {}
        self.scheduled = callable(self.setup.options.get("learning_rate"))
        self.reasons = dict.fromkeys(REASONS, 0)
        self.averages = formulas.Averages()
        specs = [spec for group in self.setup.groups for spec in group.specs]
        self.params = made(specs, seed=1000)
        left = list(self.params)
        groups = []
        for group in self.setup.groups:
            own, left = left[: len(group.specs)], left[len(group.specs) :]
            groups.append({"params": self.named(own), **copy.deepcopy(group.options)})
        self.optimizer = self.make(groups, self.setup.backend)

    def make(self, groups: list[dict[str, Any]], backend: str) -> Any:
        if backend == "triton":
            read_bfloat16_exactly()
        return self.cls(groups, **copy.deepcopy(self.setup.options), backend=backend)

    def named(self, params: Sequence[Tensor]) -> list[Any]:
        """Parameters with names for AdamWeightDecay, whose decay goes by them: every third is a bias."""
        places = {p: i for i, p in enumerate(self.params)}
        return [(name_of(places[p]), p) for p in params] if self.setup.name == "AdamWeightDecay" else list(params)

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def pairs(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters in the order of the groups, with their group."""
        return [(p, group) for group in self.groups for p in group["params"]]

    @property
    def shares_counts(self) -> bool:
        return self.setup.name == "AdamWeightDecay" or self.setup.options.get("convention") == "keras"

    # One step.

    def step(self, how: Grads) -> None:
        """Takes a step, and fails where anything is not as it should be."""
        if how.way == "unscaled" and any(p.dtype == torch.float16 for p in self.params):
            how = how._replace(way="scaler")  # torch unscales no float16 gradients
        grads = self.gradients(how)
        scaler = self.scaler_of(how, grads)
        present = {p: g for p, g in grads.items() if g is not None}
        unneeded = self.refusal_of(how, present)
        before = Snapshot(self)
        if unneeded is not None:
            try:
                self.take(how, grads, scaler)
            except unneeded:
                before.check_same(self)
                return
            finally:
                self.forget_gradients()
            raise AssertionError(f"a step by the way {how.way!r} should raise {unneeded.__name__}")
        factor, found_inf = formulas.scalar(1.0), False
        if how.way == "apply":
            factor = formulas.scalar(how.scale)
        if scaler is not None:
            found_inf = not all(bool(g.isfinite().all()) for g in present.values())
            factor = factor if how.way == "unscaled" else 1.0 / formulas.scalar(scaler.get_scale())
        with np.errstate(all="ignore"):
            expected, norm, skipped = expectation.expected(self, present, factor, found_inf)
        bits = {p: g.clone() for p, g in present.items()}
        versions = {p: p._version for p in present}
        self.take(how, grads, scaler)
        with np.errstate(all="ignore"):
            check(self, expected, norm, skipped, before)
        if how.way != "backward":
            assert_same([present[p] for p in bits], list(bits.values()), "gradients", equal_nan=True)
        assert all(p._version > versions[p] for p in versions), "autograd does not know that a parameter was written to"
        self.forget_gradients()

    def refusal_of(self, how: Grads, present: dict[Tensor, Tensor]) -> type[Exception] | None:
        """The error that this way of a step should raise, None for none."""
        if how.way == "backward" and self.options_of_all & {"max_grad_norm", "skip", "global_clipnorm"}:
            return ValueError
        if how.way == "apply" and self.setup.name == "AdamWeightDecay" and not present:
            return ValueError
        return None

    @property
    def options_of_all(self) -> set[str]:
        given = {name for name, value in self.setup.options.items() if value is not None and value is not False}
        return given | ({"skip"} if any(name.startswith("skip_") for name in given) else set())

    def gradients(self, how: Grads) -> dict[Tensor, Tensor | None]:
        """One per parameter of the groups."""
        grads: dict[Tensor, Tensor | None] = {}
        params = [p for p, _ in self.pairs]
        for i, p in enumerate(params):
            if i in how.missing or not p.requires_grad:
                grads[p] = None
                continue
            values = drawn(7919 * how.seed + i, p.shape) * how.size
            if how.way == "scaler" or how.way == "unscaled":
                values = values * how.scale
            if how.poison is not None and i == how.seed % len(params) and p.numel():
                values.view(-1)[how.seed % p.numel()] = how.poison
            dtype = how.dtype if how.way == "apply" and how.dtype is not None else p.dtype
            values = values.to(dtype)
            if how.layout == "expanded" and how.way not in ("scaler", "unscaled"):  # which write to gradients
                grads[p] = values.flatten()[:1].sum().expand(p.shape)
            else:
                grads[p] = LAYOUTS.get(how.layout, LAYOUTS["contiguous"])(values)
        return grads

    def take(self, how: Grads, grads: dict[Tensor, Tensor | None], scaler: torch.amp.GradScaler | None) -> None:
        """Takes a step by this way."""
        optimizer = self.optimizer
        if how.way == "apply":
            optimizer.apply_gradients([(g, p) for p, g in grads.items()], scale=how.scale)
            return
        if how.way == "backward":
            self.in_backward({p: g for p, g in grads.items() if g is not None})
            return
        if how.way == "closure":

            def closure() -> float:
                assert torch.is_grad_enabled()
                for p, g in grads.items():
                    p.grad = g
                return 1.25

            assert optimizer.step(closure) == 1.25
            return
        for p, g in grads.items():
            p.grad = g
        if scaler is None:
            optimizer.step()
            return
        scaler.step(optimizer)
        scaler.update()

    def scaler_of(self, how: Grads, grads: dict[Tensor, Tensor | None]) -> torch.amp.GradScaler | None:
        """The scaler that takes the step, where one does; gradients are scaled, and unscaled again if asked for."""
        if how.way not in ("scaler", "unscaled") or not any(g is not None for g in grads.values()):
            return None
        scaler = torch.amp.GradScaler("cpu", init_scale=how.scale)
        scaler.scale(torch.ones(()))
        if how.way == "unscaled":
            for p, g in grads.items():
                p.grad = g
            scaler.unscale_(self.optimizer)
        return scaler

    def in_backward(self, grads: dict[Tensor, Tensor]) -> None:
        model = torch.nn.Module()
        for i, (p, _) in enumerate(self.pairs):
            model.register_parameter(f"p{i}", p)
        handle = register_step_in_backward(self.optimizer, model)
        try:
            if grads:
                torch.autograd.backward([(p * g).sum() for p, g in grads.items()])
                assert all(p.grad is None for p in grads), "a gradient was not freed"
            self.optimizer.step()
        finally:
            handle.remove()

    def forget_gradients(self) -> None:
        for p in self.params:
            p.grad = None
