"""One step on all devices: from a user's gradients to what the backends get.

Tensors reach a backend as they are. It scales gradients on their way into the update (`StepArgs.factor` on the eager
backend, `begin_step` in the kernels) and advances step counts in place (`backends/eager/step_counts.py`, `begin_step`).
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import chain, islice
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import backends, checks, sharding
from fusedopt.backends.graphs import capturing
from fusedopt.backends.work import Work
from fusedopt.checks import FLOATS
from fusedopt.interface import ParamSet, ReduceDims, StepArgs
from fusedopt.optimizer.clipping import Gradients, Guarded
from fusedopt.optimizer.state import forget_states, make_states
from fusedopt.optimizer.state_changes import States, states_of
from fusedopt.out_of_memory import is_out_of_memory
from fusedopt.precision import Precision
from fusedopt.without_data import has_data
from fusedopt_kernels.layout import overlaps_itself

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

Groups = list[dict[str, Any]]
Steppers = dict[tuple[torch.device, str], Any]

_GOES_ON = (
    "{}. Call step() again: it goes on from there, and ends as if there had been no error. Other gradients are a step "
    "of their own after that."
)
_STAYS = "The step may have updated some of the weights, and is not gone on with: load a checkpoint."


class Part(NamedTuple):
    """Parameters of one group that are updated by one rule with the same hyper-parameters.

    Attributes:
        rule: which update the backends run.
        places: which of the group's parameters; None for all.
        options: in place of the group's.
    """

    rule: str
    places: list[int] | None = None
    options: dict[str, Any] = {}


class Checked(NamedTuple):
    """What a step works on.

    Attributes:
        grads: the gradients, as they can be read.
        flat: those that there are.
        updated: the parameters that they are of.
        sharded: whether any parameter is.
        states: of all parameters, if nothing is to be done to them; else None.
    """

    grads: Gradients
    flat: list[Tensor]
    updated: list[Tensor]
    sharded: bool
    states: list[dict[str, Any]] | None


class Unfinished(NamedTuple):
    """A step that is to be done, from where it stands.

    Attributes:
        work: what is left to do.
        grads: the gradients that it was given.
        updated: the parameters that they are of.
        state: of the optimizer.
        args: what it has to return.
        marks: of gradients, parameters and states, as the error left them: the rest of the step needs these.
    """

    work: Work
    grads: list[Tensor]
    updated: list[Tensor]
    state: Mapping[Tensor, dict[str, Any]]
    args: StepArgs
    marks: list[tuple[int, int]] | None = None

    def marked(self) -> list[tuple[int, int]]:
        """Returns where the gradients, parameters and states are, and how often they were written to."""
        states = [t for p in self.updated for t in self.state.get(p, {}).values() if isinstance(t, Tensor)]
        tensors = [*self.grads, *[p.detach() for p in self.updated], *states]
        return [(sharding.shard(t).data_ptr(), sharding.version(t)) for t in tensors]

    def is_of(self, grads: list[Tensor]) -> bool:
        """True if it is the step of these gradients."""
        return len(grads) == len(self.grads) and all(map(is_, grads, self.grads))


class Engine:
    """Runs the steps of one list of groups, and keeps what the next step can use again.

    An optimizer has one for all its parameters; a step in backward has one for each.

    Args:
        goes_on: if a step that runs out of memory halfway is gone on with.

    Attributes:
        steppers: by device and rule.
        captured: steppers of the past that CUDA graphs go on reading.
        unfinished: a step that an error has ended after it had begun to write; None if there is none.
    """

    def __init__(self, goes_on: bool = True) -> None:
        self.goes_on = goes_on
        self.steppers: dict[Any, Any] = {}
        self.captured: list[Any] = []
        self.unfinished: Unfinished | None = None
        self.forget()

    def forget(self) -> None:
        """Drops what was derived from groups and states, but not what CUDA graphs go on reading."""
        self.captured += [s for s in self.steppers.values() if getattr(s, "captured", False)]
        self.steppers = {}
        self._states = States()
        self._parts: list[list[Part]] | None = None

    def step(
        self,
        optimizer: "FusedOptimizer",
        groups: Groups,
        grads: Gradients,
        args: StepArgs,
        mentioned: Collection[Tensor] | None = None,
    ) -> StepArgs:
        """Takes one step, in eight phases; those before the last raise before anything has changed.

        Args:
            optimizer: which declares the update, and has the states.
            groups: the optimizer's, or a copy of one with some of its parameters.
            grads: one gradient, or None, per parameter of each group.
            args: what else is asked of the step.
            mentioned: the parameters that were given, with a gradient or with None; None for all.

        Returns:
            The arguments that the backends got: with the factor of clipping, and with what makes the step skip.
        """
        own_grads = _present(grads)

        # 1. Options, gradients, states and shards must fit.
        grads, flat, updated, sharded, states = self._checked(optimizer, groups, grads, own_grads, mentioned)

        # 2. States follow their parameters; those without data get a state, which is all there is to do.
        self._states.settle(optimizer, groups)
        if self._states.some_without_data:
            grads = _leave_out(optimizer, groups, grads)
            flat, updated = _present(grads), list(filter(has_data, updated))

        # 3. Backends, which may not work here, and states that are missing.
        steppers = self._steppers(optimizer, groups) if flat else {}
        made = make_states(optimizer, groups, grads) if flat and self._states.missing else []

        works: list[Work] = []
        started = False
        guarded: Guarded | None = None
        measurement = None
        spread = len(self._states.devices) > 1
        try:
            # 4. All processes agree about the step.
            squared = flat if optimizer.guard else list(filter(sharding.is_shared, flat)) if optimizer.ranks else []
            sums = self._sums_of_squares(squared, optimizer.backend, sharded)
            if optimizer.ranks:
                optimizer.ranks.compare(optimizer, groups, grads, args, sums, made)

            # 5. A scaler's findings are those of all processes.
            if sharded and args.found_inf is not None:
                args = args._replace(found_inf=sharding.all_reduce_found_inf(args.found_inf, flat))
            if flat and optimizer.tracker.due(optimizer):
                measurement = optimizer.tracker.open(optimizer, updated, args)

            # 6. Clipping and skipping. Norms come first: by value, an infinite gradient would become a finite one.
            if flat and optimizer.guard:
                squares = sharding.all_reduce_sums(sums)
                undoable = spread or backends.choose(squares[0].device, optimizer.backend) == "eager"
                guarded = optimizer.guard(squares, args, partial(self._verdict_on, optimizer.backend), undoable)
                args = guarded.args
            clipped, args = optimizer.clipping.clip(grads, args)
            if not flat:
                return args
            args = args._replace(measurement=measurement, tensors=self._states.tensors if clipped is grads else None)
            optimizer.ranks.waited_for = sharded and (optimizer.adds_up_over_shards or measurement is not None)

            # 7. One piece of work per device and rule, which gets its memory; from here on DTensors are local shards.
            if guarded is not None and spread:  # The other devices get a copy of what makes the step skip.
                guarded.write()
            param_sets = self.param_sets(optimizer, groups, clipped, measurement is not None, states)
            if self._states.some_without_data:
                param_sets = [param_set.only(has_data) for param_set in param_sets]
            if sharded:
                param_sets = list(map(sharding.local, param_sets))
            for (device, rule), stepper in steppers.items():
                own = [param_set for param_set in param_sets if param_set.rule == rule]
                works.append(stepper.prepare([param_set.on(device) for param_set in own] if spread else own, args))
            parts: list[Callable[[], object]] = [*works]
            if guarded is not None and not spread:
                parts.insert(0, guarded.write)
            if measurement is not None and clipped is not grads:
                parts.append(optimizer.tracker.with_gradients(updated, flat, measurement))

            # 8. The work is done. An error in the middle of it leaves the rest to the next step.
            started = True
            self.unfinished = Unfinished(Work(*parts), own_grads, updated, optimizer.state, args)
            return self.finish().args
        except BaseException as error:
            begun = any(work.begun for work in works)
            if self.unfinished is not None and (begun or optimizer.ranks.agreed):
                begun_by = "The step had begun to write" if begun else "All processes had agreed to the step"
                error.add_note(_GOES_ON.format(begun_by))
            elif started and (begun or not isinstance(error, Exception)):
                # Ctrl-C may come when a part has written: nothing is undone, and nothing gone on with.
                error.add_note(_STAYS)
            else:
                self.unfinished = None
                if guarded is not None:
                    guarded.undo()
                forget_states(optimizer, made)
            raise

    def finish(self) -> "Unfinished":
        """Does what is left of a step; returns it. Where it may succeed later, an error leaves the rest of it."""
        done, self.unfinished = self.unfinished, None
        assert done is not None
        if done.marks is not None and done.marks != done.marked():
            raise RuntimeError(
                "a step ran out of memory halfway, its gradients, parameters or states have changed since: "
                "load a checkpoint"
            )
        try:
            done.work()
        except BaseException as error:
            if self.goes_on and is_out_of_memory(error):
                self.unfinished = done
            raise
        finally:
            # Neither torch's fused kernel nor ours tells autograd that it wrote to the parameters.
            torch.autograd.graph.increment_version(done.updated)
            if self.unfinished is not None:
                self.unfinished = done._replace(marks=done.marked())
        return done

    def _verdict_on(self, backend: str, device: torch.device) -> Any:
        return self._stepper((device, "verdict"), backend)

    def param_sets(
        self,
        optimizer: "FusedOptimizer",
        groups: Groups,
        grads: Gradients,
        measured: bool = False,
        states: list[dict[str, Any]] | None = None,
    ) -> list[ParamSet]:
        """Returns the work of a step: one set per part of each group. `states`: of all parameters, if known."""
        param_sets = []
        if states is None:
            states = states_of(optimizer, [p for group in groups for p in group["params"]])
        rest = iter(states)
        for group, row, parts in zip(groups, grads, self._parts_of(optimizer, groups)):
            params = group["params"]
            own_states = list(islice(rest, len(params)))
            places_of_all = optimizer.tracker.places(params) if measured else None
            for rule, places, options in parts:
                own = {**group, **options} if options else group
                precision = Precision.of(own, optimizer.seed)
                param_set = ParamSet(
                    rule, optimizer.hyper(own), params, row, own_states, None, precision, places_of_all
                )
                param_sets.append(param_set if places is None else param_set.at(places))
        return param_sets

    def _checked(
        self,
        optimizer: "FusedOptimizer",
        groups: Groups,
        grads: Gradients,
        flat: list[Tensor],
        mentioned: Collection[Tensor] | None,
    ) -> Checked:
        """Returns what this step works on; raises for what it cannot work with."""
        for group in groups:
            options = {name: checks.in_use(group[name]) for name in optimizer.checks if name != "lr"}
            optimizer.check_group({**group, **options, "lr": checks.rate_in_use(group.get("lr"))})
        params = [p for group in groups for p in group["params"]]
        complete = len(flat) == len(params)
        updated = params if complete else [p for p, g in zip(params, chain.from_iterable(grads)) if g is not None]
        states = self._states.recognised(optimizer, groups, grads)
        shapes: list[torch.Size] = []
        if states is None:
            if any(map(Tensor.is_neg, flat)):
                # Autograd of complex numbers makes them: in memory they have the other sign.
                grads = [[g if g is None else g.resolve_neg() for g in row] for row in grads]
                flat = _present(grads)
            shapes = _check_gradients(updated, flat)
        if not complete:
            _refuse_untrained(optimizer, groups, grads, mentioned)
        if states is not None:
            return Checked(grads, flat, updated, False, states)
        self._states.check(optimizer, groups, grads, shapes if complete else None)
        sharded = sharding.check(groups, grads)
        if self._states.regrouped:
            self._parts = None
        self._states.learn(optimizer, groups, grads)
        return Checked(grads, flat, updated, sharded, None)

    def _sums_of_squares(self, grads: list[Tensor], backend: str, sharded: bool) -> list[tuple[Tensor, ReduceDims]]:
        """Returns the sums of squares of local gradients, one or more per device, and over what they are sharded."""
        alike: dict[tuple[torch.device, ReduceDims], list[Tensor]] = {}
        for g in grads:
            over = sharding.spread(g) if sharded else ()
            alike.setdefault((g.device, over), []).append(sharding.shard(g) if sharded else g)
        sums = [(self._stepper((device, "squares", over), backend)(own), over) for (device, over), own in alike.items()]
        return [(squares.sum(), over) for squares, over in sums] if sharded else sums

    def _steppers(self, optimizer: "FusedOptimizer", groups: Groups) -> Steppers:
        """Returns the stepper of each device and rule.

        Raises:
            RuntimeError: the backend cannot work there; or a CUDA graph is captured on some of the devices.
        """
        devices = [device for device in self._states.devices if device.type != "meta"]
        if len({capturing(device) for device in devices if device.type == "cuda"}) > 1:
            raise RuntimeError(
                f"a CUDA graph is being captured on some of the devices {', '.join(map(str, devices))} alone: what is "
                "updated on the others would not be replayed; use one optimizer per device"
            )
        rules = dict.fromkeys(part.rule for parts in self._parts_of(optimizer, groups) for part in parts)
        keys = [(device, rule) for device in devices for rule in rules]
        return {key: self._stepper(key, optimizer.backend) for key in keys}

    def _parts_of(self, optimizer: "FusedOptimizer", groups: Groups) -> list[list[Part]]:
        if self._parts is None:
            self._parts = [optimizer.parts(group) for group in groups]
        return self._parts

    def _stepper(self, key: tuple[Any, ...], backend: str) -> Any:
        """Returns the stepper for a key that begins with device and rule."""
        if key not in self.steppers:
            self.steppers[key] = backends.create(key[1], key[0], backend)
        return self.steppers[key]


def _present(grads: Gradients) -> list[Tensor]:
    return [g for row in grads for g in row if g is not None]


def _refuse_untrained(
    optimizer: "FusedOptimizer", groups: Groups, grads: Gradients, mentioned: Collection[Tensor] | None
) -> None:
    """Raises in a capture for a parameter whose gradient is missing by mistake: no replay would update it."""
    if not any(map(capturing, {p.device for group in groups for p in group["params"]})):
        return
    for number, (group, row) in enumerate(zip(groups, grads)):
        names = group.get("param_names") or []
        for index, (p, g) in enumerate(zip(group["params"], row)):
            if g is not None or not p.requires_grad or p in optimizer.updated_in_backward:
                continue
            if (mentioned is not None and p not in mentioned) or (has_data(p) and not p.numel()):
                continue
            name = repr(names[index]) if index < len(names) else f"{index} of group {number}"
            raise RuntimeError(
                f"parameter {name} requires a gradient and has none in the step that is being captured, so that no "
                "replay would train it: run backward() in the capture too, or before it, or set requires_grad=False"
            )


def _leave_out(optimizer: "FusedOptimizer", groups: Groups, grads: Gradients) -> Gradients:
    """The gradients of parameters with data; the state of the others is made, which is all there is to do."""
    have = [[has_data(p) for p in group["params"]] for group in groups]
    pairs = [list(zip(row, column)) for row, column in zip(grads, have)]
    make_states(optimizer, groups, [[None if here else g for g, here in row] for row in pairs])
    return [[g if here else None for g, here in row] for row in pairs]


def _check_gradients(params: list[Tensor], grads: list[Tensor]) -> list[torch.Size]:
    """Raises for a pair that no backend can use, before anything has changed. Returns the shapes of the parameters.

    Whole lists: thousands are common.
    """
    shapes = list(map(attrgetter("shape"), params))
    if (
        set(map(attrgetter("layout"), grads)) <= {torch.strided}
        and set(map(attrgetter("dtype"), grads)) <= FLOATS
        and list(map(attrgetter("device"), grads)) == list(map(attrgetter("device"), params))
        and list(map(attrgetter("shape"), grads)) == shapes
        and all(map(Tensor.is_contiguous, params))
    ):
        return shapes
    for p, g in zip(params, grads):
        if overlaps_itself(p):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} with strides {p.stride()} has several elements in one place of "
                "memory now (an expanded tensor?), where an update cannot be written: give it a clone"
            )
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
