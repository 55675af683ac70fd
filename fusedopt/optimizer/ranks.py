"""`check_ranks`: before a step, the processes that share its parameters compare what each of them brings to it."""

import hashlib
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed

from fusedopt import checks, sharding
from fusedopt.backends.graphs import capturing
from fusedopt.interface import ReduceDims, StepArgs
from fusedopt.optimizer.clipping import Gradients
from fusedopt.precision import Precision

if TYPE_CHECKING:
    from fusedopt.optimizer.base import FusedOptimizer

Groups = list[dict[str, Any]]
Sums = Sequence[tuple[Tensor, ReduceDims]]
"""Sums of squares of local gradients, and over what those gradients are sharded."""

_WAY_OUT = (
    "no process has taken the step. Give all of them the same parameters and options, and each parameter a gradient in "
    "all of them or in none (zeros where there is none); where one has lost a step, load a checkpoint into all"
)

_KEPT_FROM_IT = "what keeps a process from the step"

_RAISED = 1 << 62
"""Above every digest: in the place of that of a process that has raised."""


class _Together(NamedTuple):
    """Processes that must agree, and the parameters about which they must."""

    over: ReduceDims  # one mesh dimension; () for all processes
    process_group: Any  # None for all processes
    device: torch.device
    places: list[int]


