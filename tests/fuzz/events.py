"""What may happen between two steps, and what it may change."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from helpers.comparing import assert_same
from torch import Tensor

from fusedopt import Adafactor, AdafactorSchedule, float32_parameters, get_scheduler, load_float32_parameters
from fuzz import formulas
from fuzz.comparison import Snapshot
from fuzz.expectation import settled, state_specs, weight_of
from fuzz.setups import HALVES, LAYOUTS, Grads, Group, drawn, made, options_of
from fuzz.training import Training

COMPLETING = {"remainder", "master_weight", "number"}
"""States that a checkpoint leaves out where the parameter's dtype has no use for them any more."""

Error = type[Exception] | tuple[type[Exception], ...]


class Run(Training):
    """A training run, and the events of its life."""

    scheduler: Any = None
    initial: tuple[float, ...] = ()
    default_rate: float = 0.0
    schedule: tuple[str, int, int] = ("", 0, 0)

    def refused(self, do: Callable[[], Any], error: Error) -> None:
        """Does what has to raise, and to leave everything as it was."""
        before = Snapshot(self)
        try:
            do()
        except error:
            pass
        else:
            raise AssertionError(f"no {error} was raised")
        self.forget_gradients()
        before.check_same(self)

    # Groups and their options.

    def switch(self, number: int, options: dict[str, Any]) -> None:
        """Writes options into a group."""
        group = self.groups[number % len(self.groups)]
        options = copy.deepcopy(options)
        if self.scheduled:
            options.pop("lr", None)
        if self.scheduler is not None and "lr" in options:
            self.scheduler = None
        group.update(options)
        if group["master_weights"] and group["stochastic_rounding"]:
            group["stochastic_rounding"] = False

    def nothing(self) -> None:
        """The next step follows at once."""

    def refuse_option(self, number: int, bad: tuple[str, Any]) -> None:
        """Writes a wrong option into a group, steps, and takes it out again."""
        name, value = bad
        group = self.groups[number % len(self.groups)]
        if name not in group or not group["params"] or (self.scheduled and name == "lr"):
            return
        if self.setup.name == "Adafactor" and name == "lr" and group["relative_step"]:
            return
        right = group[name]
        group[name] = value
        try:
            before = Snapshot(self)
            grads = self.gradients(Grads())
            for p, g in grads.items():
                p.grad = g
            try:
                self.optimizer.step()
            except ValueError:
                self.forget_gradients()
                before.check_same(self)
            else:
                raise AssertionError(f"{name}={value!r} was accepted")
        finally:
            group[name] = right

    def add_group(self, group: Group) -> None:
        """Adds a group, whose options are those given, and else the constructor's."""
        if len(self.params) > 10:
            return
        options = copy.deepcopy(group.options)
        if self.scheduled:
            options.pop("lr", None)
        params = made(group.specs, seed=2000 + len(self.params))
        both = {**self.optimizer.defaults, **options}
        self.params += params
        given = {"params": self.named(params), **options}
        if both["master_weights"] and both["stochastic_rounding"]:
            self.refused(lambda: self.optimizer.add_param_group(given), ValueError)
            self.params = self.params[: -len(params)]
            return
        before = Snapshot(self)
        self.scheduler = None
        self.optimizer.add_param_group(given)
        new = options_of(self.groups[-1])
        for name, value in options_of(options).items():
            assert new[name] == value, f"{name} of the new group is {new[name]!r}, was given {value!r}"
        for name, value in options_of(self.optimizer.defaults).items():
            if name in new and name not in options and not (self.scheduled and name == "lr"):
                assert new[name] == value, f"{name} of the new group is {new[name]!r}, expected {value!r}"
        before.check_states(self)

    def refuse_group(self, what: str) -> None:
        """Adds a group that is wrong."""
        (p, _), q = self.pairs[0], torch.nn.Parameter(torch.ones(3))
        self.params.append(q)
        named = self.named([p, q])
        self.params.pop()
        group: Any = {
            "twice": {"params": [named[1], named[1]]},
            "known": {"params": named[:1]},
            "expanded": {
                "params": [("x", torch.ones(1).expand(4))] if len(named[0]) == 2 else [torch.ones(1).expand(4)]
            }
            if isinstance(named[0], tuple)
            else {"params": [torch.ones(1).expand(4)]},
            "option": {"params": named[1:], "weight_decay": -1.0},
            "whole": {"params": named[1:], "seed": 12345},
            "fused": {"params": named[1:], "fused": True},
        }[what]
        self.refused(lambda: self.optimizer.add_param_group(group), (ValueError, TypeError))

    def drop(self, place: int) -> None:
        """Takes a parameter out of its group, whose state stays behind."""
        p, group = self.pairs[place % len(self.pairs)]
        if len(group["params"]) < 2:
            return
        at = [q is p for q in group["params"]].index(True)
        del group["params"][at]
        if "param_names" in group:
            del group["param_names"][at]
        self.counts.pop(p, None)

    def move(self, place: int, number: int) -> None:
        """Takes a parameter into another group."""
        p, group = self.pairs[place % len(self.pairs)]
        target = self.groups[number % len(self.groups)]
        if len(group["params"]) < 2 or target is group:
            return
        at = [q is p for q in group["params"]].index(True)
        target["params"].append(group["params"].pop(at))
        if "param_names" in group:
            target["param_names"].append(group["param_names"].pop(at))

    # Parameters.

    def swap(self, place: int, layout: str, dtype: torch.dtype | None) -> None:
        """Gives a parameter other memory, with the same numbers."""
        p = self.params[place % len(self.params)]
        p.data = LAYOUTS[layout](p.data.to(dtype or p.dtype).clone())

    def cast(self, dtype: torch.dtype) -> None:
        """`model.to`."""
        self.model().to(dtype)

    def model(self) -> torch.nn.Module:
        model = torch.nn.Module()
        for i, p in enumerate(self.params):
            model.register_parameter(f"p{i}", p)
        return model

    def write(self, place: int, seed: int) -> None:
        """Writes to a parameter, as loading a model does."""
        p = self.params[place % len(self.params)]
        with torch.no_grad():
            p.copy_(drawn(seed, p.shape))

    def freeze(self, place: int) -> None:
        """Switches `requires_grad`."""
        p = self.params[place % len(self.params)]
        p.requires_grad_(not p.requires_grad)

    def resize(self, place: int, shape: tuple[int, ...]) -> None:
        """Gives a parameter another shape: with a state, a step says that it does not fit."""
        p, _ = self.pairs[place % len(self.pairs)]
        if tuple(p.shape) == shape:
            return
        p.data = drawn(len(shape), shape).to(p.dtype)
        if self.optimizer.state.get(p):

            def step() -> None:
                p.grad = torch.ones_like(p)
                self.optimizer.step()

            self.refused(step, RuntimeError)
            self.forget_state(p)

    def forget_state(self, p: Tensor) -> None:
        del self.optimizer.state[p]
        self.counts.pop(p, None)
        self.numbers.pop(p, None)

    def zero_grad(self, how: Grads, set_to_none: bool) -> None:
        """Gradients are gone, or zeros."""
        for p, g in self.gradients(how._replace(way="step")).items():
            p.grad = g if (how.layout == "expanded" and set_to_none) or g is None else g.clone()
        had = {p for p, _ in self.pairs if p.grad is not None}
        self.optimizer.zero_grad(set_to_none)
        for p in had:
            assert (p.grad is None) if set_to_none else not bool(p.grad.any())
        self.forget_gradients()

    def refuse_gradient(self, place: int, what: str) -> None:
        """Gives a gradient that cannot be used."""
        p, _ = self.pairs[place % len(self.pairs)]
        good = torch.ones_like(p)
        stranger = torch.ones(2)
        pairs: list[tuple[Any, Any]] = {
            "shape": [(torch.ones((*p.shape, 2)), p)],
            "integers": [(torch.ones(p.shape, dtype=torch.int32), p)],
            "sparse": [(torch.ones(p.shape).to_sparse(), p)],
            "complex": [(torch.ones(p.shape, dtype=torch.complex64), p)],
            "twice": [(good, p), (good, p)],
            "stranger": [(good, p), (stranger, stranger)],
            "scale": [(good, p)],
        }[what]
        scale = math.nan if what == "scale" else 1.0
        self.refused(lambda: self.optimizer.apply_gradients(pairs, scale=scale), (ValueError, RuntimeError))

    # State.

    def init_state(self) -> None:
        """Makes all states."""
        expected = {}
        begun = max(self.counts.values(), default=0.0) if self.shares_counts else 0.0
        for p, group in self.pairs:
            if p.requires_grad and not self.optimizer.state.get(p):
                expected[p] = settled(self, p, group, True)
                self.counts[p] = begun
        self.optimizer.init_state()
        for p, own in expected.items():
            state = dict(self.optimizer.state[p])
            assert float(state.pop("step")) == begun
            own["number"] = state.get("number", torch.tensor(0)) if "number" in own else None
            assert_same(state, {name: t for name, t in own.items() if t is not None}, "state")

    def reset_master_weights(self) -> None:
        """The weights that updates work on are the parameters again."""
        self.optimizer.reset_master_weights()
        for p, group in self.pairs:
            if group["master_weights"] and p.dtype in HALVES:
                own = weight_of(p, self.optimizer.state.get(p, {}), True)
                assert_same(own, p.detach().float(), "weight", equal_nan=True)

    def read_float32(self) -> None:
        """`float32_parameters` has the weights that updates work on."""
        found = float32_parameters(self.optimizer, self.model())
        groups = dict(self.pairs)
        for i, p in enumerate(self.params):
            has = p in groups and groups[p]["master_weights"]
            own = weight_of(p, self.optimizer.state.get(p, {}), has)
            assert_same(found[f"p{i}"], own, f"p{i}", equal_nan=True)

    def load_float32(self, seed: int) -> None:
        """`load_float32_parameters` keeps what 16 bits lose, with master weights."""
        weights = {f"p{i}": drawn(seed + i, p.shape).float() for i, p in enumerate(self.params)}
        if seed % 4:  # halfway between two bfloat16 numbers
            weights = {
                name: ((w.view(torch.int32) & -0x10000) | 0x8000).view(torch.float32) for name, w in weights.items()
            }
        begun = max(self.counts.values(), default=0.0) if self.shares_counts else 0.0
        load_float32_parameters(self.optimizer, self.model(), weights)
        groups = dict(self.pairs)
        for i, p in enumerate(self.params):
            if p in groups and groups[p]["master_weights"] and p.dtype in HALVES:
                self.counts.setdefault(p, begun)
                own = weight_of(p, self.optimizer.state[p], True)
                assert_same(own, weights[f"p{i}"], f"float32 weight {i}")
            else:
                assert_same(p.detach(), weights[f"p{i}"].to(p.dtype), f"weight {i}")

    # Checkpoints and copies.

    def checkpoint(self, way: str, backend: str) -> None:
        """Goes on with a copy, or from a checkpoint."""
        before = Snapshot(self)
        old = self.optimizer
        states = [old.state.get(p, {}) for p, _ in self.pairs]
        options = [options_of(group) for group in self.groups]
        self.scheduler = None
        if way in ("deepcopy", "pickle"):
            both = (self.params, old)
            params, new = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
            renamed = dict(zip(self.params, params))
            self.counts = {renamed[p]: n for p, n in self.counts.items()}
            self.numbers = {renamed[p]: n for p, n in self.numbers.items() if p in renamed}
            assert_same([p.detach() for p in params], before.params, "copied parameters", equal_nan=True)
            self.params, self.optimizer, self.calls = params, new, 0
            for (p, _), state in zip(self.pairs, states):
                assert_same(dict(new.state.get(p, {})), dict(state), "copied state", equal_nan=True)
            assert [options_of(group) for group in self.groups] == options
            return
        saved = old.state_dict()
        if way == "save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        if way != "same":
            self.optimizer = self.make([{"params": self.named(group["params"])} for group in self.groups], backend)
            self.calls, self.reasons = 0, dict.fromkeys(self.reasons, 0)
        self.optimizer.load_state_dict(saved)
        for (p, group), state in zip(self.pairs, states):
            self.check_loaded(p, group, dict(self.optimizer.state.get(p, {})), dict(state))
        for now, then in zip((options_of(group) for group in self.groups), options, strict=True):
            check_options(now, then)
        assert_same([p.detach() for p in self.params], before.params, "parameters", equal_nan=True)

    def check_loaded(self, p: Tensor, group: dict[str, Any], now: dict[str, Tensor], then: dict[str, Tensor]) -> None:
        """A loaded state is what was saved; moments may have the dtype that the next step would give them."""
        specs = state_specs(self, p, group)
        for name in then.keys() - now.keys():
            assert name in COMPLETING - specs.keys(), f"{name} was lost"
            if name == "number":
                self.numbers.pop(p, None)
        for name in now.keys() - then.keys():
            assert name in specs, f"{name} came up"
        for name in now.keys() & then.keys():
            new, old = now[name], then[name]
            # What the group no longer asks for, as after amsgrad, may be kept wider: all its numbers stay.
            becomes = specs.get(name, torch.promote_types(p.dtype, torch.float32))
            assert new.dtype in (old.dtype, becomes), f"{name} is {new.dtype}, was {old.dtype}"
            assert_same(new, old.to(new.dtype), name, equal_nan=True)

    def refuse_checkpoint(self, place: int, what: str) -> None:
        """Loads a checkpoint that does not fit."""
        saved: Any = copy.deepcopy(self.optimizer.state_dict())
        index = sorted(saved["state"])[place % len(saved["state"])] if saved["state"] else None
        if what == "groups":
            saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
        elif what == "params":
            saved["param_groups"][0]["params"].append(1000)
        elif what == "option":
            saved["param_groups"][0]["weight_decay"] = math.nan
        elif what == "nothing":
            saved = {"state": {}}
        elif index is None:
            return
        else:
            state = saved["state"][index]
            name = sorted(state.keys() - {"step", "number", *COMPLETING})[0]
            change: dict[str, Any] = {
                "shape": {name: torch.zeros((*state[name].shape, 2))},
                "dtype": {name: state[name].to(torch.int32)},
                "sparse": {name: state[name].reshape(-1).to_sparse()},
                "text": {name: "zeros"},
                "count": {"step": torch.tensor(-1.0)},
                "fraction": {"step": 1.5},
                "unknown": {"surplus": torch.zeros(1)},
            }
            if what == "missing":
                del state["step"]
            else:
                state.update(change[what])
        self.refused(lambda: self.optimizer.load_state_dict(saved), ValueError)

    def warm(self, mean: float, share: float) -> None:
        """Loads averages of norms that are past their warm-up."""
        if not self.setup.options.get("skip_outliers"):
            return
        saved = self.optimizer.state_dict()
        moments = (100.0, mean, (share * mean) ** 2)
        for group in saved["param_groups"]:
            group["grad_norm_average"] = moments
        states = [dict(self.optimizer.state.get(p, {})) for p, _ in self.pairs]
        self.optimizer.load_state_dict(saved)
        for (p, group), state in zip(self.pairs, states):
            self.check_loaded(p, group, dict(self.optimizer.state.get(p, {})), state)
        self.averages = formulas.Averages(*moments)

    # Schedules.

    def begin_schedule(self, name: str, warmup: int, total: int) -> None:
        """A schedule of the package begins."""
        if self.scheduled or any(math.isnan(rate) for rate in self.rates()):
            return
        for group in self.groups:
            group.pop("initial_lr", None)
        if self.setup.name == "Adafactor" and any(group["relative_step"] for group in self.groups):
            if all(group["relative_step"] for group in self.groups):
                self.scheduler, self.schedule = AdafactorSchedule(self.optimizer), ("adafactor", 0, 0)
            return
        default = self.default_rate = float(self.optimizer.defaults["lr"])
        if name == "polynomial" and default <= 1e-6:
            name = "linear"
        self.initial = tuple(self.rates())
        self.scheduler = get_scheduler(name, self.optimizer, warmup, warmup + total)
        self.schedule = name, warmup, warmup + total
        self.check_rates(0)

    def rates(self) -> list[float]:
        return [math.nan if group["lr"] is None else float(group["lr"]) for group in self.groups]

    def advance_schedule(self) -> None:
        """One step of the schedule."""
        if self.scheduler is None:
            return
        self.optimizer._opt_called = True  # a step of another optimizer, a copy, may have been the last one
        self.scheduler.step()
        if self.schedule[0] == "adafactor":
            self.check_shown()
        else:
            self.check_rates(self.scheduler.last_epoch)

    def check_rates(self, s: int) -> None:
        name, warmup, total = self.schedule
        factor = formulas.schedule(name, s, warmup, total, lr=self.default_rate)
        for group, first in zip(self.groups, self.initial, strict=True):
            tolerance = 1e-6 if isinstance(group["lr"], Tensor) else 1e-9
            rate = float(group["lr"])
            assert abs(rate - first * factor) <= tolerance * first, (
                f"{name} has {rate} at {s}, expected {first * factor}"
            )

    def check_shown(self) -> None:
        """The rate that the last update of a group's first updated parameter used."""
        assert isinstance(self.optimizer, Adafactor)
        for group, shown in zip(self.groups, self.scheduler.get_last_lr(), strict=True):
            first = next((p for p in group["params"] if self.counts.get(p)), None)
            if first is None or not first.numel():
                continue
            rate = formulas.relative_rate(int(self.counts[first]), options_of(group))
            expected = float(rate.value)
            if group["scale_parameter"]:
                rms = float(self.optimizer.state[first]["RMS"])
                floor = float(group["eps"][1])
                expected *= rms if rms > floor else floor
            assert np.isclose(float(shown), expected, rtol=1e-6, equal_nan=True), f"{shown}, expected {expected}"


def check_options(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Numbers of a tensor may have become the shortest decimals that round to them."""

    def close(a: Any, b: Any) -> bool:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(close, a, b))
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=1e-6) or a == b
        return bool(a == b)

    assert now.keys() >= then.keys(), f"{then.keys() - now.keys()} were lost"
    for name, value in then.items():
        assert close(now[name], value), f"{name} is {now[name]!r}, was {value!r}"
