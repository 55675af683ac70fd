"""The only `step()` of the package: closures, missing gradients, state, choice of backend. Subclasses declare."""

import copy
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt import backends, checks, sharding
from fusedopt.backends.graphs import capturing
from fusedopt.batch import Batch, Control
from fusedopt.checks import FLOATS
from fusedopt.optimizer import compile, loading
from fusedopt.optimizer.guard import Guard
from fusedopt.optimizer.state import (
    follow_parameters,
    packed,
    plain,
    separate_rates,
    through_hooks,
    torch_looks_at_state,
)
from fusedopt.optimizer.state_check import StateCheck
from fusedopt.without_data import has_data, is_lazy
from fusedopt_kernels.memory import outside_inference_mode

# Options of torch's optimizers that say how a step runs, not what it computes: here `backend=` says it.
_TORCH_BACKEND_OPTIONS = ("fused", "foreach", "capturable", "differentiable")

_NO_STATE: dict[str, Tensor] = {}


class FusedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here; see `AdamW` for one. A subclass declares `rule`, `checks`, `hyper`, `new_state`."""

    rule: ClassVar[str]
    """Which update the backends run."""

    checks: ClassVar[dict[str, checks.Check]]
    """One check per option of a param group."""

    _given: tuple[dict[Tensor, Tensor | None], Control] | None
    """Gradients that `apply_gradients` hands to `step`."""

    state_options: ClassVar[dict[str, tuple[Any, Any]]] = {}
    """Options of a group that decide which tensors a state has: without more tensors, and with."""

    counters: ClassVar[frozenset[str]] = frozenset()
    """Numbers that a group has beside its options."""

    optional_states: ClassVar[tuple[str, ...]] = ()
    """The tensors of a state that they decide about."""

    _state_options: list[dict[str, Any]] | None

    _homes: list[torch.device] | None
    """Where the parameters were at the last step, and with them their states."""

    _in_inference_mode: bool
    """Whether the last step was taken in `torch.inference_mode()`."""

    _some_without_data: bool
    """Whether there were parameters without data at the last step."""

    constructor_options: ClassVar[tuple[str, ...]] = ("backend", "guard")
    """Attributes that belong to the optimizer, not to a group or a checkpoint; copies and pickles carry them."""

    _step_supports_amp_scaling = True
    """A GradScaler hands its scale to `step` as the attributes `grad_scale` and `found_inf`."""

    def __init__(
        self, params: Any, defaults: dict[str, Any], backend: str, unknown: dict[str, Any], guard: Guard | None = None
    ) -> None:
        refuse_unknown(type(self).__name__, unknown)
        backends.check(backend)
        self.backend = backend
        self.guard = guard or Guard()
        self._forget()
        super().__init__(params, plain({**defaults, **self.whole_options()}))
        compile.exclude_step(type(self))

    # What a subclass declares.

    def hyper(self, group: dict[str, Any]) -> Any:
        """The hyper-parameters of a group as the NamedTuple that the rule's backends know."""
        raise NotImplementedError

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first update, without its `step`. Called on meta tensors too."""
        raise NotImplementedError

    def state_shapes(self, p: Tensor, group: dict[str, Any]) -> dict[str, torch.Size]:
        """The shape of each tensor of `new_state`, for a parameter or one shard of it."""
        raise NotImplementedError

    def shares_steps(self) -> bool:
        """Whether all parameters count the applied steps of the whole optimizer."""
        return False

    def whole_options(self) -> dict[str, Any]:
        """The constructor's options that go for the whole optimizer. `defaults` has them, groups have none of them."""
        return {
            "backend": self.backend,
            "max_grad_norm": self.guard.max_grad_norm,
            "skip_nonfinite": self.guard.skip_nonfinite,
        }

    def needs_all_gradients(self) -> str | None:
        """The option that makes no sense before all gradients are known, as `name=value`; None if there is none."""
        return self.guard.option()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step, unscaled and before clipping: a 0-d float64 tensor on their device.

        None before the first step, and without `max_grad_norm` and `skip_nonfinite`.
        """
        return self.guard.grad_norm

    @property
    def skipped_steps(self) -> Tensor | None:
        """How many steps `skip_nonfinite` has skipped in this process: a 0-d tensor; None before the first step.

        The tensor goes on counting; clone it to keep a number. It is no part of a checkpoint, which holds what an
        update needs.
        """
        return self.guard.skipped_steps

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError where an option, or a combination of options, makes no sense."""
        for name, check in self.checks.items():
            check(name, group[name])

    def foreign_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """State of a parameter as another implementation saved it, in the names of this one."""
        return state

    def prepare(self, grads: list[list[Tensor | None]], control: Control) -> tuple[list[list[Tensor | None]], Control]:
        """What a step works with instead of these checked gradients and this control; called once per step."""
        return grads, control

    # Param groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options that it does not give are the constructor's.

        A rate that is a tensor stays that tensor, unless another group has it already: then this one gets a copy.

        Raises:
            ValueError: an option is out of range or a parameter cannot be updated; the optimizer is as before.
            TypeError: it is no dict, or has an option that a group cannot have.
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
            group.update({name: plain(value) for name, value in group.items() if name != "params"})
            self.check_group(group)
            for p in group["params"]:
                checks.parameter(p)
            checks.no_parameter_twice([group])
            separate_rates(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        self._forget()

    def batches(self, grads: list[list[Tensor | None]]) -> list[Batch]:
        """This step's work, given one gradient (or None) per parameter of each group."""
        return [
            Batch(
                self.hyper(group), group["params"], row, list(map(self.state.get, group["params"], repeat(_NO_STATE)))
            )
            for group, row in zip(self.param_groups, grads)
        ]

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients enabled; called once, before the update.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: an option of a group was set to a value that the constructor refuses, or a parameter comes
                twice; nothing was changed.
            RuntimeError: a gradient is sparse, or a gradient or a state does not fit its parameter, which has been
                given another size, for instance; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step()
        except Exception:
            self.forget_scaler()
            raise
        return loss

    def forget_scaler(self) -> None:
        """Drops what a GradScaler put here; it does so itself, but not after a step that raised."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _step(self) -> None:
        given, control = self._given or (None, Control())
        control = control._replace(
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None)
        ).checked()
        if not self.state and torch_looks_at_state():
            self.init_state()
            return
        if given is None:
            grads = [[p.grad for p in group["params"]] for group in self.param_groups]
        else:
            grads = [[given.get(p) for p in group["params"]] for group in self.param_groups]
        self._update(grads, control)

    def apply_gradients(
        self, grads_and_params: Iterable[tuple[Tensor | None, Tensor]], scale: float | Tensor = 1.0
    ) -> None:
        """Updates parameters from gradients given here instead of `.grad`, which is neither read nor written.

        A step like any other: hooks and schedulers see it. Parameters that are not mentioned, or whose gradient is
        None, are left alone.

        Args:
            grads_and_params: pairs of a gradient (the parameter's shape and device; any floating dtype) and a parameter
                of this optimizer.
            scale: factor on all gradients, for instance one over the number of micro-batches; a tensor of one element
                is read on its device.

        Raises:
            ValueError: a tensor is not a parameter of this optimizer, or comes twice; the scale is no finite number.
            RuntimeError: a gradient is sparse or does not fit its parameter; nothing was changed.

        Example:
            >>> import fusedopt, torch
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = fusedopt.AdamW([w], lr=0.1)
            >>> optimizer.apply_gradients([(torch.tensor([2.0, -2.0]), w)], scale=0.5)
            >>> w.detach()
            tensor([0.9000, 1.1000])
        """
        known = {p for group in self.param_groups for p in group["params"]}
        given: dict[Tensor, Tensor | None] = {}
        for grad, p in grads_and_params:
            if p not in known:
                raise ValueError(f"a tensor of shape {tuple(p.shape)} is not a parameter of this optimizer")
            if p in given:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} comes twice; add its gradients first")
            given[p] = grad
        self._given = given, Control(scale=scale)
        try:
            self.step()
        finally:
            self._given = None

    def _update(self, grads: list[list[Tensor | None]], control: Control) -> None:
        for group in self.param_groups:
            self.check_group({**group, "lr": checks.rate_in_use(group.get("lr"))})
        flat = [g for row in grads for g in row if g is not None]
        if any(map(Tensor.is_neg, flat)):
            # Autograd of complex numbers makes them: in memory they have the other sign.
            grads = [[g if g is None else g.resolve_neg() for g in row] for row in grads]
            flat = [g for row in grads for g in row if g is not None]
        params = [p for group in self.param_groups for p in group["params"]]
        updated = [p for p, g in zip(params, chain.from_iterable(grads)) if g is not None]
        shapes = _check_gradients(updated, flat)
        self._check_states(grads, shapes if len(updated) == len(params) else None)
        self._look_at_parameters()
        if self._some_without_data:
            grads = self._leave_out(grads)
            flat = [g for row in grads for g in row if g is not None]
            updated = list(filter(has_data, updated))
        sharded = self._are_sharded(grads)
        if sharded and control.found_inf is not None:
            control = control._replace(found_inf=sharding.found_anywhere(control.found_inf, flat))
        if flat:
            # Before they are prepared: clipping by value would make an infinite gradient a finite one.
            control = self._guarded(flat, control, sharded)
        grads, control = self.prepare(grads, control)
        if not flat:
            return
        devices = [device for device in dict.fromkeys(self._homes or ()) if device.type != "meta"]
        if len({capturing(device) for device in devices if device.type == "cuda"}) > 1:
            raise RuntimeError(
                f"a CUDA graph is being captured on some of the devices {', '.join(map(str, devices))} alone: what is "
                "updated on the others would not be replayed; use one optimizer per device"
            )
        steppers = [self._stepper(device) for device in devices]
        if self._state_check.missing:
            self._init_states(grads)
        self._complete_states()
        whole = self.batches(grads)
        if self._some_without_data:
            whole = [batch.only(has_data) for batch in whole]
        batches = [sharding.local(batch) for batch in whole] if sharded else whole
        for device, stepper in zip(devices, steppers):
            stepper(batches if len(devices) == 1 else [batch.on(device) for batch in batches], control)
        if sharded:
            for batch, shards in zip(whole, batches):
                sharding.put_back(batch.states, shards.states)
        # Neither torch's fused kernel nor ours tells autograd that it wrote to the parameters.
        torch.autograd.graph.increment_version(updated)

    def _check_states(self, grads: list[list[Tensor | None]], shapes: list[torch.Size] | None) -> None:
        """Raises where a state does not fit its parameter, or a parameter comes twice; nothing has changed."""
        self._state_check(self, grads, shapes)
        if self._state_check.moved:
            self._homes = None
        if self._state_check.incomplete:
            self._state_options = None

    def _look_at_parameters(self) -> None:
        """Takes notice of where parameters are, and of those that cannot be updated or have nothing to update.

        Raises:
            RuntimeError: a parameter can only be written to in inference mode, and this step is not.
        """
        homes = [p.device for group in self.param_groups for p in group["params"]]
        mode = torch.is_inference_mode_enabled()
        known = homes == self._homes and mode is self._in_inference_mode
        if known and not self._some_without_data:
            return
        params = [p for group in self.param_groups for p in group["params"]]
        if not known:
            for p in params:
                if not mode and not is_lazy(p) and p.is_inference():
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} was made in torch.inference_mode() and can only be "
                        "updated there: make the model outside of it, or step in it"
                    )
            follow_parameters(self)
        self._homes, self._in_inference_mode = homes, mode
        self._some_without_data = not all(map(has_data, params))

    def _leave_out(self, grads: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
        """The gradients of parameters with data; the state of the others is made, which is all there is to do."""
        have = [[has_data(p) for p in group["params"]] for group in self.param_groups]
        pairs = [list(zip(row, column)) for row, column in zip(grads, have)]
        self._init_states([[None if here else g for g, here in row] for row in pairs])
        return [[g if here else None for g, here in row] for row in pairs]

    def _are_sharded(self, grads: list[list[Tensor | None]]) -> bool:
        """Whether there are sharded parameters; raises where a gradient is not sharded as its parameter is."""
        columns = [*(group["params"] for group in self.param_groups), *grads]
        if not any(map(sharding.any_sharded, columns)):
            return False
        for group, row in zip(self.param_groups, grads):
            sharding.check(group["params"], row)
        return True

    def _guarded(self, grads: list[Tensor], control: Control, sharded: bool) -> Control:
        if not self.guard:
            return control
        alike: dict[tuple[torch.device, sharding.Spread], list[Tensor]] = {}
        for g in grads:
            over = sharding.spread(g) if sharded else ()
            alike.setdefault((g.device, over), []).append(sharding.shard(g) if sharded else g)
        sums = [(self._stepper(device, "squares", over)(own), over) for (device, over), own in alike.items()]
        if sharded:
            sums = [(squares.sum(), over) for squares, over in sums]
        return self.guard(sharding.add_up(sums), control)

    def _stepper(self, device: torch.device, rule: str | None = None, over: sharding.Spread = ()) -> Any:
        key = device, rule or self.rule, over
        stepper = self._steppers.get(key)
        if stepper is None:
            stepper = self._steppers[key] = backends.create(key[1], device, self.backend)
        return stepper

    # State.

    def init_state(self) -> None:
        """Makes the state of every parameter that requires a gradient and has none yet; `step` does it by itself.

        For tools that look at the state before the first step, and before a CUDA graph is captured.
        `torch.distributed.checkpoint` gets its state without this call.
        """
        if any(is_lazy(p) for group in self.param_groups for p in group["params"]):
            raise RuntimeError("a lazy parameter has no shape yet, so its state has none: run a forward pass first")
        self._init_states([[p if p.requires_grad else None for p in group["params"]] for group in self.param_groups])

    def _init_states(self, wanted: list[list[Tensor | None]]) -> None:
        """Makes missing states where `wanted` is not None; new counts on one device are views of one tensor."""
        missing: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group, row in zip(self.param_groups, wanted):
            for p, want in zip(group["params"], row):
                if want is not None and not self.state.get(p):
                    missing.setdefault(p.device, []).append((p, group))
        if not missing:
            return
        if any(map(capturing, missing)):
            raise RuntimeError(
                "a CUDA graph is being captured before the optimizer has state, which every replay would set to zero "
                "again: take one step, which compiles the kernels as well, before the capture"
            )
        counts = (state["step"] for state in self.state.values() if state)
        begun = next((count for count in counts if not count.is_meta), None) if self.shares_steps() else None
        with outside_inference_mode():
            for device, entries in missing.items():
                steps = torch.zeros(len(entries), dtype=torch.float32, device=device)
                if begun is not None:
                    steps += begun.to(device, non_blocking=True)
                for (p, group), step in zip(entries, steps.unbind()):
                    self.state[p] = {"step": step, **self.new_state(p, group)}

    def _complete_states(self) -> None:
        """Adds what states lack since an option was switched on after they were made: amsgrad, beta1."""
        options = [{k: v for k, v in group.items() if k in self.state_options} for group in self.param_groups]
        if options == self._state_options:
            return
        added = []
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state:
                    with outside_inference_mode():
                        new = self.new_state(p, group)
                    if new.keys() - state.keys() and capturing(p.device):
                        raise RuntimeError(
                            "an option that needs more state was set before a capture: take a step first"
                        )
                    added.append((state, {name: value for name, value in new.items() if name not in state}))
        for state, entries in added:
            state.update(entries)
        self._state_options = options

    def _forget(self) -> None:
        """Drops what was derived from groups and states: backends, where states are, and gradients in flight."""
        # But not what CUDA graphs that were captured go on reading.
        steppers = getattr(self, "_steppers", {}).values()
        self._captured = getattr(self, "_captured", []) + [s for s in steppers if getattr(s, "captured", False)]
        self._steppers: dict[tuple[torch.device, str, sharding.Spread], Any] = {}
        self._state_check = StateCheck()
        self._homes = None
        self._in_inference_mode = self._some_without_data = False
        self._state_options = None
        self._given = None

    # Checkpoints and copies.

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's names and layout; step counts are 0-d tensors of their own, numbers are Python's.

        Post hooks get it as it is, and may change it or return something else.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = packed(self)
        passed: dict[str, Any] = through_hooks(self._optimizer_state_dict_post_hooks.values(), self, saved)
        return passed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer, or of the one that it replaces, whichever backend or device made it.

        Group options that the checkpoint lacks keep their present value; options of the whole optimizer stay the
        constructor's. States keep the dtype they were saved in and are laid out like their parameter. They may lack
        what `amsgrad` or `beta1` needs, which then starts from zero, or have it without need: both can be switched on
        and off between steps. A rate that was a tensor becomes a tensor of this group's own.

        Raises:
            ValueError: the checkpoint does not fit the parameters, or is another optimizer's. After this, as after any
                other error, such as one for want of memory, nothing was changed.
        """
        hooks = self._optimizer_load_state_dict_pre_hooks.values()
        passed = through_hooks(hooks, self, copy.copy(state_dict))
        self.__setstate__(loading.loaded(self, passed))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.constructor_options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch puts it there for optimizers of its own.
        self.defaults.pop("differentiable", None)
        separate_rates(self.param_groups)
        compile.exclude_step(type(self))
        self._forget()


def refuse_unknown(where: str, options: dict[str, Any]) -> None:
    """Raises for options that do not exist here; those of torch's that choose an implementation point to `backend=`."""
    for name, value in options.items():
        if name in _TORCH_BACKEND_OPTIONS:
            raise TypeError(
                f"{where} got {name}={value!r}, an option of torch.optim: here backend='auto', 'triton' or 'eager' "
                "chooses how a step runs, and every step is fused and can be captured"
            )
        raise TypeError(f"{where} got an unexpected argument {name}={value!r}")


def _check_gradients(params: list[Tensor], grads: list[Tensor]) -> list[torch.Size]:
    """Raises for a gradient that no backend can use, before anything has changed. Returns the shapes of the parameters.

    Whole lists: thousands are common.
    """
    shapes = list(map(attrgetter("shape"), params))
    if (
        set(map(attrgetter("layout"), grads)) <= {torch.strided}
        and set(map(attrgetter("dtype"), grads)) <= FLOATS
        and list(map(attrgetter("device"), grads)) == list(map(attrgetter("device"), params))
        and list(map(attrgetter("shape"), grads)) == shapes
    ):
        return shapes
    for p, g in zip(params, grads):
        if g.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse ({g.layout}): make it dense "
                "(nn.Embedding(sparse=False)) or use torch.optim.SparseAdam for this parameter"
            )
        if g.shape != p.shape or g.device != p.device or g.dtype not in FLOATS:
            raise RuntimeError(
                f"a gradient of shape {tuple(g.shape)}, {g.dtype}, on {g.device} does not fit its parameter of shape "
                f"{tuple(p.shape)} on {p.device}: shape and device must be the same, the dtype float16 to float64"
            )
    return shapes