class Ranks:
    """The comparison, and what an optimizer remembers for it.

    A step begins with `begin_step`, or `begin_call` before it; whatever raises from there to the comparison is told in
    its place, by `failed`. Nothing is compared in a capture of a CUDA graph, where the host learns nothing.

    Attributes:
        check: whether there is one.
        steps: how many there were, this one included.
        agreed: True if all have agreed to a step that is not done here.
        waited_for: True if others may still wait in that step for sums of this process.
    """

    def __init__(self, check_ranks: bool = False) -> None:
        checks.flag("check_ranks", check_ranks)
        self.check = check_ranks
        self.forget()

    def __bool__(self) -> bool:
        return self.check

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew."""
        return {"check_ranks": self.check}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Ranks.__init__(self, **state)

    def forget(self) -> None:
        """Counts steps anew, as after a load in all processes."""
        self.steps = 0
        self.agreed = self.waited_for = False
        self._due = False  # the others come to a comparison, which this process has not taken part in
        self._grads: list[Tensor] = []  # of this call
        self._tried: list[tuple[weakref.ref[Tensor], int]] | None = None  # gradients of the step that is not done here

    def begin_call(self, grads: Gradients) -> None:
        """Begins a call of `step`: that of a step that the others come to, or a second try of one they have left.

        In the second case nothing is sent, which they could take for something else. A try has the same gradients.
        """
        self._grads = [g for row in grads for g in row if g is not None]
        tried = self._tried if self.agreed else None
        again = tried is not None and (
            self.waited_for
            or (
                len(tried) == len(self._grads)
                and all(ref() is g and count == sharding.version(g) for (ref, count), g in zip(tried, self._grads))
            )
        )
        self._due = False
        if not again:
            self._count()

    def begin_step(self) -> None:
        """Begins a step that is to be compared.

        Raises:
            RuntimeError: the last one failed after that, when others went on or waited for sums.
        """
        if self.agreed:
            raise RuntimeError(
                "a step of this process failed after all processes had compared gradients and options, so that others "
                "may have taken it: load a checkpoint into all of them"
            )
        self._count()

    def _count(self) -> None:
        if self.check and not self._due:
            self.steps += 1
            self._due = True

    def end_step(self) -> None:
        """Ends a step that did not fail."""
        self.caught_up()
        self._due, self._grads = False, []

    def caught_up(self) -> None:
        """Ends the step that was not done here; that of this call, which may be another one, is still to come."""
        self.agreed, self._tried = False, None

    def failed(self, optimizer: "FusedOptimizer", error: BaseException, goes_on: bool = False) -> None:
        """Ends a call that raised: tells the others if they come to compare, else remembers what they have agreed to.

        Args:
            optimizer: whose step it is.
            error: what was raised.
            goes_on: whether another call goes on with the step.
        """
        due = self._due
        if due and isinstance(error, Exception):
            self.tell(optimizer, error)
        if self._due:  # Nothing was sent: the others still wait, and the next call is of the step that they wait in.
            self._due = False
            self.steps -= 1
        elif not due and self.agreed and self._tried is None:
            self._tried = [(weakref.ref(g), sharding.version(g)) for g in self._grads]
            if not goes_on:
                error.add_note(
                    "All processes had agreed to this step, and others may have taken it: load a checkpoint into all."
                )
        self._grads = []

    def tell(self, optimizer: "FusedOptimizer", error: Exception) -> None:
        """Takes part in a comparison with what keeps this process from the step."""
        if self.check:
            with suppress(Exception):  # this one's own error says more
                everyone = _everyone([p for group in optimizer.param_groups for p in group["params"]])
                text = type(error).__name__
                with suppress(Exception):  # of an error that cannot be printed
                    text = f"{text}: {error}".partition("\n")[0]
                self._differences(everyone, [[(_KEPT_FROM_IT, text)]] * len(everyone), [], raised=True)

    def compare(
        self,
        optimizer: "FusedOptimizer",
        groups: Groups,
        grads: Gradients,
        args: StepArgs,
        sums: Sums,
        made: Collection[Tensor] = (),
    ) -> None:
        """Compares what this process brings to a step with what the others do; all of them must call it.

        One all-reduce of three numbers per mesh dimension, two with several dimensions. Waits for the device.

        Args:
            optimizer: whose step it is.
            groups, grads, args: of the step.
            sums: those of gradients that other processes hold as well are the same there, to the bit.
            made: parameters whose state this step has made.

        Raises:
            RuntimeError: in all processes, for one that brings something else, or nothing.
        """
        params = [p for group in groups for p in group["params"]]
        everyone = _everyone(params)
        if not everyone:
            return
        new = set(made)
        states = [None if p in new else optimizer.state.get(p) for p in params]
        common = list(self._common(optimizer, groups, args, states))
        each = [
            (tuple(p.shape), str(p.dtype), str(getattr(p, "placements", None)), *_there(state, g is not None))
            for p, state, g in zip(params, states, chain.from_iterable(grads))
        ]
        brought = [
            [
                *common,
                ("the number of parameters", len(together.places)),
                *((place, each[place]) for place in together.places),
                ("the sum of squares of the gradients that they share", _of_shared(sums, together)),
            ]
            for together in everyone
        ]
        different = self._differences(everyone, brought, list(_names(groups)))
        if different is not None:
            raise RuntimeError(f"the processes disagree about a step: {different}; {_WAY_OUT}")
        self.agreed, self.waited_for = True, any(together.over for together in everyone)

    def _differences(
        self, everyone: list[_Together], brought: list[list[Any]], names: list[str], raised: bool = False
    ) -> str | None:
        """Exchanges what each process brings, or has raised; returns what differs. None if nothing does."""
        numbers = [_RAISED if raised else _digest(facts) for facts in brought]
        memory = [torch.empty(3, dtype=torch.int64, device=together.device) for together in everyone]
        self._due = False
        found: dict[int, bool] = {}
        anyone = False
        for _ in range(1 if len(everyone) == 1 else 2):  # the second time, it gets around to all
            for k, together in enumerate(everyone):
                most, least, heard = _largest([numbers[k], -numbers[k], anyone], memory[k], together)
                if most != -least:
                    found[k] = most == _RAISED
                anyone = anyone or heard or k in found
        if not anyone:
            return None
        said = [
            _first_difference(brought[k][:1], everyone[k], names) + ", where that error itself stands"
            if someone_raised
            else _first_difference(brought[k], everyone[k], names)
            for k, someone_raised in found.items()
        ]
        return "; ".join(said) or "some that share other parameters do not"

    def _common(
        self, optimizer: "FusedOptimizer", groups: Groups, args: StepArgs, states: list[Any]
    ) -> Iterator[tuple[str, Any]]:
        yield _KEPT_FROM_IT, None
        yield "the number of this step", self.steps
        for name in ("scale", "grad_scale"):
            yield name, checks.plain(getattr(args, name))
        for name, value in optimizer.whole_options().items():
            if name != "backend":
                yield name, value
        begun = next((state["step"] for state in states if state), None)
        yield "the count of steps in the state", None if begun is None or begun.is_meta else float(begun)
        yield "the number of groups", len(groups)
        for number, group in enumerate(groups):
            options = {**optimizer.hyper(group)._asdict(), **Precision.of(group, optimizer.seed).options()}
            for name, value in options.items():
                yield f"{name} of group {number}", checks.plain(value)


def _everyone(params: list[Tensor]) -> list[_Together]:
    """Who has a part in these parameters, by mesh dimension, in one order everywhere; whole ones belong to all.

    Nobody in a capture.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or not params:
        return []
    if any(map(capturing, {p.device for p in params})):
        return []
    meshes: dict[tuple[Any, int], list[int]] = {}
    whole = []
    for i, p in enumerate(params):
        if not sharding.is_sharded(p):
            whole.append(i)
            continue
        mesh: Any = getattr(p, "device_mesh")  # noqa: B009
        for dimension in range(mesh.ndim):
            if mesh.size(dimension) > 1:
                meshes.setdefault((mesh, dimension), []).append(i)
    if len(whole) == len(params):
        return [_Together((), None, params[0].device, whole)] if distributed.get_world_size() > 1 else []
    return [
        _Together(((mesh, dimension),), mesh.get_group(dimension), params[places[0]].device, sorted([*places, *whole]))
        for (mesh, dimension), places in meshes.items()
    ]


