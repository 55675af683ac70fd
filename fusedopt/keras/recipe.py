"""create_optimizer: an AdamWeightDecay and the schedule that it follows, in one call."""

from collections.abc import Sequence
from typing import Any

import torch

from fusedopt import checks
from fusedopt.keras.adam_weight_decay import AdamWeightDecay
from fusedopt.keras.schedules import PolynomialDecay, WarmUp
from fusedopt.schedules.checks import number


def create_optimizer(
    params: Any,
    init_lr: float,
    num_train_steps: int,
    num_warmup_steps: int,
    min_lr_ratio: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    adam_clipnorm: float | None = None,
    adam_global_clipnorm: float | None = None,
    weight_decay_rate: float = 0.0,
    power: float = 1.0,
    include_in_weight_decay: Sequence[str] | None = None,
    *,
    backend: str = "auto",
) -> tuple[AdamWeightDecay, WarmUp | PolynomialDecay]:
    """An `AdamWeightDecay` whose rate rises in a straight line and then decays to `init_lr * min_lr_ratio`.

    Args:
        params: a module, or named parameters; without weight decay anything that torch's optimizers take. The original
            has no such argument.
        init_lr: the rate at the end of the warm-up.
        num_train_steps: number of steps in all, warm-up included.
        num_warmup_steps: length of the warm-up; 0 for none.
        min_lr_ratio: the last rate, as a part of `init_lr`.
        adam_beta1, adam_beta2, adam_epsilon: as in `AdamWeightDecay`; without weight decay an epsilon of 0 stays 0, as
            in the other class that the original then returns.
        adam_clipnorm, adam_global_clipnorm: bound of each gradient's norm, or of their common norm.
        weight_decay_rate: of all parameters but those with "LayerNorm", "layer_norm" or "bias" in their name. Few torch
            models name their norms so: `fusedopt.decay_groups` sorts them by the type of their module.
        power: of the decay's polynomial; the warm-up is a straight line whatever it is.
        include_in_weight_decay: regular expressions for names that decay all the same.
        backend: "auto", "triton" or "eager".

    Returns:
        The optimizer and its schedule, which it calls by itself. The transformers Trainer takes the pair as it is:
        `Trainer(..., optimizers=create_optimizer(...))`.

    Raises:
        ValueError: an option is out of range, the warm-up is longer than the training, or there are no names to match.

    Source: transformers 4.34, `optimization_tf.py`.

    Example:
        >>> import torch
        >>> from fusedopt import create_optimizer
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer, schedule = create_optimizer(model, 0.4, 6, num_warmup_steps=2, weight_decay_rate=0.1)
        >>> [round(schedule(step), 2) for step in range(7)]
        [0.0, 0.2, 0.4, 0.3, 0.2, 0.1, 0.0]
    """
    init_lr, min_lr_ratio = number("init_lr", init_lr), number("min_lr_ratio", min_lr_ratio)
    num_train_steps, num_warmup_steps = (
        number("num_train_steps", num_train_steps),  # type: ignore[assignment]
        number("num_warmup_steps", num_warmup_steps),  # type: ignore[assignment]
    )
    for name, value in (
        ("adam_beta1", adam_beta1),
        ("adam_beta2", adam_beta2),
        ("adam_epsilon", adam_epsilon),
        ("adam_clipnorm", adam_clipnorm),
        ("adam_global_clipnorm", adam_global_clipnorm),
        ("weight_decay_rate", weight_decay_rate),
    ):
        if value is not None:
            checks.number(name, value)
    if num_train_steps < num_warmup_steps:
        raise ValueError(
            f"num_train_steps includes num_warmup_steps={num_warmup_steps} and must not be less, got {num_train_steps}"
        )
    decay = PolynomialDecay(init_lr, num_train_steps - num_warmup_steps, init_lr * min_lr_ratio, power)
    schedule = WarmUp(init_lr, decay, num_warmup_steps) if num_warmup_steps else decay
    decays = weight_decay_rate != 0.0
    optimizer = AdamWeightDecay(
        params.named_parameters() if isinstance(params, torch.nn.Module) else params,
        schedule,
        adam_beta1,
        adam_beta2,
        adam_epsilon,
        weight_decay_rate=weight_decay_rate,
        include_in_weight_decay=include_in_weight_decay if decays else None,
        exclude_from_weight_decay=["LayerNorm", "layer_norm", "bias"] if decays else None,
        clipnorm=adam_clipnorm,
        global_clipnorm=adam_global_clipnorm,
        backend=backend,
    )
    if not decays:
        optimizer.set_epsilon(adam_epsilon)
    optimizer.schedule = schedule = schedule.belonging_to(optimizer)
    return optimizer, schedule
