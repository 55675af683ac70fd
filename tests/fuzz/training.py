"""A training run under test, and what each of its steps should leave."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers.comparing import assert_same
from torch import Tensor

from fusedopt import Adafactor, AdamW, AdamWeightDecay, Lion, register_step_in_backward
from fuzz import formulas
from fuzz.bounds import FLOAT64, Bound, arithmetic_of, exact, misfit

CLASSES: dict[str, Any] = {"AdamW": AdamW, "AdamWeightDecay": AdamWeightDecay, "Adafactor": Adafactor, "Lion": Lion}

HALVES = (torch.float16, torch.bfloat16)

REASONS = ("nonfinite", "grad_norm_above", "outliers")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "columns": lambda t: torch.cat([t, t, t], dim=-1)[..., 1 : t.shape[-1] + 1] if t.dim() else t,
    "every other": lambda t: torch.stack([t, t], dim=-1)[..., 1],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten(), t.new_zeros(2)])[3 : t.numel() + 3].view(t.shape),
}
"""How a tensor lies in memory, by name. "shared", of parameters, is one block of memory for all that have it."""


class Spec(NamedTuple):
    """A parameter to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    size: float = 1.0
    trained: bool = True


class Group(NamedTuple):
    """A param group to be made."""

    specs: tuple[Spec, ...]
    options: dict[str, Any]


class Setup(NamedTuple):
    """An optimizer and its parameters, to be made."""

    name: str
    options: dict[str, Any]
    groups: tuple[Group, ...]
    backend: str = "eager"


class Grads(NamedTuple):
    """The gradients of one step, and the way that they take into it.

    Attributes:
        seed: of what they are.
        size: their standard deviation.
        missing: places of parameters without one; may be beyond the last.
        poison: None, or a number that one element gets.
        layout: by name; "expanded" for one number in all elements.
        dtype: None for the parameter's; another one goes through `apply_gradients`.
        way: "step", "closure", "apply", "scaler", "unscaled", "backward".
        scale: of the way "apply", and of the scaler.
    """

    seed: int = 0
    size: float = 1.0
    missing: tuple[int, ...] = ()
    poison: float | None = None
    layout: str = "contiguous"
    dtype: torch.dtype | None = None
    way: str = "step"
    scale: float = 1.0


