"""The base class of all optimizers: declarations, param groups, and the only `step()` of the package."""

import copy
from collections.abc import Callable, Iterable, Set
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt import backends, checks
from fusedopt.interface import Reads, StepArgs
from fusedopt.optimizer import compile, loading
from fusedopt.optimizer.clipping import Clipping, Guard, check_average
from fusedopt.optimizer.described import described
from fusedopt.optimizer.distributed_checkpoint import torch_looks_at_state
from fusedopt.optimizer.engine import Engine, Part
from fusedopt.optimizer.numbering import Numbers
from fusedopt.optimizer.ranks import Ranks
from fusedopt.optimizer.saving import packed, through_hooks
from fusedopt.optimizer.skipped import SkippedSteps
from fusedopt.optimizer.state import make_states
from fusedopt.optimizer.tracking import Tracker
from fusedopt.precision import NUMBER, PLAIN, Precision, StateSpec
from fusedopt.statistics.values import Statistics
from fusedopt.without_data import is_lazy

# Options of torch's optimizers that say how a step runs, not what it computes: here `backend=` says it.
_TORCH_BACKEND_OPTIONS = ("fused", "foreach", "capturable", "differentiable")

Given = tuple[dict[Tensor, Tensor | None], StepArgs]
"""Gradients by parameter, and what else is asked of the step, in the place of `.grad`."""


class FusedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here; see `AdamW` for one. A subclass declares `rule`, `checks`, `hyper`, `moments`."""

    rule: ClassVar[str]
    """Name of the update that the backends run."""

    checks: ClassVar[dict[str, checks.Check]]
    """One check per option of a param group."""

    state_options: ClassVar[dict[str, tuple[Any, Any]]] = {
        "master_weights": (False, True),
        "stochastic_rounding": (False, True),
        "state_dtype": (None, None),
    }
    """Options of a group that decide which tensors a state has, or of which dtype: values without more tensors, and
    with."""

    counters: ClassVar[frozenset[str]] = frozenset()
    """Names of the numbers that a group keeps next to its options."""

    clipping: Clipping = Clipping()
    """Clipping as in Keras, after that of `guard`."""

    constructor_options: ClassVar[tuple[str, ...]] = ("backend", "guard", "seed", "tracker", "ranks")
    """Attributes that belong to the optimizer, not to a group or a checkpoint; copies and pickles carry them."""

    _step_supports_amp_scaling = True
    """A GradScaler hands its scale to `step` as the attributes `grad_scale` and `found_inf`."""

    seed: int = 0

    adds_up_over_shards: ClassVar[bool] = False
    """True if the update of a sharded parameter adds up over processes."""

    updated_in_backward: Set[Tensor] = frozenset()
    """The parameters that the open step has updated already, of a step in backward."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        backend: str,
        unknown: dict[str, Any],
        guard: Guard | None = None,
        precision: Precision = PLAIN,
        tracker: Tracker | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown)
        backends.check(backend)
        self.backend = backend
        self.guard = guard or Guard()
        self.tracker = tracker or Tracker()
        self.ranks = ranks or Ranks()
        checks.seed("seed", precision.seed)
        self.seed = precision.seed
        precision.check()
        self._forget()
        super().__init__(
            params, checks.plain({**defaults, **precision.options(), **self.whole_options()}, tensors=False)
        )
        compile.exclude_step(type(self))

    # What a subclass declares.

    def hyper(self, group: dict[str, Any]) -> Any:
        """The hyper-parameters of a group as the NamedTuple that the rule's backends know."""
        raise NotImplementedError

    def moments(self, p: Tensor, group: dict[str, Any]) -> dict[str, StateSpec]:
        """Returns how a parameter's state tensors are kept, except `step` and those that complete its weight."""
        raise NotImplementedError

    def state_specs(self, p: Tensor, group: dict[str, Any]) -> dict[str, StateSpec]:
        """Returns how all of a parameter's state tensors are kept, except `step`."""
        precision = Precision.of(group, self.seed)
        specs = {**self.moments(p, group), **precision.weight_states(p.dtype)}
        if precision.rounds_stochastically(p.dtype) or any(spec.needs_number for spec in specs.values()):
            specs[NUMBER] = StateSpec(torch.int64, without="all")
        return specs

    def reads(self, group: dict[str, Any]) -> Reads:
        """Returns how often a step of the kernels reads gradients and weights."""
        return Reads()

    def parts(self, group: dict[str, Any]) -> list[Part]:
        """The parts of a group that are updated differently; asked again where groups hold other parameters."""
        return [Part(self.rule)]

    def shares_steps(self) -> bool:
        """True if all parameters count the applied steps of the whole optimizer."""
        return False

    def whole_options(self) -> dict[str, Any]:
        """The constructor's options that go for the whole optimizer. `defaults` has them, groups have none of them."""
        return {
            "backend": self.backend,
            **self.guard.options(),
            "track_statistics": self.tracker.every,
            "check_ranks": self.ranks.check,
            "seed": self.seed,
        }

    def needs_all_gradients(self) -> str | None:
        """The option that makes no sense before all gradients are known, as `name=value`; None if there is none."""
        return self.guard.option() or ("check_ranks=True" if self.ranks else None)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step, unscaled and before clipping: a 0-d float64 tensor on their device.

        None before the first step, and without an option that needs it.
        """
        return self.guard.grad_norm

    @property
    def skipped_steps(self) -> SkippedSteps | None:
        """How many steps the options `skip_...` skipped in this process, and why; None before the first step.

        Checkpoints hold what an update needs, and so leave it out.
        """
        return self.guard.skipped_steps

    @property
    def statistics(self) -> Statistics | None:
        """What the last measured step did, per parameter; None without `track_statistics`. See `Statistics`."""
        return Statistics(self) if self.tracker else None

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError where an option, or a combination of options, makes no sense."""
        for name, check in self.checks.items():
            check(name, group[name])
        Precision.of(group, self.seed).check()
        check_average(group)

    def before_step(self) -> None:
        """Called before each step, and before each update of a step in backward."""

    def after_step(self, args: StepArgs) -> None:
        """Called after each step, with what was asked of the backends."""

    # Param groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options that it does not give are the constructor's.

        An option that is a tensor, such as a rate, stays that tensor, unless another group has it already: then this
        one gets a copy.

        Raises:
            ValueError: an option is out of range or a parameter cannot be updated; the optimizer is as before.
            TypeError: it is not a dict, or has an option that a group cannot have.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group must be a dict with the key 'params', got {type(param_group).__name__}")
        refuse_unknown("a param group", {k: v for k, v in param_group.items() if k in _TORCH_BACKEND_OPTIONS})
        whole = self.whole_options()
        for name, own in whole.items():
            # Wrappers repeat the constructor's options in every group.
            if name in param_group and param_group[name] is not own and param_group[name] != own:
                raise TypeError(
                    f"a param group got {name}={param_group[name]!r}, which goes for the whole optimizer, and this "
                    f"{type(self).__name__} has {name}={own!r}: give the constructor the value that is meant for all"
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in whole:
                group.pop(name, None)
            group.update(
                {name: checks.plain(value, tensors=False) for name, value in group.items() if name != "params"}
            )
            self.check_group(group)
            for p in group["params"]:
                checks.parameter(p)
            checks.no_parameter_twice([group])
            separate_tensors(self.param_groups, self.checks.keys() | {"lr"})
        except Exception:
            self.param_groups.pop()
            raise
        self.guard.save(self.param_groups)
        self._forget()

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, given: Given | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients enabled; called once, before the update.
            given: what `apply_gradients` passes on.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: an option of a group was set to a value that the constructor refuses, or a parameter comes
                twice; nothing was changed.
            RuntimeError: a gradient is sparse, or a gradient or a state does not fit its parameter, which has been
                given another size or an expanded tensor, for instance; nothing was changed. Or a CUDA graph is being
                captured, and a parameter that requires a gradient has none. Or, with `check_ranks`, another process
                disagrees with the others about the step, or has raised; nothing was changed in any.
            torch.OutOfMemoryError: there is no memory; nothing was changed. On the eager backend a step may have begun
                to write, which a note on the error says: the next `step()` goes on from there, with the gradients of
                the interrupted step, and if it has other ones, then takes a step with those. If the same tensors have
                changed, it raises RuntimeError. Until then, counts and
                checkpoints are behind; loading a checkpoint drops the rest.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step(given)
        except BaseException as error:
            self.ranks.failed(self, error, goes_on=self._engine.unfinished is not None)
            self.forget_scaler()
            if self._engine.unfinished is None:
                self.tracker.abandon()
            raise
        return loss

    def forget_scaler(self) -> None:
        """Drops what a GradScaler put here; it does so itself, but not after a step that raised."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _step(self, given: Given | None) -> None:
        if not self.state and torch_looks_at_state():
            self.init_state()
            return
        values, args = (None, StepArgs()) if given is None else given
        groups = self.param_groups
        grads = [[p.grad if values is None else values.get(p) for p in group["params"]] for group in groups]
        if self.ranks:
            self.ranks.begin_call(grads)
        if self._engine.unfinished is not None:
            done = self._engine.finish()
            self.tracker.close(self)
            self.ranks.caught_up()
            self.after_step(done.args)
            if done.is_of([g for row in grads for g in row if g is not None]):
                self.ranks.end_step()
                return
        self.ranks.begin_step()
        args = args._replace(
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None)
        ).checked()
        self.before_step()
        args = self._engine.step(self, groups, grads, args, values)
        self.tracker.close(self)
        self.ranks.end_step()
        self.after_step(args)

    def apply_gradients(
        self, grads_and_params: Iterable[tuple[Tensor | None, Tensor]], scale: float | Tensor = 1.0
    ) -> None:
        """Updates parameters from gradients given here instead of `.grad`, which is neither read nor written.

        A step like any other: hooks and schedulers see it. Parameters that are not mentioned, or whose gradient is
        None, are left alone; a CUDA graph may leave out parameters, and is refused a None for one that requires a
        gradient.

        Args:
            grads_and_params: pairs of a gradient (the parameter's shape and device; any floating dtype) and a parameter
                of this optimizer.
            scale: factor on all gradients, for instance one over the number of micro-batches; a tensor of one element
                is read on its device.

        Raises:
            ValueError: a tensor is not a parameter of this optimizer, or comes twice; the scale is not a finite number.
            RuntimeError: a gradient is sparse or does not fit its parameter; nothing was changed.

        Example:
            >>> import fusedopt, torch
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = fusedopt.AdamW([w], lr=0.1)
            >>> optimizer.apply_gradients([(torch.tensor([2.0, -2.0]), w)], scale=0.5)
            >>> w.detach()
            tensor([0.9000, 1.1000])
        """
        try:
            given = self.given_gradients(grads_and_params)
        except Exception as error:
            self.ranks.begin_call([])
            self.ranks.failed(self, error)
            raise
        self.step(given=(given, StepArgs(scale=scale)))

    def given_gradients(self, grads_and_params: Iterable[tuple[Tensor | None, Tensor]]) -> dict[Tensor, Tensor | None]:
        """Returns what `apply_gradients` was given, by parameter; raises ValueError for what is not right."""
        known = {p for group in self.param_groups for p in group["params"]}
        given: dict[Tensor, Tensor | None] = {}
        for grad, p in grads_and_params:
            if p not in known:
                raise ValueError(f"a tensor of shape {tuple(p.shape)} is not a parameter of this optimizer")
            if p in given:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} comes twice; add its gradients first")
            given[p] = grad
        return given

    # State.

    def init_state(self) -> None:
        """Makes the state of every parameter that requires a gradient and has none yet; `step` does it by itself.

        For tools that look at the state before the first step, and before a CUDA graph is captured.
        `torch.distributed.checkpoint` gets its state without this call.
        """
        if any(is_lazy(p) for group in self.param_groups for p in group["params"]):
            raise RuntimeError("a lazy parameter has no shape yet, so its state has none: run a forward pass first")
        groups = self.param_groups
        make_states(self, groups, [[p if p.requires_grad else None for p in group["params"]] for group in groups])

    @torch.no_grad()
    def reset_master_weights(self) -> None:
        """Makes the parameters as they are the weights that the next update starts from.

        With `master_weights=True`, after something else wrote to the parameters: the next update then forgets what
        completed them before. Without this call, an old remainder moves a new bfloat16 weight by half a unit at most.

        Example:
            >>> import fusedopt, torch
            >>> w = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
            >>> optimizer = fusedopt.AdamW([w], lr=1e-3, master_weights=True)
            >>> w.grad = torch.ones_like(w)
            >>> optimizer.step()
            >>> optimizer.state[w]["remainder"].tolist()
            [-16777, -16777]
            >>> optimizer.reset_master_weights()
            >>> optimizer.state[w]["remainder"].tolist()
            [0, 0]
        """
        for p, state in self.state.items():
            if isinstance(p, Tensor) and "remainder" in state:
                state["remainder"].zero_()
            if isinstance(p, Tensor) and "master_weight" in state:
                state["master_weight"].copy_(p)

    def describe(self) -> str:
        """Returns what is kept of each parameter, in which dtype, and how many bytes: a line per group and dtype.

        Gradients are not counted, nor are a few bytes per tensor (step counts). Lines do not need a state to exist.

        Example:
            >>> import fusedopt, torch
            >>> model = torch.nn.Linear(1000, 1000, dtype=torch.bfloat16)
            >>> print(fusedopt.Lion(model.parameters(), master_weights=True).describe())
            group 0: 1,001,000 parameters: bfloat16 2 + exp_avg float32 4 + remainder int16 2 = 8 bytes
        """
        return described(self)

    def workspace_bytes(self) -> int:
        """Device memory that the Triton backend keeps between steps, besides the state.

        For what the launches of a step hand to each other, and lists of which program does what. Adafactor's sums of
        squares are less than 2 % of a transformer's parameters; `track_statistics` takes at most 40 bytes for
        every 2,048 elements of a parameter, and 40 more. Made at the first step; 0 before, and on the eager backend,
        but for those 40 bytes.

        Example:
            >>> import fusedopt, torch
            >>> fusedopt.Adafactor([torch.nn.Parameter(torch.ones(2, 2))]).workspace_bytes()
            0
        """
        sums = sum(s.workspace_bytes() for s in self._engine.steppers.values() if hasattr(s, "workspace_bytes"))
        return int(sums + sum(t.nbytes for t in self.tracker.sums.values()))

    def _forget(self) -> None:
        """Drops what was derived from groups and states."""
        self._engine = getattr(self, "_engine", None) or Engine()
        self._engine.forget()
        self.numbers = Numbers()

    # Checkpoints and copies.

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's names and layout; step counts are 0-d tensors of their own, numbers are Python's.

        Post hooks get it as it is, and may change it or return something else.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self.guard.save(self.param_groups)
        saved = packed(self)
        passed: dict[str, Any] = through_hooks(self._optimizer_state_dict_post_hooks.values(), self, saved)
        return passed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer, or of the one that it replaces, whichever backend or device made it.

        Group options that the checkpoint lacks keep their present value; options of the whole optimizer stay the
        constructor's. States keep the dtype they were saved in and are laid out like their parameter. They may lack
        what `amsgrad` or `beta1` needs, which then starts from zero, or have it without need: both can be switched on
        and off between steps. A rate that was a tensor becomes a tensor of this group's own; another option does where
        it is a tensor here, else a number.

        Raises:
            ValueError: the checkpoint does not fit the parameters, or is another optimizer's. After this, as after any
                other error, running out of memory included, nothing was changed.
        """
        hooks = self._optimizer_load_state_dict_pre_hooks.values()
        passed = through_hooks(hooks, self, copy.copy(state_dict) if isinstance(state_dict, dict) else state_dict)
        self.guard.save(self.param_groups)
        self.__setstate__(loading.loaded(self, passed))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self.guard.save(self.param_groups)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.constructor_options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # First what takes memory: after an error, everything is as before.
        groups = state["param_groups"]
        separate_tensors(groups, self.checks.keys() | {"lr"})
        guard: Any = state.get("guard", getattr(self, "guard", None))
        load_averages = guard.loaded(groups)
        super().__setstate__(state)
        load_averages()
        self.__dict__.setdefault("tracker", Tracker())  # older pickles lack it, and the next one
        self.__dict__.setdefault("ranks", Ranks()).forget()
        # torch puts it there for optimizers of its own.
        self.defaults.pop("differentiable", None)
        for options in (self.defaults, *self.param_groups):  # an older pickle lacks them
            for name, value in PLAIN.options().items():
                options.setdefault(name, value)
        compile.exclude_step(type(self))
        self._forget()
        self._engine.unfinished = None


def refuse_unknown(where: str, options: dict[str, Any]) -> None:
    """Raises for options that do not exist here; those of torch's that choose an implementation point to `backend=`."""
    for name, value in options.items():
        if name in _TORCH_BACKEND_OPTIONS:
            raise TypeError(
                f"{where} got {name}={value!r}, an option of torch.optim: here backend='auto', 'triton' or 'eager' "
                "chooses how a step runs, and every step is fused and can be captured"
            )
        raise TypeError(f"{where} got an unexpected argument {name}={value!r}")


def separate_tensors(groups: list[dict[str, Any]], options: Iterable[str]) -> None:
    """Gives a group with an option that is a tensor that an earlier group has, too, a tensor of its own.

    Within a group, one tensor in two places, as in `betas=(t, t)`, stays one.
    """

    def own(value: Any, earlier: set[Any], here: dict[Any, Tensor]) -> Any:
        if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
            return type(value)([own(part, earlier, here) for part in value])
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        # Two tensors may be views of one number.
        where = value.untyped_storage()._cdata, value.storage_offset(), value.dtype
        if where not in earlier:
            here[where] = value
            return value
        return here.setdefault(where, value.detach().clone())

    for name in options:
        earlier: set[Any] = set()
        for group in groups:
            if name in group:
                here: dict[Any, Tensor] = {}
                group[name] = own(group[name], earlier, here)
                earlier |= here.keys()
