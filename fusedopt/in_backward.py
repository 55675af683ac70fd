"""The step in backward: each parameter is updated as soon as its gradient is complete, and the gradient is freed."""

from typing import Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.interface import StepArgs
from fusedopt.optimizer.base import FusedOptimizer
from fusedopt.optimizer.engine import Engine
from fusedopt.wrappers import unwrapped_optimizer


def register_step_in_backward(optimizer: FusedOptimizer, model: torch.nn.Module) -> "StepInBackward":
    """Lets `backward()` update each parameter as soon as its gradient is complete, and free the gradient.

    At no time do all gradients exist, only those that autograd has not finished. The numbers are those of `step()`. The
    training loop stays as it is: `step()`, which finds no gradients any more, still closes the step for schedulers,
    hooks and shared step counts, and has to follow every `backward()`. Rates and options are those that the group of a
    parameter has at that moment, whatever was done to the groups since; a parameter that is in none is left alone.

    What looks at gradients after `backward()` finds none: `clip_grad_norm_` clips nothing, a `GradScaler` cannot
    unscale (the next `step()` says so). Parameters that require no gradient now, and later do, and those of groups that
    are added later, are updated by `step()` as ever.

    Args:
        optimizer: an optimizer of this package, or Accelerate's or Lightning's wrapper around one.
        model: the module that holds all its parameters; not in a `DistributedDataParallel`, which sums gradients over
            processes only after the update (FSDP2, `fully_shard`, sums them before).

    Returns:
        A handle; its `remove()` makes `backward()` leave gradients to `step()` again.

    Raises:
        ValueError: an option needs all gradients at once (clipping by their common norm), a parameter is not in the
            model or has a gradient already, the model is a `DistributedDataParallel`; nothing was changed.
        RuntimeError: from `backward()`, where a parameter gets a second gradient before `step()`, so where gradients
            are meant to be accumulated; that parameter has not been updated twice.

    Source: the idea is LOMO's, Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources", arXiv:2306.09782.

    Example:
        >>> import fusedopt, torch
        >>> from fusedopt.in_backward import register_step_in_backward
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
        >>> handle = register_step_in_backward(optimizer, model)
        >>> before = model(torch.ones(4)).item()
        >>> model(torch.ones(4)).sum().backward()
        >>> model.weight.grad is None and model(torch.ones(4)).item() < before
        True
        >>> optimizer.step()
    """
    optimizer = unwrapped_optimizer(optimizer)
    if not isinstance(optimizer, FusedOptimizer):
        raise ValueError(
            f"the optimizer must be one of fusedopt's, got {type(optimizer).__name__}: take AdamW, for instance"
        )
    if any(isinstance(module, torch.nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "a step in backward would come before DistributedDataParallel has summed the gradients over the processes: "
            "use fully_shard (FSDP2), or leave the update to step()"
        )
    option = optimizer.needs_all_gradients()
    if option:
        raise ValueError(
            f"{option} needs all gradients at once, and a step in backward frees each as soon as it is there: "
            "leave out one of the two"
        )
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in names:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} of the optimizer is not in the model")
            if p.grad is not None:
                raise ValueError(f"{names[p]} has a gradient already: call step() or zero_grad() first")
    return StepInBackward(optimizer, names)


class StepInBackward:
    """The handle that `register_step_in_backward` returns: the hooks, and the parameters updated in the open step."""

    def __init__(self, optimizer: FusedOptimizer, names: dict[Tensor, str]) -> None:
        self._optimizer = optimizer
        self._names = names
        self._updated: set[Tensor] = set()
        optimizer.updated_in_backward = self._updated
        self._count: Tensor | None = None  # what shared step counts will be when the open step is closed
        self._places: dict[Tensor, tuple[int, int]] | None = None  # those of the open step
        # An engine keeps tables for the parameters of its last step, so each parameter has its own.
        self._engines: dict[Tensor, Engine] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._open),
            optimizer.register_step_post_hook(self._close),
        ]
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._engines[p] = Engine(goes_on=False)
                    self._handles.append(p.register_post_accumulate_grad_hook(self._update))

    def remove(self) -> None:
        """Takes the hooks away: from now on `backward()` leaves gradients to `step()`. Closes a step that is open."""
        if self._updated:
            self._optimizer.tracker.close(self._optimizer)
        self._close(self._optimizer, (), {})
        for handle in self._handles:
            handle.remove()
        self._optimizer.updated_in_backward = frozenset()

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        if p.grad is None:
            return
        if p in self._updated:
            raise RuntimeError(
                f"{self._names[p]} got a second gradient before step(), and a step in backward cannot accumulate: "
                "call step() after every backward(), or remove() the handle of register_step_in_backward"
            )
        place = self._place(p)
        if place is None:
            return  # No group has it any more: its gradient stays, as it would without this.
        self._optimizer.before_step()
        group = self._group_of(p, *place)
        try:
            self._engines[p].step(self._optimizer, [group], [[p.grad]], StepArgs())
        except BaseException:
            self._optimizer.tracker.abandon()
            raise
        if self._optimizer.shares_steps():
            count = self._optimizer.state[p]["step"]
            self._count = count.clone()
            count.sub_(1.0)  # until all have it: a state that is made in between begins where the others are
        self._updated.add(p)
        p.grad = None

    def _place(self, p: Tensor) -> tuple[int, int] | None:
        """Which parameter of which group it is; None if no group has it. Groups may have been edited at any time."""
        groups = self._optimizer.param_groups
        place = self._places.get(p) if self._places is not None else None
        if self._places is None or (place is not None and not _holds(groups, place, p)):
            checks.no_parameter_twice(groups)
            self._places = {q: (i, j) for i, group in enumerate(groups) for j, q in enumerate(group["params"])}
            place = self._places.get(p)
        return place

    def _group_of(self, p: Tensor, number: int, index: int) -> dict[str, Any]:
        """A group of this parameter alone, with the options and the rate that the whole group has now."""
        group = dict(self._optimizer.param_groups[number], params=[p])
        if "param_names" in group:
            group["param_names"] = [group["param_names"][index]]
        return group

    def _open(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for attribute in ("grad_scale", "found_inf"):
            if getattr(optimizer, attribute, None) is not None:
                self._optimizer.forget_scaler()
                raise RuntimeError(
                    "a GradScaler cannot unscale gradients that a step in backward has used already: train in bfloat16 "
                    "without a scaler, or remove() the handle of register_step_in_backward"
                )

    def _close(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A shared count is that of the step, also for parameters that had no gradient."""
        if self._count is not None:
            for state in optimizer.state.values():
                if state:
                    state["step"].copy_(self._count, non_blocking=True)
        self._count = self._places = None
        self._updated.clear()


def _holds(groups: list[dict[str, Any]], place: tuple[int, int], p: Tensor) -> bool:
    number, index = place
    params = groups[number]["params"] if number < len(groups) else []
    return index < len(params) and params[index] is p