def drawn(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(specs: Sequence[Spec], seed: int) -> list[torch.nn.Parameter]:
    """Parameters, those of the layout "shared" in one block of memory for each dtype."""
    sizes: dict[torch.dtype, int] = {}
    for spec in specs:
        if spec.layout == "shared":
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + int(np.prod(spec.shape, dtype=int))
    blocks = {dtype: torch.zeros(size + 2, dtype=dtype) for dtype, size in sizes.items()}
    begun = dict.fromkeys(blocks, 1)
    params = []
    for i, spec in enumerate(specs):
        values = (drawn(seed + i, spec.shape) * spec.size).to(spec.dtype)
        if spec.layout == "shared":
            begin = begun[spec.dtype]
            begun[spec.dtype] += values.numel()
            place = blocks[spec.dtype][begin : begin + values.numel()].view(spec.shape)
            place.copy_(values)
        else:
            place = LAYOUTS[spec.layout](values)
        params.append(torch.nn.Parameter(place, requires_grad=spec.trained))
    return params


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, with numbers in the place of tensors, so that they can be compared."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(plain, value))
        return value.double().squeeze().tolist() if isinstance(value, Tensor) else value

    return {name: plain(value) for name, value in group.items() if name not in ("params", "param_names")}


def weight_of(p: Tensor, state: dict[str, Tensor], master_weights: bool) -> Tensor:
    """The weight that an update works on, at least in float32."""
    if p.dtype not in HALVES:
        return p.detach().clone()
    plain = p.detach().float()
    if not master_weights:
        return plain
    if p.dtype == torch.float16:
        copy_ = state.get("master_weight", plain)
        return torch.where(copy_.half() == p.detach(), copy_, plain)
    upper = p.detach().contiguous().view(torch.int16).numpy().astype(np.int64) << 16
    remainder = state["remainder"].contiguous().numpy().astype(np.int64) if "remainder" in state else 0
    joined = torch.from_numpy(np.asarray(upper + remainder).astype(np.uint32).view(np.float32))
    return torch.where(joined.isnan(), plain, joined)


@dataclass
class Expected:
    """What a step should leave of one parameter."""

    weight: Bound
    state: dict[str, Any]
    """A `Bound` for what is updated, else a tensor that is to stay."""
    count: float
    words: np.ndarray | None = None
    old: Tensor | None = None
    grad_norm: Bound | None = None
    """Unscaled, before clipping."""
    moved: bool = False


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
            expected, norm, skipped = self.expected(present, factor, found_inf)
        bits = {p: g.clone() for p, g in present.items()}
        versions = {p: p._version for p in present}
        self.take(how, grads, scaler)
        with np.errstate(all="ignore"):
            self.check(expected, norm, skipped, before)
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

    # What should come out.

    def expected(
        self, present: dict[Tensor, Tensor], factor: Bound, found_inf: bool
    ) -> tuple[dict[Tensor, Expected], Bound | None, bool]:
        """What each parameter is to become, the norm of all gradients, and whether the step is skipped."""
        raw = {p: Bound.of(exact(g), arithmetic_of(g.dtype)) for p, g in present.items()}
        norm = formulas.norm_of_all(list(raw.values())) * abs(factor) if raw else None
        limits = self.setup.options
        skipped = found_inf
        if norm is not None and self.options_of_all & {"skip"}:
            skipped = self.verdict(norm, found_inf)
        keras = {name: limits.get(name) for name in ("clipvalue", "clipnorm", "global_clipnorm")}
        if any(bound is not None for bound in keras.values()):
            copies = formulas.keras_clipped([g * factor for g in raw.values()], keras)
            clipped = {p: g.read_in(arithmetic_of(p.dtype)) for p, g in zip(raw, copies)}
        else:
            clipped = {p: g.read_in(arithmetic_of(p.dtype)) * factor for p, g in raw.items()}
        if norm is not None and limits.get("max_grad_norm") not in (None, np.inf):
            clip = formulas.clip_factor(norm, limits["max_grad_norm"])
            clipped = {p: g * clip for p, g in clipped.items()}
        begun = max(self.counts.values(), default=0.0) if self.shares_counts else 0.0
        advance = 1.0 if present and not skipped else 0.0
        expected = {}
        for p, group in self.pairs:
            state, options = self.settled(p, group, p in present), self.options_for(p, group)
            old = weight_of(p, state, options["master_weights"])
            exactly = Bound.of(exact(old), arithmetic_of(p.dtype))
            count = self.counts.get(p, begun)
            if p in present or (self.shares_counts and state):
                count += advance
            own = Expected(exactly, dict(state), count, old=old)
            if p in present:
                # Kernels read a wider gradient in the parameter's arithmetic.
                seen = raw[p] if self.optimizer.backend == "eager" else raw[p].read_in(arithmetic_of(p.dtype))
                own.grad_norm = (seen.norm() * abs(factor)).kept_as_square()
                if not skipped:
                    # What an infinite average becomes depends on the order of operations: inf, or inf - inf.
                    moments = {
                        name: Bound.of(exact(t), arithmetic_of(p.dtype), np.where(np.isinf(exact(t)), np.inf, 0.0))
                        for name, t in state.items()
                        if t.dtype.is_floating_point
                    }
                    update = formulas.UPDATES[self.setup.name]
                    own.weight, new = update(exactly, clipped[p], moments, int(count), options)
                    new = new if p.numel() else {}  # of nothing there are no averages
                    own.state |= new
                    own.moved = True
            expected[p] = own
            if state:
                self.counts[p] = count
        return expected, norm, skipped

    def verdict(self, norm: Bound, found_inf: bool) -> bool:
        """Whether the guard skips the step; counts why."""
        limits = self.setup.options
        above = formulas.scalar(limits.get("skip_grad_norm_above") or np.inf)
        usual = self.averages.usual(limits["skip_outliers"]) if limits.get("skip_outliers") else formulas.scalar(np.inf)
        reason = None
        if not formulas.is_finite(norm):
            reason = "nonfinite"
        elif formulas.is_above(norm, above):
            reason = "grad_norm_above"
        elif formulas.is_above(norm, usual):
            reason = "outliers"
        enters = not found_inf and reason != "nonfinite" and formulas.is_above(norm, formulas.scalar(0.0))
        if reason is not None:
            self.reasons[reason] += 1
        if enters:
            self.averages.enter(norm.minimum(above).minimum(usual))
        return found_inf or reason is not None

    def options_for(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The options of an update, as numbers."""
        options = {"convention": self.setup.options.get("convention", "transformers"), **options_of(group)}
        if self.setup.name == "AdamWeightDecay":
            options["convention"] = "keras"
            options["lr"] = options["lr"] / (1.0 + self.setup.options.get("decay", 0.0) * self.iterations)
            name = dict(zip(group["params"], group["param_names"]))[p]
            if "bias" in name and self.setup.options.get("exclude_from_weight_decay"):
                options["weight_decay"] = 0.0
        return options

    def specs(self, p: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        """The tensors of a state without its step, and the dtype of a new one."""
        wide = torch.promote_types(p.dtype, torch.float32)
        chosen = group["state_dtype"]
        if self.setup.name == "Adafactor":
            names = ["exp_avg_sq_row", "exp_avg_sq_col"] if p.dim() >= 2 else ["exp_avg_sq"]
            specs = dict.fromkeys(["RMS", *names], wide)
            if group["beta1"] is not None:
                specs["exp_avg"] = chosen or wide
        else:
            dtype = chosen or (wide if group["master_weights"] else p.dtype)
            names = ["exp_avg"] if self.setup.name == "Lion" else ["exp_avg", "exp_avg_sq"]
            specs = dict.fromkeys([*names, *["max_exp_avg_sq"] * bool(group.get("amsgrad"))], dtype)
        if group["master_weights"] and p.dtype in HALVES:
            specs |= {"remainder": torch.int16} if p.dtype == torch.bfloat16 else {"master_weight": torch.float32}
        random = group["stochastic_rounding"] and p.dtype in HALVES
        if random or (self.rounds_moments(group) and specs.get("exp_avg_sq") in HALVES):
            specs["number"] = torch.int64
        return specs

    @staticmethod
    def rounds_moments(group: dict[str, Any]) -> bool:
        """True if a 16-bit average of squares is rounded at random."""
        return bool(group["master_weights"] or group["stochastic_rounding"] or group["state_dtype"] is not None)

    def settled(self, p: Tensor, group: dict[str, Any], wanted: bool) -> dict[str, Tensor]:
        """The state that an update finds: made if there is none, completed and converted if options ask for it."""
        state = {name: t.clone() for name, t in self.optimizer.state.get(p, {}).items() if name != "step"}
        if not state and not wanted:
            return {}
        specs = self.specs(p, group)
        converts = self.setup.name == "Adafactor" or self.rounds_moments(group)
        for name, dtype in specs.items():
            if name not in state:
                shape = tuple(p.shape)
                if name in ("RMS", "number"):
                    shape = ()
                elif name == "exp_avg_sq_row":
                    shape = shape[:-1]
                elif name == "exp_avg_sq_col":
                    shape = shape[:-2] + shape[-1:]
                state[name] = torch.full(shape, -1 if name == "number" else 0, dtype=dtype)
                if name == "master_weight":
                    state[name].copy_(p.detach())
            elif converts and dtype.is_floating_point:
                state[name] = state[name].to(dtype)
        return state

    # What came out.

    def check(self, expected: dict[Tensor, Expected], norm: Bound | None, skipped: bool, before: "Snapshot") -> None:
        self.calls += 1
        self.iterations += not skipped
        wrong: list[str | None] = []
        for i, (p, group) in enumerate(self.pairs):
            own, name = expected[p], f"parameter {i}"
            state = self.optimizer.state.get(p, {})
            if not own.state:
                if state:
                    wrong.append(f"{name} has a state")
                continue
            if set(state) != {"step", *own.state}:
                wrong.append(f"{name} has the state {sorted(state)}, expected {sorted(own.state)}")
                continue
            if float(state["step"]) != own.count:
                wrong.append(f"{name} counts {float(state['step'])} updates, expected {own.count}")
            wrong += self.wrong_state(p, group, own, state, name)
        before.check_around(self, {p for p in expected if expected[p].moved})
        self.wrong_verdict(norm, wrong)
        if self.setup.name == "AdamWeightDecay" and self.optimizer.iterations != self.iterations:
            wrong.append(f"iterations are {self.optimizer.iterations}, expected {self.iterations}")
        self.wrong_statistics(expected, wrong, norm is not None)
        found = [message for message in wrong if message]
        assert not found, "\n".join(found)

    def wrong_state(
        self, p: Tensor, group: dict[str, Any], own: Expected, state: dict[str, Tensor], name: str
    ) -> list[str | None]:
        wrong: list[str | None] = []
        words = None
        if "number" in own.state:
            number = int(state["number"])
            if self.numbers.setdefault(p, number) != number or number < 0:
                wrong.append(f"{name} has the number {number}, had {self.numbers[p]}")
            words = formulas.random_words(self.optimizer.seed, number, int(own.count), p.numel()).reshape(p.shape)
        for key, value in own.state.items():
            if key in ("number", "remainder", "master_weight") and own.moved and key in self.specs(p, group):
                continue
            if not isinstance(value, Bound):
                if key != "number" and not (same_bits(state[key], value)):
                    wrong.append(f"{key} of {name} was changed")
                continue
            bits = None
            if words is not None and key == "exp_avg_sq" and state[key].dtype in HALVES and self.rounds_moments(group):
                bits = words >> np.uint32(16) if state[key].dtype == torch.bfloat16 else words >> np.uint32(19)
            wrong.append(misfit(state[key], value, bits, f"{key} of {name}"))
            expected_dtype = self.dtype_of(p, group, key)
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

    def dtype_of(self, p: Tensor, group: dict[str, Any], key: str) -> torch.dtype | None:
        """The dtype that a state must have; None where that depends on what was loaded."""
        if self.setup.name == "Adafactor" or self.rounds_moments(group):
            return self.specs(p, group).get(key)
        return None

    def wrong_verdict(self, norm: Bound | None, wrong: list[str | None]) -> None:
        guarded = self.options_of_all & {"max_grad_norm", "skip"}
        if norm is not None and guarded:
            wrong.append(misfit(self.optimizer.grad_norm, norm, None, "grad_norm"))
        counted = self.optimizer.skipped_steps
        if counted is not None and dict(counted) != self.reasons:
            wrong.append(f"skipped steps are {dict(counted)}, expected {self.reasons}")
        if norm is not None and self.setup.options.get("skip_outliers"):
            saved = self.optimizer.state_dict()["param_groups"][0]["grad_norm_average"]
            for name, value in zip(("count", "mean", "variance"), saved, strict=True):
                expected = getattr(self.averages, name)
                wrong.append(misfit(torch.tensor(value, dtype=torch.float64), expected, None, f"{name} of norms"))
            self.averages = formulas.Averages(*saved)

    def wrong_statistics(self, expected: dict[Tensor, Expected], wrong: list[str | None], measured: bool) -> None:
        every = self.setup.options.get("track_statistics")
        if not every or not measured or (self.calls - 1) % int(every):
            return
        rows = self.optimizer.statistics.tensor.numpy()
        for i, (p, group) in enumerate(self.pairs):
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


def name_of(place: int) -> str:
    return f"{place}.bias" if place % 3 == 2 else f"{place}.weight"


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
