"""What a run would take: memory, traffic and all-reduces of one GPU by optimizer, without a GPU and without data.

Every number is asked of the optimizers themselves: their states are made on "meta", their kernels say what room they
need and what they add up over processes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fusedopt.plan.choices import CHOICES, Choice
from fusedopt.plan.costs import Cost, cost
from fusedopt.plan.mesh import shards
from fusedopt.plan.models import PRESETS, model_of
from fusedopt.plan.table import Plan

__all__ = ["CHOICES", "PRESETS", "Choice", "Cost", "Plan", "plan_run"]


def plan_run(
    model: str | Path | Mapping[str, Any] | nn.Module,
    *,
    fsdp: int = 1,
    tp: int = 1,
    bandwidth: float | None = None,
    memory: float | None = None,
    max_grad_norm: float | None = None,
    track_statistics: bool = False,
    choices: Sequence[Choice] = CHOICES,
) -> Plan:
    """Returns what a run of a model would take of one GPU, a row per choice of optimizer and precision.

    Args:
        model: a preset (a key of `PRESETS`), the path of a transformers `config.json` or its fields, or a module, whose
            parameters may be on "meta". Its dtypes do not matter but for parameters that are not trained.
        fsdp: processes over which `fully_shard` splits the rows of each parameter.
        tp: processes over which tensor parallelism splits matrices; not for a module.
        bandwidth: of a GPU's memory, in bytes per second; for milliseconds.
        memory: of a GPU, in bytes; marks the rows that fit.
        max_grad_norm: as of the optimizers: gradients are read once more, and their norm is added up.
        track_statistics: as of the optimizers: every step is measured.
        choices: the rows.

    Raises:
        ValueError: the model is not known, or cannot be split so.

    Example:
        >>> import torch
        >>> from fusedopt import AdamW
        >>> from fusedopt.plan import Choice, plan_run
        >>> model = torch.nn.Linear(4096, 4096, device="meta")
        >>> plan = plan_run(model, fsdp=8, choices=[Choice(AdamW, torch.bfloat16, {"master_weights": True})])
        >>> row = plan.rows[0]
        >>> row.weights, row.states
        (4195328, 20976656)
    """
    for name, number in (("fsdp", fsdp), ("tp", tp)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of processes, at least 1, got {number!r}")
    for name, value in (("bandwidth", bandwidth), ("memory", memory)):
        if value is not None and not value > 0.0:
            raise ValueError(f"{name} must be above 0, got {value!r}")
    planned = model_of(model)
    if tp > 1 and planned.heads is None:
        raise ValueError(
            f"tp={tp} needs to know how {planned.name} is split; give a preset or a config.json, or fsdp alone"
        )
    if planned.heads is not None and planned.heads % tp:
        raise ValueError(f"tp={tp} does not divide the {planned.heads} heads of keys and values of {planned.name}")
    of_all = {} if max_grad_norm is None else {"max_grad_norm": max_grad_norm}
    of_all |= {"track_statistics": True} if track_statistics else {}
    choices = [choice._replace(options={**choice.options, **of_all}) for choice in choices]
    mine = shards(planned.weights, fsdp, tp)
    frozen = list(zip(planned.frozen, shards(planned.frozen, fsdp, tp)))
    tensors = len(planned.weights) + len(planned.frozen)
    rows = [cost(choice, mine, frozen) for choice in choices]
    return Plan(planned.name, planned.numel, tensors, fsdp, tp, bandwidth, memory, rows)
