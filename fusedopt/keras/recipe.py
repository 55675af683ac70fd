"""create_optimizer: makes an AdamWeightDecay and the schedule that it follows."""

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
    **options: Any,
) -> tuple[AdamWeightDecay, WarmUp | PolynomialDecay]:
    """Returns an `AdamWeightDecay` whose rate rises linearly and then decays to `init_lr * min_lr_ratio`.

    Args:
        params: a module or named parameters; without weight decay, anything that torch's optimizers take. The original
            has no such argument.
        init_lr: the rate at the end of the warm-up.
        num_train_steps: number of all steps, those of the warm-up included.
        num_warmup_steps: length of the warm-up; 0 for none.
        min_lr_ratio: the last rate, divided by `init_lr`.
        adam_beta1, adam_beta2, adam_epsilon: as in `AdamWeightDecay`; without weight decay an epsilon of 0 stays 0, as
            in the other class that the original then returns.
        adam_clipnorm, adam_global_clipnorm: bound on the norm of each gradient, or on their common norm.
        weight_decay_rate: for parameters without "LayerNorm", "layer_norm" or "bias" in their name. Most torch models
            name their norms differently: `fusedopt.decay_groups` goes by the type of their module.
        power: exponent of the polynomial decay; the warm-up is always linear.
        include_in_weight_decay: regular expressions for names that decay all the same.
        backend: "auto", "triton" or "eager".
        **options: further ones of `AdamWeightDecay`, such as `master_weights`.

    Returns:
        The optimizer, and the schedule that it evaluates by itself. The transformers Trainer takes both:
        `Trainer(..., optimizers=create_optimizer(...))`.

    Raises:
        ValueError: an option is out of range, the warm-up is longer than the training, or the parameters have no names.

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
    total, warm_up = number("num_train_steps", num_train_steps), number("num_warmup_steps", num_warmup_steps)
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
    if total < warm_up:
        raise ValueError(f"num_train_steps includes num_warmup_steps={warm_up} and must not be less, got {total}")
    decay = PolynomialDecay(init_lr, total - warm_up, init_lr * min_lr_ratio, power)
    schedule = WarmUp(init_lr, decay, warm_up) if warm_up else decay
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
        **options,
    )
    if not decays:
        optimizer.set_epsilon(adam_epsilon)
    optimizer.schedule = schedule = schedule.belonging_to(optimizer)
    return optimizer, schedule
