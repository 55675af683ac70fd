"""AdamWeightDecay of the TensorFlow half of transformers' optimization module, for torch."""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt import backends, checks
from fusedopt.adamw import AdamW
from fusedopt.interface import AdamWHyper, StepArgs
from fusedopt.keras.config import from_keras, to_keras
from fusedopt.keras.rate import ScheduledRate, rate_after
from fusedopt.keras.schedules import RateFunction, check_function, describe, takes_tensors
from fusedopt.keras.step_count import StepCount, capturing
from fusedopt.optimizer.base import refuse_unknown, separate_tensors
from fusedopt.optimizer.clipping import Clipping
from fusedopt.optimizer.distributed_checkpoint import torch_looks_at_state
from fusedopt.optimizer.engine import Part
from fusedopt.precision import PLAIN, Precision, name_of_dtype
from fusedopt.without_data import has_data

_KERAS_EPSILON = 1e-7
"""The epsilon of Keras' Adam where 0 was given."""

_GROUP_OPTIONS = {"learning_rate": "lr", "epsilon": "eps", "weight_decay_rate": "weight_decay"}
"""Keras' names of options in a param group. The group keeps torch's names, which torch's tools look for."""


class AdamWeightDecay(AdamW):
    """`AdamWeightDecay` of transformers' TensorFlow half, as a torch optimizer.

    Per parameter with gradient g, t counting the applied steps of the whole optimizer:

        p = p - lr * weight_decay_rate * p                              (if the parameter's name says so)
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g²
        p = p - lr * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)

    This is `AdamW(convention="keras")` with decay by name, Keras' clipping and rates that are functions of the step.
    Gradients are clipped by value, then by tensor, then by their common norm, without writing to them.

    Args:
        params: as for torch's optimizers; patterns need names, so pass `model.named_parameters()`.
        learning_rate: a float; a tensor of one element, read on its device at every step; or a function from the number
            of steps so far (0 at the first) to the rate. Skipped steps count only for functions that are not schedules
            of this package, such as `WarmUp`: those functions are called on the host.
        beta_1, beta_2: decay rates of the averages of g and g², each in [0, 1). Each of them, epsilon and the weight
            decay may be a tensor as in `AdamW`.
        epsilon: added to the root of v; 0 means 1e-7, as in Keras; in a tensor it is 0.
        amsgrad: divide by the largest v so far.
        weight_decay_rate: decoupled weight decay, >= 0, in units of the rate.
        include_in_weight_decay: regular expressions; a parameter decays if one of them matches in its name.
        exclude_from_weight_decay: regular expressions; other parameters do not decay if one of them matches. Names
            without any match decay, so the first list on its own changes nothing.
        name: an entry of the config.
        backend: "auto" (Triton for CUDA and ROCm tensors, eager for the others), "triton" or "eager".
        max_grad_norm: as in `AdamW`; excludes Keras' clippings.
        skip_nonfinite, skip_grad_norm_above, skip_outliers: as in `AdamW`, by the norm before any clipping.
        master_weights, stochastic_rounding, state_dtype, seed, track_statistics, check_ranks: as in `AdamW`.
        **kwargs: Keras' `clipvalue`, `clipnorm`, `global_clipnorm` (the last two exclude each other), `decay` (the rate
            is divided by 1 + decay * iterations) and `lr` (instead of `learning_rate`, with a warning). With `betas`,
            all options may have torch's names, as in `defaults`.

    Raises:
        ValueError: an option is out of range; there are patterns but no names; at a step, the function returns no rate.
        TypeError: an option does not exist here.

    `group["lr"]` is the rate in use (before `decay`), so torch's schedulers work with a number. With a function of the
    step, the optimizer sets it, and refuses any other value that it finds there. It is a float, unless only the device
    knows which steps were skipped (Triton with a GradScaler, with `skip_...` options or in a CUDA graph): then
    schedules of this package are evaluated there, and it is a float64 tensor.

    Sources: transformers 4.34, `optimization_tf.py`; Keras 2.14, `optimizers/legacy/adam.py`.

    Example:
        >>> import torch
        >>> from fusedopt.keras import AdamWeightDecay
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdamWeightDecay(
        ...     model.named_parameters(), 0.1, weight_decay_rate=0.5, exclude_from_weight_decay=["bias"]
        ... )
        >>> before = model.weight.detach().clone(), model.bias.detach().clone()
        >>> optimizer.apply_gradients((torch.zeros_like(p), p) for p in model.parameters())
        >>> torch.allclose(model.weight, 0.95 * before[0]), torch.equal(model.bias, before[1])
        (True, True)
    """

    constructor_options: ClassVar[tuple[str, ...]] = (
        *AdamW.constructor_options,
        *("schedule", "decay", "clipping", "include_in_weight_decay", "exclude_from_weight_decay", "name"),
    )
    counters = frozenset({"iterations"})

    _triton: tuple[torch.device, bool] | None
    """The device of the first parameter, and True if Triton updates it; None until `_counting_device` is read."""

    def __init__(
        self,
        params: Any,
        learning_rate: float | Tensor | RateFunction = 0.001,
        beta_1: float | Tensor = 0.9,
        beta_2: float | Tensor = 0.999,
        epsilon: float | Tensor = 1e-7,
        amsgrad: bool = False,
        weight_decay_rate: float | Tensor = 0.0,
        include_in_weight_decay: Sequence[str] | None = None,
        exclude_from_weight_decay: Sequence[str] | None = None,
        name: str = "AdamWeightDecay",
        *,
        backend: str = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm_above: float | None = None,
        skip_outliers: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        track_statistics: bool | int = False,
        check_ranks: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(name, str):
            raise ValueError(f"name must be a string, got {name!r}")
        self.name = name
        self.include_in_weight_decay = _patterns("include_in_weight_decay", include_in_weight_decay)
        self.exclude_from_weight_decay = _patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        self.clipping = Clipping(*(checks.plain(kwargs.pop(field, None)) for field in Clipping._fields))
        self.clipping.check()
        for field, bound in self.clipping._asdict().items():
            if bound is not None and max_grad_norm is not None:
                raise ValueError(f"{field}={bound!r} and max_grad_norm={max_grad_norm!r} both clip: pass one of them")
        self.decay = checks.plain(kwargs.pop("decay", 0.0))
        checks.finite_non_negative("decay", self.decay)
        eps = _keras_epsilon(epsilon)
        as_torch = {}
        if "betas" in kwargs:
            # As in `defaults`, which have torch's names, and both a function and its first rate.
            rate = kwargs.pop("lr", learning_rate)
            learning_rate = learning_rate if callable(learning_rate) else rate
            checks.betas("betas", kwargs["betas"])
            beta_1, beta_2 = kwargs.pop("betas")
            eps = kwargs.pop("eps", eps)
            weight_decay_rate = kwargs.pop("weight_decay", weight_decay_rate)
            as_torch = {name: kwargs.pop(name) for name in ("correct_bias", "maximize") if name in kwargs}
        if "lr" in kwargs:
            checks.learning_rate("lr", kwargs["lr"])
            warnings.warn("lr is Keras' old name of learning_rate, which it overrides here", stacklevel=2)
            learning_rate = kwargs.pop("lr")
        refuse_unknown(type(self).__name__, kwargs)
        self.schedule: RateFunction | None = None
        self._count = StepCount()
        if callable(learning_rate) and not isinstance(learning_rate, Tensor):
            check_function("learning_rate", learning_rate)
            self.schedule, learning_rate = learning_rate, rate_after(learning_rate, 0)
        # AdamW's errors would name `lr` or `betas[0]`.
        checks.learning_rate("learning_rate", learning_rate)
        checks.beta_option("beta_1", beta_1)
        checks.beta_option("beta_2", beta_2)
        checks.non_negative_option("epsilon", epsilon)
        checks.non_negative_option("weight_decay_rate", weight_decay_rate)
        super().__init__(
            params,
            lr=learning_rate,
            betas=checks.plain((beta_1, beta_2), tensors=False),
            eps=checks.plain(eps, tensors=False),
            weight_decay=checks.plain(weight_decay_rate, tensors=False),
            amsgrad=checks.plain(amsgrad),
            convention="keras",
            backend=backend,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            skip_grad_norm_above=skip_grad_norm_above,
            skip_outliers=skip_outliers,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            state_dtype=state_dtype,
            seed=seed,
            track_statistics=track_statistics,
            check_ranks=check_ranks,
            **as_torch,
        )
        if self.schedule is not None:
            self._rate.set(self.param_groups, self.defaults["lr"], step=(0, False))
            self.register_step_pre_hook(_follow)

    @property
    def iterations(self) -> int:
        """Number of steps so far, without those that a GradScaler or an option skipped; may wait for a device.

        If the rate is a function other than a schedule of this package, all calls of `step()` count: it gets their
        number.
        """
        return self._count.read(self.param_groups)

    @property
    def _counts_calls(self) -> bool:
        return self.schedule is not None and not takes_tensors(self.schedule)

    @property
    def _counting_device(self) -> torch.device | None:
        """The device that counts the steps: the first parameter's, if Triton updates it; None if the host counts."""
        device = next((p.device for group in self.param_groups for p in group["params"] if has_data(p)), None)
        if device is None or self._counts_calls:
            return None
        if self._triton is None or self._triton[0] != device:
            self._triton = device, backends.choose(device, self.backend) == "triton"
        return device if self._triton[1] else None

    def _current_step(self) -> int | Tensor:
        """Returns the number of steps before this one; a tensor where the host does not know it."""
        return self._count.current(self.param_groups, self._counting_device)

    # Param groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose options may have torch's names or Keras'.

        Raises:
            ValueError: an option is out of range; there are patterns but no names; the group has a rate of its own, but
                the rate is a function of the step.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # refuses it
        group = {_GROUP_OPTIONS.get(key, key): value for key, value in param_group.items()}
        if "epsilon" in param_group:
            group["eps"] = _keras_epsilon(group["eps"])
        if "beta_1" in group or "beta_2" in group:
            beta_1, beta_2 = group.get("betas", self.defaults["betas"])
            group["betas"] = (group.pop("beta_1", beta_1), group.pop("beta_2", beta_2))
        group.setdefault("iterations", self.iterations)
        if self.schedule is not None:
            if group.get("lr") == self.schedule:
                del group["lr"]  # a wrapper repeats the constructor's options
            if "lr" in group:
                raise ValueError(
                    f"a param group got the rate {group['lr']!r}, but learning_rate is a function of the step, which "
                    "sets the rate of all groups: pass a number as learning_rate, or use one optimizer per rate"
                )
            group["lr"] = rate_after(self.schedule, group["iterations"])
        super().add_param_group(group)

    def whole_options(self) -> dict[str, Any]:
        options = super().whole_options()
        del options["convention"]
        return {
            **options,
            **({} if self.schedule is None else {"learning_rate": self.schedule}),
            "include_in_weight_decay": self.include_in_weight_decay,
            "exclude_from_weight_decay": self.exclude_from_weight_decay,
            "name": self.name,
            "decay": self.decay,
            **self.clipping._asdict(),
        }

    def needs_all_gradients(self) -> str | None:
        bound = self.clipping.global_clipnorm
        return super().needs_all_gradients() if bound is None else f"global_clipnorm={bound!r}"

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if "iterations" in group:
            checks.count("iterations", group["iterations"])
        if "params" in group and "param_names" not in group:
            for option in ("include_in_weight_decay", "exclude_from_weight_decay"):
                if getattr(self, option):
                    raise ValueError(
                        f"{option}={getattr(self, option)!r} is matched with the names of parameters, and there are "
                        "none: pass model.named_parameters() instead of model.parameters()"
                    )

    # The step.

    def before_step(self) -> None:
        device = self._counting_device
        if (self.schedule is not None or self.decay) and device is None and capturing():
            raise RuntimeError(
                "a rate that is a function of the step is computed on the host here, which a CUDA graph does not "
                "repeat: pass a tensor as learning_rate and change it between replays, or a schedule of this package, "
                "such as WarmUp, for parameters that Triton updates"
            )
        self.follow_schedule()
        if device is not None:
            self._count.tensor(self.param_groups, device)

    def follow_schedule(self) -> None:
        """Sets the rate of all groups for the coming step, if it is a function of the step. Every step calls this.

        Raises:
            ValueError: the function returns no rate, or the rate of a group was changed in between.
        """
        if self.schedule is None:
            return
        self._rate.check(self.param_groups)
        # A CUDA graph has to evaluate the schedule itself, even if the rate was known before the capture.
        step = self.param_groups[0]["iterations"], capturing()
        if not self._rate.is_set_for(step):
            self._rate.set(self.param_groups, rate_after(self.schedule, self._current_step()), step)

    def hyper(self, group: dict[str, Any]) -> AdamWHyper:
        hyper = super().hyper(group)
        if not self.decay:
            return hyper
        lr = hyper.lr.double() if isinstance(hyper.lr, Tensor) else hyper.lr
        return hyper._replace(lr=lr / (1.0 + self.decay * self._current_step()))

    def parts(self, group: dict[str, Any]) -> list[Part]:
        """Returns a part for the parameters that decay, and one for the others."""
        decaying: list[int] = []
        others: list[int] = []
        for i in range(len(group["params"])):
            name = group["param_names"][i] if "param_names" in group else ""
            included = any(re.search(pattern, name) for pattern in self.include_in_weight_decay or ())
            excluded = any(re.search(pattern, name) for pattern in self.exclude_from_weight_decay or ())
            (others if excluded and not included else decaying).append(i)
        if not others:
            return [Part(self.rule)]
        without = Part(self.rule, others, {"weight_decay": 0.0})
        return [Part(self.rule, decaying), without] if decaying else [without]

    def after_step(self, args: StepArgs) -> None:
        self._rate.close_step()
        skips = None if self._counts_calls else args.found_inf
        self._count.advance(self.param_groups, self._counting_device, skips)

    def apply_gradients(
        self, grads_and_params: Iterable[tuple[Tensor | None, Tensor]], scale: float | Tensor = 1.0
    ) -> None:
        """Updates parameters from gradients given here; see `FusedOptimizer.apply_gradients`.

        Raises:
            ValueError: as there; also, as in Keras, if all gradients are None.
        """
        super().apply_gradients(grads_and_params, scale)

    def given_gradients(self, grads_and_params: Iterable[tuple[Tensor | None, Tensor]]) -> dict[Tensor, Tensor | None]:
        pairs = list(grads_and_params)
        if all(grad is None for grad, _ in pairs):
            raise ValueError(
                f"there is no gradient among the {len(pairs)} pairs: call backward() first, or skip the step"
            )
        return super().given_gradients(pairs)

    def _forget(self) -> None:
        super()._forget()
        self._rate = ScheduledRate()
        self._triton = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, with rates as Python numbers; see `FusedOptimizer.state_dict`."""
        self._count.read(self.param_groups)
        saved = super().state_dict()
        if self.schedule is not None:
            for group in saved["param_groups"]:
                group["lr"] = checks.plain(group["lr"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint; see `FusedOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        device = self._counting_device
        if device is not None:
            self._count.tensor(self.param_groups, device)  # not later: a capture may come next

    def __getstate__(self) -> dict[str, Any]:
        self._count.read(self.param_groups)
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._count = StepCount()
        # Copies have no hooks.
        if self.schedule is not None and _follow not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(_follow)

    # Configs.

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments under Keras' keys, without parameters and backend; numbers are Python's.

        A tensor is written with as few digits as give it back in its dtype, 0.9 as 0.9 in float32 too. Schedules of
        this package become `{"class_name", "config"}`, at any depth; other functions stay as they are. Moments, counts
        and rates that were changed later are in `state_dict()` instead.
        """
        rate = self.defaults["lr"] if self.schedule is None else self.schedule
        beta_1, beta_2 = self.defaults["betas"]
        config: dict[str, Any] = {
            "name": self.name,
            **{field: bound for field, bound in self.clipping._asdict().items() if bound is not None},
            **{name: value for name, value in self.guard.options().items() if value not in (None, False)},
            **_config_of(Precision.of(self.defaults, self.seed)),
            **({"track_statistics": self.tracker.every} if self.tracker else {}),
            **({"check_ranks": True} if self.ranks else {}),
            "learning_rate": describe(rate),
            "decay": self.decay,
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": self.defaults["eps"],
            "amsgrad": self.defaults["amsgrad"],
            "weight_decay_rate": self.defaults["weight_decay"],
            "include_in_weight_decay": self.include_in_weight_decay,
            "exclude_from_weight_decay": self.exclude_from_weight_decay,
        }
        return to_keras(config)

    @classmethod
    def from_config(cls, config: dict[str, Any], params: Any, *, backend: str = "auto") -> "AdamWeightDecay":
        """Returns the optimizer that a config describes: one of `get_config`, or of Keras' own Adam or AdamW.

        Keras' Adam may be the old one (`legacy`) or the new one; the `weight_decay` of its AdamW is `weight_decay_rate`
        here. Options of Keras that do not exist here are dropped if they are switched off.

        Args:
            config: what `get_config` or Keras' `serialize` returned. `lr` may stand for `learning_rate`; schedules are
                configs or callables.
            params: as for the constructor.
            backend: as for the constructor.

        Raises:
            ValueError: the config has an unknown schedule, or an option that does not exist here and is switched on, or
                belongs to another optimizer.

        Example:
            >>> import torch
            >>> from fusedopt import AdamWeightDecay, PolynomialDecay, WarmUp
            >>> schedule = WarmUp(0.1, PolynomialDecay(0.1, decay_steps=8), warmup_steps=2)
            >>> config = AdamWeightDecay([torch.nn.Parameter(torch.ones(1))], schedule).get_config()
            >>> AdamWeightDecay.from_config(config, [torch.nn.Parameter(torch.ones(1))]).schedule == schedule
            True
        """
        arguments = from_keras(config)
        optimizer = cls(params, **arguments, backend=backend)
        if arguments.get("epsilon") == 0:
            optimizer.set_epsilon(0.0)
        return optimizer

    def set_epsilon(self, epsilon: float | Tensor) -> None:
        """Sets epsilon for all groups. Other than in the constructor, 0 stays 0, as in newer Keras' Adam."""
        checks.non_negative_option("epsilon", epsilon)
        epsilon = checks.plain(epsilon, tensors=False)
        self.defaults["eps"] = epsilon
        for group in self.param_groups:
            group["eps"] = epsilon
        separate_tensors(self.param_groups, ["eps"])


def _patterns(name: str, patterns: Sequence[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{name} must be a list of regular expressions, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} has {pattern!r} in it, which is no regular expression: {error}") from error
    return list(patterns)


def _config_of(precision: Precision) -> dict[str, Any]:
    """The options that are not the default ones; a dtype by its name."""
    options = {name: value for name, value in precision._asdict().items() if value != getattr(PLAIN, name)}
    return {name: name_of_dtype(value) for name, value in options.items()}


def _follow(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """The first hook of a step, so that hooks that record the rate see this step's."""
    assert isinstance(optimizer, AdamWeightDecay)
    if optimizer.state or not torch_looks_at_state():
        optimizer.follow_schedule()


def _keras_epsilon(epsilon: float | Tensor) -> float | Tensor:
    return epsilon if isinstance(epsilon, Tensor) or epsilon != 0 else _KERAS_EPSILON