_OF_A_PARAMETER = ("shape", "dtype", "layout", "state", "gradient")


def _there(*things: Any) -> list[str]:
    return ["there" if thing else "missing" for thing in things]


def _of_shared(sums: Sums, together: _Together) -> list[float]:
    """Of gradients that are not sharded over these processes, all of which have the same ones, to the bit."""
    return [float(total.sum()) for total, over in sums if not set(together.over) & set(over)]


def _names(groups: Groups) -> Iterator[str]:
    for number, group in enumerate(groups):
        given = group.get("param_names") or []
        yield from given
        yield from (f"{number}.{index}" for index in range(len(given), len(group["params"])))


def _first_difference(facts: list[Any], together: _Together, names: list[str]) -> str:
    """Says what it is; all of these processes must call it."""
    process_group = together.process_group or distributed.group.WORLD
    ranks = distributed.get_process_group_ranks(process_group)
    of_all: list[Any] = [None] * len(ranks)
    distributed.all_gather_object(of_all, facts, group=process_group)
    for (what, _), *others in zip(*of_all):
        values = [value for _, value in ((what, _), *others)]
        if any(value != values[0] for value in values):
            break
    if isinstance(what, int):
        field = next(k for k in range(len(_OF_A_PARAMETER)) if len({str(value[k]) for value in values}) > 1)
        shape = f", of shape {values[0][0]}," if field else ""
        what, values = f"the {_OF_A_PARAMETER[field]} of parameter {names[what]}{shape}", [v[field] for v in values]
    by_value: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values):
        by_value.setdefault(str(value), []).append(rank)
    said = [f"{value} on rank{'s' * (len(on) > 1)} {', '.join(map(str, on))}" for value, on in by_value.items()]
    return f"{what} is {' and '.join(said)}"


def _digest(facts: list[Any]) -> int:
    """A number of 62 bits that stands for them."""
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "big") >> 2


def _largest(numbers: list[int], t: Tensor, together: _Together) -> tuple[int, int, bool]:
    """Returns the largest numbers of all processes, which meet in `t`."""
    t.copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    distributed.all_reduce(t, distributed.ReduceOp.MAX, group=together.process_group)
    most, least, anyone = t.tolist()
    return most, least, bool(anyone)
