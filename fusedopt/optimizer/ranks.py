"""`check_ranks`: before a step, the processes that share its parameters compare what each of them brings to it."""

import hashlib
from collections.abc import Iterator, Sequence
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


class _Together(NamedTuple):
    """Processes that must agree, and the parameters about which they must."""

    over: ReduceDims  # one mesh dimension; () for all processes
    process_group: Any  # None for all processes
    device: torch.device
    places: list[int]


class Ranks:
    """The comparison, and what an optimizer remembers for it.

    Nothing is compared in a capture of a CUDA graph, where the host learns nothing.

    Attributes:
        check: whether there is one.
        steps: how many there were, this one included.
    """

    def __init__(self, check_ranks: bool = False) -> None:
        checks.flag("check_ranks", check_ranks)
        self.check = check_ranks
        self.steps = 0
        self._compared = False

    def __bool__(self) -> bool:
        return self.check

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew."""
        return {"check_ranks": self.check}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Ranks.__init__(self, **state)

    def begin_step(self) -> None:
        """Counts a step, which may fail before the processes compare anything.

        Raises:
            RuntimeError: one failed after that, when others went on or waited for sums that this process did not send.
        """
        if self._compared:
            raise RuntimeError(
                "a step of this process failed after all processes had compared gradients and options, so that others "
                "may have taken it: load a checkpoint into all of them"
            )
        self.steps += 1

    def end_step(self) -> None:
        """Ends a step that did not fail."""
        self._compared = False

    def forget(self) -> None:
        """Counts steps anew, as after a load in all processes."""
        self.steps, self._compared = 0, False

    def tell(self, optimizer: "FusedOptimizer", groups: Groups, grads: Gradients, error: Exception) -> None:
        """Lets the others know, as they compare, of an error that kept this process from a step."""
        if self.check:
            with suppress(RuntimeError):  # this one's own error says more
                self.compare(optimizer, groups, grads, StepArgs(), (), error)

    def compare(
        self,
        optimizer: "FusedOptimizer",
        groups: Groups,
        grads: Gradients,
        args: StepArgs,
        sums: Sums,
        error: Exception | None = None,
    ) -> None:
        """Compares what this process brings to a step with what the others do; all of them must call it.

        One all-reduce of three numbers per mesh dimension, two with several dimensions. Waits for the device.

        Args:
            optimizer: whose step it is.
            groups, grads, args: of the step.
            sums: those of gradients that other processes hold as well are the same there, to the bit.
            error: what keeps this process from the step.

        Raises:
            RuntimeError: in all processes, for one that brings something else, or nothing.
        """
        params = [p for group in groups for p in group["params"]]
        everyone = _everyone(params)
        if not everyone or any(map(capturing, {p.device for p in params})):
            return
        common = list(self._common(optimizer, groups, args, error))
        each = [
            (
                tuple(p.shape),
                str(p.dtype),
                str(getattr(p, "placements", None)),
                *_there(optimizer.state.get(p), g is not None),
            )
            for p, g in zip(params, chain.from_iterable(grads))
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
        disagree = [False] * len(everyone)
        anyone = False
        for _ in range(1 if len(everyone) == 1 else 2):  # the second time, it gets around to all
            for k, together in enumerate(everyone):
                number = _digest(brought[k])
                most, least, heard = _largest([number, -number, anyone], together)
                disagree[k] = most != -least
                anyone = anyone or heard or disagree[k]
        if not anyone and not any(disagree):
            self._compared = error is None
            return
        names = list(_names(groups))
        found = [_first_difference(brought[k], together, names) for k, together in enumerate(everyone) if disagree[k]]
        if error is None:
            what = "; ".join(found) or "some that share other parameters do not"
            raise RuntimeError(f"the processes disagree about a step: {what}; {_WAY_OUT}")

    def _common(
        self, optimizer: "FusedOptimizer", groups: Groups, args: StepArgs, error: Exception | None
    ) -> Iterator[tuple[str, Any]]:
        yield "what keeps a process from the step", None if error is None else f"{type(error).__name__}: {error}"
        yield "the number of this step", self.steps
        if error is not None:
            return
        for name in ("scale", "grad_scale"):
            yield name, checks.plain(getattr(args, name))
        for name, value in optimizer.whole_options().items():
            if name != "backend":
                yield name, value
        states = (optimizer.state.get(p) for group in groups for p in group["params"])
        begun = next((state["step"] for state in states if state), None)
        yield "the count of steps in the state", None if begun is None or begun.is_meta else float(begun)
        yield "the number of groups", len(groups)
        for number, group in enumerate(groups):
            options = {**optimizer.hyper(group)._asdict(), **Precision.of(group, optimizer.seed).options()}
            for name, value in options.items():
                yield f"{name} of group {number}", checks.plain(value)


def _everyone(params: list[Tensor]) -> list[_Together]:
    """Who has a part in these parameters, by mesh dimension, in one order everywhere; whole ones belong to all."""
    if not (distributed.is_available() and distributed.is_initialized()) or not params:
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


def _largest(numbers: list[int], together: _Together) -> tuple[int, int, bool]:
    t = torch.tensor(numbers, dtype=torch.int64, device=together.device)
    distributed.all_reduce(t, distributed.ReduceOp.MAX, group=together.process_group)
    most, least, anyone = t.tolist()
    return most, least, bool(anyone)
